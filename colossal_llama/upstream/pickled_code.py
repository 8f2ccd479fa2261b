"""A checkpoint can run code while it is read.

Broken in: torch 2.5.1, where `torch.load` runs whatever was pickled unless another way is asked for, and
libraries that read files with it (colossalai 0.5.0, peft).
Shows as: nothing, until somebody resumes a stranger's checkpoint.
Cure: torch's own switch, read at every load; files of plain tensors are read as before.
"""

from __future__ import annotations

import os


def refuse_pickled_code() -> None:
    """Has `torch.load` in this process, and in those that it starts, read data alone."""
    os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")

"""A checkpoint can run code while it is read.

Broken in: colossalai 0.5.0, which reads optimizer files (here: Gemini's own) with `torch.load`, and torch
2.5.1, where that runs whatever was pickled unless another way is asked for.
Shows as: nothing, until somebody resumes a stranger's checkpoint.
Cure: torch's own switch, read at every load; files of plain tensors are read as before.
"""

from __future__ import annotations

import os


def refuse_pickled_code() -> None:
    """Has `torch.load` in this process, and in those that it starts, read data alone."""
    os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")

"""`train.py` with a loss scale at which the first fp16 gradients overflow."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def main() -> int:
    # Before the plugins, which take the number over when they are imported.
    from colossal_llama.training.plugins import base

    base.INITIAL_LOSS_SCALE = 2.0**22
    from support import load_script

    return load_script(ROOT / "train.py").main()


if __name__ == "__main__":
    from colossal_llama.utils.errors import run_command

    run_command(main, exit_at_once=True)

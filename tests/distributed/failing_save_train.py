"""`train.py` whose second process runs out of memory in the first save: in the part that `FAIL_IN` names."""

import itertools
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train
from colossal_llama.training.checkpoint import modeling_files, writer
from colossal_llama.utils.errors import run_command

PART = os.environ["FAIL_IN"]
original = getattr(writer, PART)
saves = itertools.count()


def fail_once(plan, *args):
    if os.environ["RANK"] == "1" and next(saves) == 0:
        hold, calls = plan.hold, itertools.count()

        def hold_or_fail(tensor):
            if next(calls) == 2:
                raise MemoryError("no room for a copy")
            return hold(tensor)

        plan.hold = hold_or_fail
    return original(plan, *args)


setattr(writer, PART, fail_once)
modeling_files.MIN_FILE_BYTES = 30_000  # both processes write weights
run_command(train.main, exit_at_once=True)

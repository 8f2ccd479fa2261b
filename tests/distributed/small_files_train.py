"""`train.py` with weight files so small that a tiny model has several, and every process writes some."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train
from colossal_llama.training.checkpoint import modeling_files
from colossal_llama.utils.errors import run_command

modeling_files.MIN_FILE_BYTES = 30_000
run_command(train.main, exit_at_once=True)

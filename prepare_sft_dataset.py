"""Turns JSONL conversations into tokenised bins for supervised fine-tuning."""

from __future__ import annotations

import os

from colossal_llama.dataset.arguments import parse_settings, preparation_parser
from colossal_llama.dataset.settings import SftSettings
from colossal_llama.utils.arguments import ArgumentParser
from colossal_llama.utils.errors import run_command


def build_parser() -> ArgumentParser:
    return preparation_parser("prepare_sft_dataset.py", __doc__, SftSettings)


def main() -> None:
    settings = parse_settings(build_parser(), SftSettings)
    from colossal_llama.dataset.preparation import prepare

    prepare(settings)


if __name__ == "__main__":
    # Loading a tokenizer needs no torch, whose import takes longer than everything else together.
    os.environ.update(USE_TORCH="0", TRANSFORMERS_NO_ADVISORY_WARNINGS="1")
    run_command(main)

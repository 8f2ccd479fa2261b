"""Turns JSONL documents into packed, tokenised bins for continual pre-training."""

from __future__ import annotations

import os
from argparse import Namespace

from colossal_llama.dataset.options import add_preparation_flags
from colossal_llama.utils.arguments import ArgumentParser
from colossal_llama.utils.errors import run_command


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="prepare_pretrain_dataset.py", description=__doc__)
    add_preparation_flags(parser)
    parser.add_argument(
        "--long_documents",
        choices=("chunk", "truncate"),
        default="chunk",
        help="documents longer than --max_length: spread over several rows, or cut off",
    )
    return parser


def prepare_pretraining_data(args: Namespace) -> None:
    from colossal_llama.dataset.preparation import make_settings, prepare
    from colossal_llama.dataset.tokenization import EncoderSpec

    prepare(
        make_settings(args, splice=True),
        lambda tokenizer: EncoderSpec(
            kind="pretrain",
            bos_id=tokenizer.bos_token_id,
            end_id=tokenizer.eos_token_id,
            max_length=args.max_length,
            truncate=args.long_documents == "truncate",
        ),
        {"kind": "pretrain", "long_documents": args.long_documents},
    )


def main() -> None:
    prepare_pretraining_data(build_parser().parse_args())


if __name__ == "__main__":
    # Loading a tokenizer needs no torch, whose import takes longer than everything else together.
    os.environ.update(USE_TORCH="0", TRANSFORMERS_NO_ADVISORY_WARNINGS="1")
    run_command(main)

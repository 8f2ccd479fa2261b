"""Turns JSONL conversations into tokenised bins for supervised fine-tuning."""

from __future__ import annotations

import os
from argparse import Namespace
from typing import Any

from colossal_llama.dataset.options import add_preparation_flags
from colossal_llama.utils.arguments import ArgumentParser
from colossal_llama.utils.errors import run_command


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="prepare_sft_dataset.py", description=__doc__)
    add_preparation_flags(parser)
    parser.add_argument(
        "--llama_version",
        type=int,
        choices=(2, 3),
        default=3,
        help="turns end with </s> (2) or <|eot_id|> (3)",
    )
    parser.add_flag("--splice", default=False, help="pack several conversations into a row; off: one each")
    parser.add_flag(
        "--chat_template",
        default=False,
        help="use the tokenizer's own chat template instead of the built-in one",
    )
    return parser


def prepare_sft_data(args: Namespace) -> None:
    from colossal_llama.dataset.conversation import find_special_tokens
    from colossal_llama.dataset.preparation import make_settings, prepare
    from colossal_llama.dataset.tokenization import EncoderSpec

    def make_spec(tokenizer: Any) -> EncoderSpec:
        special = find_special_tokens(tokenizer, args.llama_version)
        return EncoderSpec(
            kind="sft", bos_id=special.bos_id, end_id=special.end_of_turn_id, max_length=args.max_length
        )

    prepare(
        make_settings(args, splice=args.splice),
        make_spec,
        {"kind": "sft", "llama_version": args.llama_version, "splice": args.splice},
    )


def main() -> None:
    prepare_sft_data(build_parser().parse_args())


if __name__ == "__main__":
    # Loading a tokenizer needs no torch, whose import takes longer than everything else together.
    os.environ.update(USE_TORCH="0", TRANSFORMERS_NO_ADVISORY_WARNINGS="1")
    run_command(main)

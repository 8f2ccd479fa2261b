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
    from colossal_llama.dataset.chat_template import check_chat_template
    from colossal_llama.dataset.conversation import find_special_tokens
    from colossal_llama.dataset.preparation import make_settings, prepare
    from colossal_llama.dataset.tokenization import EncoderSpec

    def make_spec(tokenizer: Any) -> EncoderSpec:
        if args.chat_template:
            template, tokens = check_chat_template(tokenizer)
            ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
            return EncoderSpec(
                "chat_template", *ends, args.max_length, template=template, template_tokens=tokens
            )
        special = find_special_tokens(tokenizer, args.llama_version)
        return EncoderSpec("sft", special.bos_id, special.end_of_turn_id, args.max_length)

    template = "tokenizer" if args.chat_template else f"llama{args.llama_version}"
    facts = {"kind": "sft", "template": template, "splice": args.splice}
    prepare(make_settings(args, splice=args.splice), make_spec, facts)


def main() -> None:
    prepare_sft_data(build_parser().parse_args())


if __name__ == "__main__":
    # Loading a tokenizer needs no torch, whose import takes longer than everything else together.
    os.environ.update(USE_TORCH="0", TRANSFORMERS_NO_ADVISORY_WARNINGS="1")
    run_command(main)

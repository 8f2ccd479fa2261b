"""Every argument of `inference_example.py`. Nothing heavy is imported here."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path

from colossal_llama.utils.arguments import (
    ArgumentParser,
    add_seed,
    add_trust_remote_code,
    non_negative_int,
    number,
    positive_int,
)

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
STANDARD_INPUT = "-"
MIN_TEMPERATURE = 1e-6  # divided by much less, logits overflow


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="inference_example.py",
        description="Answers prompts with a LLaMA model, or holds a conversation. Answers go to standard "
        "output as they are generated, everything else to standard error.",
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model_path",
        type=model_name,
        required=True,
        help="hub name or local directory of a model, or of a LoRA adapter (merged into its base model)",
    )
    model.add_argument(
        "--tokenizer_path",
        type=tokenizer_name,
        help="hub name or directory of the tokenizer (default: the model's own)",
    )
    model.add_argument(
        "--device", type=device_name, default="auto", help="auto, cpu, cuda or cuda:N; auto: the GPU if any"
    )
    model.add_argument(
        "--dtype",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="arithmetic; auto: on a GPU the model's own half precision, else bf16 (or fp16); "
        "on the CPU fp32, or bf16 when fp32 does not fit in memory",
    )
    add_trust_remote_code(parser, model)

    prompts = parser.add_argument_group("prompts (one of --input_txt, --input_file, --chat)")
    prompts.add_argument(
        "--input_txt",
        type=prompt_text,
        action="append",
        help="a prompt; can be given several times",
    )
    prompts.add_argument(
        "--input_file",
        type=input_file,
        help="file of prompts, - for standard input: one a line, empty lines skipped; or JSONL with a string "
        "`prompt`, answered in JSONL with `prompt`, `answer`, `num_tokens` and `stopped_by`",
    )
    prompts.add_argument(
        "--input_format",
        choices=("auto", "text", "jsonl"),
        default="auto",
        help="what --input_file holds; auto: JSONL if its name ends in .jsonl, else text",
    )
    parser.add_flag(
        "--chat",
        default=False,
        help="conversation on standard input, a message a line; clear forgets it, exit ends",
        group=prompts,
    )
    prompts.add_argument(
        "--prompt_style",
        choices=("sft", "pretrained"),
        default="sft",
        help="sft: the conversation template of supervised fine-tuning; pretrained: the text and an arrow, "
        "for base models",
    )
    prompts.add_argument(
        "--llama_version",
        type=int,
        choices=(2, 3),
        help="turns end with </s> (2) or <|eot_id|> (3) (default: 3 if the tokenizer has <|eot_id|>, else 2)",
    )
    parser.add_flag(
        "--chat_template",
        default=False,
        help="use the tokenizer's own chat template instead of the built-in one",
        group=prompts,
    )

    answer = parser.add_argument_group("answer")
    answer.add_argument(
        "--max_new_tokens",
        type=positive_int,
        default=512,
        help="longest answer, in tokens; the prompt does not count",
    )
    parser.add_flag(
        "--do_sample", default=True, help="sample; off: the most likely token each time", group=answer
    )
    answer.add_argument(
        "--temperature",
        type=number(float, minimum=0),
        default=0.3,
        help="lower is closer to the most likely token; sampling only",
    )
    answer.add_argument(
        "--top_k",
        type=non_negative_int,
        default=50,
        help="sample among this many likely tokens; 0 = all",
    )
    answer.add_argument(
        "--top_p",
        type=number(float, maximum=1, above=0),
        default=0.95,
        help="sample among the likely tokens that make up this probability; 1 = all",
    )
    add_seed(parser, answer)
    parser.add_check(_check_clashes)
    return parser


def model_name(text: str) -> str:
    """A hub name, or the path of a directory that holds a model or a LoRA adapter."""
    path = Path(text).expanduser()
    if path.is_dir():
        if _holds_model(path):
            return str(path)
        inside = path / "modeling"
        remedy = f"; use {inside}" if _holds_model(inside) else ""
        raise ValueError(f"the directory has no config.json (nor adapter_config.json){remedy}")
    _check_hub_name(text, path)
    return text


def _holds_model(directory: Path) -> bool:
    return any((directory / name).is_file() for name in ("config.json", "adapter_config.json"))


def tokenizer_name(text: str) -> str:
    """A hub name, or the path of a directory that holds a tokenizer."""
    path = Path(text).expanduser()
    if path.is_dir():
        names = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
        if any((path / name).is_file() for name in names):
            return str(path)
        raise ValueError(f"the directory has none of {', '.join(names)}")
    _check_hub_name(text, path)
    return text


def _check_hub_name(text: str, path: Path) -> None:
    if path.exists():
        raise ValueError("is not a directory")
    looks_local = text.startswith((".", "~")) or (len(path.parts) > 1 and Path(path.parts[0]).is_dir())
    if looks_local or not HUB_NAME.fullmatch(text):
        raise ValueError("no such directory, and not a name of the Hugging Face hub (NAME or OWNER/NAME)")


def device_name(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text, re.ASCII):
        raise ValueError("choose from auto, cpu, cuda, cuda:N")
    return text


def prompt_text(text: str) -> str:
    if not text.strip():
        raise ValueError("the prompt is empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # bytes of the command line that were no UTF-8 arrive as lone surrogates
        raise ValueError("is not UTF-8 text") from None
    return text


def input_file(text: str) -> str:
    path = Path(text)
    if text != STANDARD_INPUT:
        if not path.exists():
            raise ValueError("no such file")
        if path.is_dir():
            raise ValueError("is a directory")
    return text


def _check_clashes(args: Namespace) -> list[str]:
    problems = []
    given = [
        flag
        for flag, is_given in (
            ("--input_txt", args.input_txt is not None),
            ("--input_file", args.input_file is not None),
            ("--chat", args.chat),
        )
        if is_given
    ]
    if not given:
        problems.append("nothing to answer: give --input_txt, --input_file or --chat")
    elif len(given) > 1:
        problems.append(f"{' and '.join(given)} do not go together; give one of them")
    if args.input_format != "auto" and args.input_file is None:
        problems.append(f"--input_format {args.input_format}: has no effect without --input_file")
    if args.prompt_style == "pretrained":
        for flag, is_given in (
            ("--chat", args.chat),
            ("--chat_template", args.chat_template),
            (f"--llama_version {args.llama_version}", args.llama_version is not None),
        ):
            if is_given:
                problems.append(f"{flag}: --prompt_style pretrained knows no turns; use --prompt_style sft")
    if args.chat_template and args.llama_version is not None:
        problems.append(
            f"--llama_version {args.llama_version}: has no effect with --chat_template; leave it out"
        )
    if args.do_sample and args.temperature < MIN_TEMPERATURE:
        problems.append(
            f"--temperature {args.temperature:g}: sampling needs {MIN_TEMPERATURE:g} or more; "
            "use --do_sample False"
        )
    return problems

"""What the user asked `inference_example.py` for: one frozen object for each concern.

Nothing heavy is imported here: `--help` has to answer in under a second.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from colossal_llama.conversation import TEMPLATES
from colossal_llama.utils.arguments import non_negative_int, number, positive_int
from colossal_llama.utils.settings import flag

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
STANDARD_INPUT = "-"


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


@dataclass(frozen=True)
class ModelSettings:
    """The model that answers, and where it runs."""

    model_path: str = flag(
        None,
        "hub name or local directory of a model, or of a LoRA adapter (merged into its base model)",
        type=model_name,
        required=True,
    )
    tokenizer_path: str | None = flag(
        None, "hub name or directory of the tokenizer (default: the model's own)", type=tokenizer_name
    )
    device: str = flag("auto", "auto, cpu, cuda or cuda:N; auto: the GPU if any", type=device_name)
    dtype: str = flag(
        "auto",
        "arithmetic; auto: on a GPU the model's own half precision, else bf16 (or fp16); "
        "on the CPU fp32, or bf16 when fp32 does not fit in memory",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    trust_remote_code: bool = flag(
        False,
        "run Python code that the model directory or hub repository ships; off: its files are only data",
    )


@dataclass(frozen=True)
class PromptSettings:
    """What is answered, and in which template the model sees it."""

    input_txt: list[str] | None = flag(
        None, "a prompt; can be given several times", type=prompt_text, repeatable=True
    )
    input_file: str | None = flag(
        None,
        "file of prompts, - for standard input: one a line, empty lines skipped; or JSONL with a string "
        "`prompt`, answered in JSONL with `prompt`, `answer`, `num_tokens` and `stopped_by`",
        type=input_file,
    )
    input_format: str = flag(
        "auto",
        "what --input_file holds; auto: JSONL if its name ends in .jsonl, else text",
        choices=("auto", "text", "jsonl"),
    )
    chat: bool = flag(False, "conversation on standard input, a message a line; clear forgets it, exit ends")
    prompt_style: str = flag(
        "sft",
        "sft: the conversation template of supervised fine-tuning; pretrained: the text and an arrow, "
        "for base models",
        choices=("sft", "pretrained"),
    )
    llama_version: int | None = flag(
        None,
        "turns end with </s> (2) or <|eot_id|> (3); means --template colossal (default: as training has "
        "written it, else 3 if the tokenizer has <|eot_id|>, else 2)",
        type=int,
        choices=(2, 3),
    )
    template: str | None = flag(
        None,
        "form of the conversation (default: the one that training has written beside the tokenizer, else "
        "colossal)",
        choices=tuple(name for name in TEMPLATES if name != "tokenizer"),
    )
    chat_template: bool = flag(False, "use the tokenizer's own chat template instead of the built-in one")

    @property
    def holds_jsonl(self) -> bool:
        """Whether `--input_file` is JSONL: said by `--input_format`, or by the file's name."""
        if self.input_format != "auto":
            return self.input_format == "jsonl"
        return self.input_file is not None and self.input_file.endswith(".jsonl")


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; None in place of one of these means greedily."""

    temperature: float
    top_k: int
    top_p: float


@dataclass(frozen=True)
class AnswerSettings:
    """How long answers may be, and how each token is chosen."""

    max_new_tokens: int = flag(512, "longest answer, in tokens; the prompt does not count", type=positive_int)
    do_sample: bool = flag(True, "sample; off: the most likely token each time")
    temperature: float = flag(
        0.3, "lower is closer to the most likely token; sampling only", type=number(float, minimum=0)
    )
    top_k: int = flag(50, "sample among this many likely tokens; 0 = all", type=non_negative_int)
    top_p: float = flag(
        0.95,
        "sample among the likely tokens that make up this probability; 1 = all",
        type=number(float, maximum=1, above=0),
    )
    seed: int = flag(42, "seed of every random choice", type=number(int, 0, 2**31 - 1))

    @property
    def sampling(self) -> Sampling | None:
        return Sampling(self.temperature, self.top_k, self.top_p) if self.do_sample else None


@dataclass(frozen=True)
class InferenceSettings:
    """Everything that the user asked for."""

    model: ModelSettings
    prompts: PromptSettings
    answer: AnswerSettings


# Field of `InferenceSettings` -> its class and its title on the `--help` page.
TITLES: dict[str, tuple[type, str]] = {
    "model": (ModelSettings, "model"),
    "prompts": (PromptSettings, "prompts (one of --input_txt, --input_file, --chat)"),
    "answer": (AnswerSettings, "answer"),
}

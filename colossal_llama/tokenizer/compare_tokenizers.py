"""Compares tokenizers on a corpus: vocabulary size, tokens per character, and tokens per sample.

The compression rate is tokens divided by characters, over the whole corpus: lower is better. Special tokens
that a tokenizer adds by itself (BOS) are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from colossal_llama.utils.arguments import ArgumentParser, directory_list
from colossal_llama.utils.console import format_table, log, progress_bar
from colossal_llama.utils.errors import UserError, run_command
from colossal_llama.utils.messages import first_line
from colossal_llama.utils.output_checks import why_not_output_file
from colossal_llama.utils.settings import add_settings, flag, parse_settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_SAMPLES = 1000


@dataclass(frozen=True)
class Comparison:
    """One tokenizer's figures on the corpus."""

    tokenizer: str
    vocabulary_size: int
    compression_rate: float
    mean_tokens_per_sample: float


@dataclass(frozen=True)
class ComparisonSettings:
    """The tokenizers that are compared, on which corpus."""

    tokenizer_dirs: list[Path] = flag(
        None,
        "comma list of tokenizer directories, in the order of the table",
        type=directory_list,
        required=True,
    )
    data_input_dirs: list[Path] = flag(
        None,
        "comma list of directories with JSONL pre-training records or conversations; each record is a sample",
        type=directory_list,
        required=True,
    )
    output_file: Path | None = flag(
        None, "JSON file to write the figures to as well; replaces no other kind of file", type=Path
    )


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="compare_tokenizers.py", description=__doc__)
    add_settings(parser, ComparisonSettings, check=_check_output)
    return parser


def _check_output(settings: ComparisonSettings) -> list[str]:
    if settings.output_file is None:
        return []
    names = [field.name for field in fields(Comparison)]
    reason = why_not_output_file(
        settings.output_file,
        lambda rows: isinstance(rows, list) and all(list(row) == names for row in rows),
    )
    return [f"--output_file {settings.output_file}: {reason}"] if reason else []


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a directory; special-token strings in texts are plain text to it."""
    from colossal_llama.tokenizer.loading import load_pretrained_tokenizer

    return load_pretrained_tokenizer(
        directory,
        lambda error: f"--tokenizer_dirs {directory}: no tokenizer can be loaded ({first_line(error)})",
        split_special_tokens=True,
    )


def compare(name: str, tokenizer: PreTrainedTokenizerBase, samples: Iterable[str]) -> Comparison:
    """Encodes every sample.

    Raises:
        UserError: there is no text in the samples.
    """
    num_samples = num_characters = num_tokens = 0
    batch: list[str] = []

    def count() -> None:
        nonlocal num_tokens
        num_tokens += sum(map(len, tokenizer(batch, add_special_tokens=False, verbose=False).input_ids))
        batch.clear()

    for text in samples:
        num_samples += 1
        num_characters += len(text)
        batch.append(text)
        if len(batch) == BATCH_SAMPLES:
            count()
    if batch:
        count()
    if not num_characters:
        raise UserError("--data_input_dirs: no text in any record")
    return Comparison(name, len(tokenizer), num_tokens / num_characters, num_tokens / num_samples)


def main() -> None:
    settings = parse_settings(build_parser(), ComparisonSettings)

    from colossal_llama.tokenizer.corpus_texts import read_samples
    from colossal_llama.utils.files import write_json

    comparisons = []
    for directory in settings.tokenizer_dirs:
        tokenizer = load_tokenizer(directory)
        samples = progress_bar(read_samples(settings.data_input_dirs), unit=" samples", desc=directory.name)
        comparisons.append(compare(str(directory), tokenizer, samples))
    header = ["Tokenizer", "Vocabulary size", "Compression rate", "Average length of samples (tokens)"]
    log(format_table(header, [tuple(asdict(comparison).values()) for comparison in comparisons]))
    if settings.output_file is not None:
        write_json(settings.output_file, [asdict(comparison) for comparison in comparisons])


if __name__ == "__main__":
    run_command(main)

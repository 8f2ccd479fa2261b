"""Compares tokenizers on a corpus: vocabulary size, tokens per character, and tokens per sample.

The compression rate is tokens divided by characters, over the whole corpus: lower is better. Special tokens
that a tokenizer adds by itself (BOS) are not counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from colossal_llama.tokenizer.output_directory import objection_to_output
from colossal_llama.utils.arguments import ArgumentParser, directory_list
from colossal_llama.utils.console import format_table, log, progress_bar
from colossal_llama.utils.errors import UserError, run_command
from colossal_llama.utils.files import objection_to_replacing

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


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="compare_tokenizers.py", description=__doc__)
    parser.add_argument(
        "--tokenizer_dirs",
        type=directory_list,
        required=True,
        help="comma list of tokenizer directories, in the order of the table",
    )
    parser.add_argument(
        "--data_input_dirs",
        type=directory_list,
        required=True,
        help="comma list of directories with JSONL pre-training records or conversations; each record is a "
        "sample",
    )
    parser.add_argument(
        "--output_file",
        type=Path,
        help="JSON file to write the figures to as well; replaces no other kind of file",
    )
    parser.add_check(_check_output)
    return parser


def _check_output(args: argparse.Namespace) -> list[str]:
    if args.output_file is None:
        return []
    names = [field.name for field in fields(Comparison)]
    objection = objection_to_output(args.output_file.parent)
    if objection is None and args.output_file.is_dir():
        objection = "is a directory"
    if objection is None:
        objection = objection_to_replacing(
            args.output_file, lambda rows: isinstance(rows, list) and all(list(row) == names for row in rows)
        )
    return [f"--output_file {args.output_file}: {objection}"] if objection else []


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a directory; special-token strings in texts are plain text to it."""
    from transformers import AutoTokenizer

    from colossal_llama.tokenizer.tokenizer_files import check_settings

    check_settings(directory)
    try:
        # Not left open: transformers would ask standard input whether to run the directory's code.
        return AutoTokenizer.from_pretrained(directory, split_special_tokens=True, trust_remote_code=False)
    except Exception as error:  # the Rust library has no exception types of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"--tokenizer_dirs {directory}: no tokenizer can be loaded ({reason})") from None


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
    args = build_parser().parse_args()

    from colossal_llama.tokenizer.corpus_texts import read_samples
    from colossal_llama.utils.files import write_json

    comparisons = []
    for directory in args.tokenizer_dirs:
        tokenizer = load_tokenizer(directory)
        samples = progress_bar(read_samples(args.data_input_dirs), unit=" samples", desc=directory.name)
        comparisons.append(compare(str(directory), tokenizer, samples))
    header = ["Tokenizer", "Vocabulary size", "Compression rate", "Average length of samples (tokens)"]
    log(format_table(header, [tuple(asdict(comparison).values()) for comparison in comparisons]))
    if args.output_file is not None:
        write_json(args.output_file, [asdict(comparison) for comparison in comparisons])


if __name__ == "__main__":
    run_command(main)

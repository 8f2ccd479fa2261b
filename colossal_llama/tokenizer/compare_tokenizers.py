"""Compares tokenizers on a corpus: vocabulary size, tokens per character, and tokens per sample.

The compression rate is tokens divided by characters, over the whole corpus: lower is better. Special tokens
that a tokenizer adds by itself (BOS) are not counted. With --model, what each extension of the first
tokenizer saves and costs in a model of that shape is estimated too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama.utils.arguments import ArgumentParser, directory_list, existing_directory
from colossal_llama.utils.console import format_table, log, progress_bar
from colossal_llama.utils.errors import UserError, run_command
from colossal_llama.utils.messages import first_line
from colossal_llama.utils.output_checks import why_not_output_file
from colossal_llama.utils.settings import add_settings, flag, parse_settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_SAMPLES = 1000
BILL = "extension"  # of a row in the output file


@dataclass(frozen=True)
class Comparison:
    """One tokenizer's figures on the corpus."""

    tokenizer: str
    vocabulary_size: int
    compression_rate: float
    mean_tokens_per_sample: float


@dataclass
class TokenCounts:
    """What a tokenizer makes of the corpus.

    Attributes:
        new_rows: ids that an extension added to it; `new_tokens` of the tokens are among them.
    """

    samples: int = 0
    characters: int = 0
    tokens: int = 0
    new_tokens: int = 0
    new_rows: range = field(default_factory=lambda: range(0))


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
    text_field: str = flag(
        "",
        "the field that holds a record's text (default: source and target, messages or text, as found)",
        type=str,
    )
    model: Path | None = flag(
        None,
        "model directory whose config.json gives the shape for a bill of each extension of the first "
        "tokenizer: tokens saved, parameters added, training after which it has paid; off: no bill",
        type=existing_directory,
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
    names = [each.name for each in fields(Comparison)]
    reason = why_not_output_file(
        settings.output_file,
        lambda rows: isinstance(rows, list) and all(list(row) in (names, [*names, BILL]) for row in rows),
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


def count_tokens(
    tokenizer: PreTrainedTokenizerBase, samples: Iterable[str], new_rows: range = range(0)
) -> TokenCounts:
    """Encodes every sample.

    Raises:
        UserError: there is no text in the samples.
    """
    counts = TokenCounts(new_rows=new_rows)
    batch: list[str] = []

    def count() -> None:
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False).input_ids:
            counts.tokens += len(ids)
            if new_rows:
                counts.new_tokens += sum(token_id in new_rows for token_id in ids)
        batch.clear()

    for text in samples:
        counts.samples += 1
        counts.characters += len(text)
        batch.append(text)
        if len(batch) == BATCH_SAMPLES:
            count()
    if batch:
        count()
    if not counts.characters:
        raise UserError("--data_input_dirs: no text in any record")
    return counts


def make_bills(settings: ComparisonSettings, found: list[tuple[Comparison, TokenCounts]]) -> list[Any]:
    """The bill of each tokenizer that extends the first one; None for the others.

    Raises:
        UserError: `--model` has no configuration of a LLaMA.
    """
    from colossal_llama.tokenizer.extension_bill import make_bill
    from colossal_llama.utils.files import read_json_object
    from colossal_llama.utils.llama_size import read_size

    assert settings.model is not None
    path = settings.model / "config.json"
    try:
        size = read_size(read_json_object(path))
    except ValueError as error:
        raise UserError(f"--model {settings.model}: config.json: {error}") from None
    base, base_counts = found[0]
    return [
        make_bill(
            size,
            base.vocabulary_size,
            comparison.vocabulary_size,
            base_counts.tokens,
            counts.tokens,
            len(counts.new_rows),
            counts.new_tokens,
        )
        if counts.new_rows.start == base.vocabulary_size and counts.new_rows
        else None
        for comparison, counts in found
    ]


def main() -> None:
    settings = parse_settings(build_parser(), ComparisonSettings)

    from colossal_llama.tokenizer.corpus_texts import read_samples
    from colossal_llama.tokenizer.extension_bill import format_bill
    from colossal_llama.tokenizer.new_rows import find_new_rows
    from colossal_llama.utils.files import write_json

    found = []
    for directory in settings.tokenizer_dirs:
        tokenizer = load_tokenizer(directory)
        texts = read_samples(settings.data_input_dirs, settings.text_field)
        samples = progress_bar(texts, unit=" samples", desc=directory.name)
        counts = count_tokens(tokenizer, samples, find_new_rows(directory) if settings.model else range(0))
        rate, mean = counts.tokens / counts.characters, counts.tokens / counts.samples
        found.append((Comparison(str(directory), len(tokenizer), rate, mean), counts))
    header = ["Tokenizer", "Vocabulary size", "Compression rate", "Average length of samples (tokens)"]
    log(format_table(header, [tuple(asdict(comparison).values()) for comparison, _ in found]))
    rows = [asdict(comparison) for comparison, _ in found]
    if settings.model is not None:
        bills = make_bills(settings, found)
        for row, bill in zip(rows, bills, strict=True):
            row[BILL] = bill and bill.as_json()
            if bill is not None:
                log("\n" + format_bill(row["tokenizer"], bill))
        if not any(bills):
            log(f"No bill: none of the tokenizers is an extension of {settings.tokenizer_dirs[0]}")
    if settings.output_file is not None:
        write_json(settings.output_file, rows)


if __name__ == "__main__":
    run_command(main)

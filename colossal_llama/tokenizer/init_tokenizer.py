"""Extends a LLaMA tokenizer with new pieces from a JSONL file.

LLaMA-2 (tokenizer.model, sentencepiece BPE) and LLaMA-3 (tokenizer.json, byte-level BPE) sources are
supported. A report of what was added, and of pieces that can never be produced, is written beside the
tokenizer.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from colossal_llama.tokenizer.extension import UNREACHABLE_MODES, VocabularyExtension
from colossal_llama.tokenizer.tokenizer_files import (
    REPORT_FILE,
    files_of_tokenizer,
    is_extension,
    settings_of,
)
from colossal_llama.utils.arguments import ArgumentParser, existing_directory, existing_file
from colossal_llama.utils.console import format_table, log, warn
from colossal_llama.utils.errors import UserError, run_command
from colossal_llama.utils.messages import first_line
from colossal_llama.utils.output_checks import why_not_output_directory
from colossal_llama.utils.settings import add_settings, flag, parse_settings

if TYPE_CHECKING:
    from colossal_llama.tokenizer.agreement import Agreement


@dataclass(frozen=True)
class TokenizerSettings:
    """The tokenizer that is extended, the new pieces, and the tokenizer that is written."""

    source_tokenizer_dir: Path = flag(
        None,
        "tokenizer to extend: tokenizer.model (LLaMA-2) or tokenizer.json (LLaMA-3), with its configuration",
        type=existing_directory,
        required=True,
    )
    target_tokenizer_dir: Path = flag(
        None, "where the extended tokenizer goes; never the source directory", type=Path, required=True
    )
    expand_tokens_file: Path = flag(
        None, 'JSONL file of new pieces, one {"piece": "..."} per line', type=existing_file, required=True
    )
    unreachable: str = flag(
        "report",
        "pieces that no text can ever yield: add them and say so (report), add the missing intermediate "
        "pieces too (add), leave them out (drop), or stop (error)",
        choices=UNREACHABLE_MODES,
    )
    overwrite: bool = flag(
        False,
        "replace a tokenizer in the target directory that this script did not make; what it made itself is "
        "replaced in any case",
    )


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="init_tokenizer.py", description=__doc__)
    add_settings(parser, TokenizerSettings, check=_check_directories)
    return parser


def _check_directories(settings: TokenizerSettings) -> list[str]:
    source, target = settings.source_tokenizer_dir, settings.target_tokenizer_dir
    if reason := why_not_output_directory(target):
        return [f"--target_tokenizer_dir {target}: {reason}"]
    if target.exists() and target.samefile(source):
        return [f"--target_tokenizer_dir {target}: is the source directory; the source is never changed"]
    weights = sorted(path.name for pattern in ("*.safetensors", "*.bin") for path in target.glob(pattern))
    if weights:
        return [
            f"--target_tokenizer_dir {target}: holds model weights ({weights[0]}) that would no longer fit "
            "the tokenizer; choose another directory or remove the model"
        ]
    if settings.overwrite or is_extension(target):
        return []
    # Code has names of its own kind: what would be written over is somebody's too.
    replaced = {
        *files_of_tokenizer(target),
        *(name for name in settings_of(source) if (target / name).exists()),
    }
    if replaced:
        return [
            f"--target_tokenizer_dir {target}: holds a tokenizer that this script did not make "
            f"({', '.join(sorted(replaced)[:5])}); choose another directory, or --overwrite"
        ]
    return []


def extend(settings: TokenizerSettings) -> tuple[VocabularyExtension, dict[str, bytes]]:
    """Reads the source and the pieces; returns the extension and its vocabulary files (name -> content)."""
    from colossal_llama.tokenizer.pieces_file import read_pieces
    from colossal_llama.tokenizer.source import open_source

    source = open_source(settings.source_tokenizer_dir, "--source_tokenizer_dir")
    extension = source.extend(read_pieces(settings.expand_tokens_file, source.rules), settings.unreachable)
    if not extension.added:
        raise UserError(
            f"{settings.expand_tokens_file}: nothing to add: {len(extension.present):,} pieces are in the "
            f"source already, {len(extension.dropped):,} can never be produced"
        )
    return extension, source.vocabulary_files(extension)


def write_tokenizer(
    settings: TokenizerSettings, extension: VocabularyExtension, vocabulary_files: dict[str, bytes]
) -> Agreement | None:
    """Writes report, settings (the source's, byte for byte) and vocabulary files, in this order.

    Returns:
        On which texts slow and fast form disagree; None of a byte-level tokenizer, which has only one.
    """
    import orjson

    from colossal_llama.tokenizer.output_directory import place_files

    source, target = settings.source_tokenizer_dir, settings.target_tokenizer_dir
    contents = {name: (source / name).read_bytes() for name in settings_of(source)}
    contents |= vocabulary_files
    report = extension.report(settings.unreachable)
    agreement = None
    if extension.kind == "sentencepiece":
        agreement = compare_with_source(source, contents, extension.added)
        report["slow_and_fast"] = agreement and agreement.report()
    report_file = orjson.dumps(report, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    stale = [name for name in files_of_tokenizer(target) if not name.endswith(".py")]  # code may be a model's
    place_files(target, {REPORT_FILE: report_file, **contents}, owned=stale)
    return agreement


def compare_with_source(source: Path, contents: Mapping[str, bytes], pieces: list[str]) -> Agreement | None:
    """On which probe texts slow and fast form disagree; None where they can't be loaded."""
    from colossal_llama.tokenizer.agreement import compare_forms
    from colossal_llama.tokenizer.output_directory import place_files
    from colossal_llama.upstream.quiet import quieten_libraries

    quieten_libraries()
    try:
        with tempfile.TemporaryDirectory() as directory:
            target = Path(directory) / "tokenizer"
            place_files(target, contents, owned=[])
            return compare_forms(source, target, pieces)
    except Exception as error:  # of tokenizers and sentencepiece too, which have classes of their own
        warn(
            f"slow and fast form are not compared: transformers can't load {source} or its extension "
            f"({first_line(error)})"
        )
        return None


def summarise(
    settings: TokenizerSettings, extension: VocabularyExtension, agreement: Agreement | None = None
) -> None:
    for note in extension.notes:
        log(f"note: {note}")
    if agreement and agreement.of_source:
        log(
            f"note: on {len(agreement.of_source):,} of {agreement.num_texts:,} probe texts the source's own "
            f"slow and fast tokenizers disagree, the first {agreement.of_source[0]}"
        )
    if agreement and agreement.new:
        log(
            f"note: on {len(agreement.new):,} of {agreement.num_texts:,} probe texts the source's slow and "
            f"fast tokenizers agree and the new ones do not, the first {agreement.new[0]}"
        )
    rows = [(name.replace("_", " "), count) for name, count in extension.counts().items()]
    log(format_table(["vocabulary", "count"], rows))
    report = settings.target_tokenizer_dir / REPORT_FILE
    if extension.unreachable:
        share = len(extension.unreachable) / len(extension.added)
        warn(
            f"{len(extension.unreachable):,} new pieces ({share:.1%}) can never be produced, the first: "
            f"{', '.join(list(extension.unreachable)[:5])}; all of them are in {report}. "
            "--unreachable add makes them reachable, drop leaves them out"
        )
    log(f"Report: {report}")
    log(f"Tokenizer: {settings.target_tokenizer_dir}")


def main() -> None:
    settings = parse_settings(build_parser(), TokenizerSettings)
    extension, vocabulary_files = extend(settings)
    agreement = write_tokenizer(settings, extension, vocabulary_files)
    summarise(settings, extension, agreement)


if __name__ == "__main__":
    # Loading a tokenizer needs no torch, whose import takes longer than everything else together.
    os.environ.update(USE_TORCH="0", TRANSFORMERS_NO_ADVISORY_WARNINGS="1")
    run_command(main)

"""Extends a LLaMA tokenizer with new pieces from a JSONL file.

LLaMA-2 (tokenizer.model, sentencepiece BPE) and LLaMA-3 (tokenizer.json, byte-level BPE) sources are
supported. A report of what was added, and of pieces that can never be produced, is written beside the
tokenizer.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from colossal_llama.tokenizer.extension import UNREACHABLE_MODES, VocabularyExtension
from colossal_llama.tokenizer.output_directory import objection_to_output
from colossal_llama.tokenizer.tokenizer_files import (
    REPORT_FILE,
    files_of_tokenizer,
    is_extension,
    settings_of,
)
from colossal_llama.utils.arguments import ArgumentParser, existing_directory, existing_file
from colossal_llama.utils.console import format_table, log, warn
from colossal_llama.utils.errors import UserError, run_command

if TYPE_CHECKING:
    from colossal_llama.tokenizer.agreement import Agreement


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="init_tokenizer.py", description=__doc__)
    parser.add_argument(
        "--source_tokenizer_dir",
        type=existing_directory,
        required=True,
        help="tokenizer to extend: tokenizer.model (LLaMA-2) or tokenizer.json (LLaMA-3), with its "
        "configuration",
    )
    parser.add_argument(
        "--target_tokenizer_dir",
        type=Path,
        required=True,
        help="where the extended tokenizer goes; never the source directory",
    )
    parser.add_argument(
        "--expand_tokens_file",
        type=existing_file,
        required=True,
        help='JSONL file of new pieces, {"piece": "..."} a line',
    )
    parser.add_argument(
        "--unreachable",
        choices=UNREACHABLE_MODES,
        default="report",
        help="pieces that no text can ever yield: add them and say so (report), add the missing "
        "intermediate pieces too (add), leave them out (drop), or stop (error)",
    )
    parser.add_flag(
        "--overwrite",
        default=False,
        help="replace a tokenizer in the target directory that this script did not make; what it made itself "
        "is replaced in any case",
    )
    parser.add_check(_check_directories)
    return parser


def _check_directories(args: argparse.Namespace) -> list[str]:
    source, target = args.source_tokenizer_dir, args.target_tokenizer_dir
    if objection := objection_to_output(target):
        return [f"--target_tokenizer_dir {target}: {objection}"]
    if target.exists() and target.samefile(source):
        return [f"--target_tokenizer_dir {target}: is the source directory; the source is never changed"]
    weights = sorted(path.name for pattern in ("*.safetensors", "*.bin") for path in target.glob(pattern))
    if weights:
        return [
            f"--target_tokenizer_dir {target}: holds model weights ({weights[0]}) that would no longer fit "
            "the tokenizer; choose another directory or remove the model"
        ]
    if args.overwrite or is_extension(target):
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


def extend(args: argparse.Namespace) -> tuple[VocabularyExtension, dict[str, bytes]]:
    """Reads the source and the pieces; returns the extension and its vocabulary files (name -> content)."""
    from colossal_llama.tokenizer.pieces_file import read_pieces
    from colossal_llama.tokenizer.source import open_source

    source = open_source(args.source_tokenizer_dir, "--source_tokenizer_dir")
    extension = source.extend(read_pieces(args.expand_tokens_file, source.rules), args.unreachable)
    if not extension.added:
        raise UserError(
            f"{args.expand_tokens_file}: nothing to add: {len(extension.present):,} pieces are in the source "
            f"already, {len(extension.dropped):,} can never be produced"
        )
    return extension, source.vocabulary_files(extension)


def write_tokenizer(
    args: argparse.Namespace, extension: VocabularyExtension, vocabulary_files: dict[str, bytes]
) -> Agreement | None:
    """Writes report, settings (the source's, byte for byte) and vocabulary files, in this order.

    Returns:
        On which texts slow and fast form disagree; None of a byte-level tokenizer, which has only one.
    """
    import orjson

    from colossal_llama.tokenizer.output_directory import place_files

    source, target = args.source_tokenizer_dir, args.target_tokenizer_dir
    contents = {name: (source / name).read_bytes() for name in settings_of(source)}
    contents |= vocabulary_files
    report = extension.report(args.unreachable)
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
    from colossal_llama.utils.quiet import quieten_libraries

    quieten_libraries()
    try:
        with tempfile.TemporaryDirectory() as directory:
            target = Path(directory) / "tokenizer"
            place_files(target, contents, owned=[])
            return compare_forms(source, target, pieces)
    except Exception as error:  # of tokenizers and sentencepiece too, which have classes of their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warn(
            f"slow and fast form are not compared: transformers can't load {source} or its extension "
            f"({reason})"
        )
        return None


def summarise(
    args: argparse.Namespace, extension: VocabularyExtension, agreement: Agreement | None = None
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
    report = args.target_tokenizer_dir / REPORT_FILE
    if extension.unreachable:
        share = len(extension.unreachable) / len(extension.added)
        warn(
            f"{len(extension.unreachable):,} new pieces ({share:.1%}) can never be produced, the first: "
            f"{', '.join(list(extension.unreachable)[:5])}; all of them are in {report}. "
            "--unreachable add makes them reachable, drop leaves them out"
        )
    log(f"Report: {report}")
    log(f"Tokenizer: {args.target_tokenizer_dir}")


def main() -> None:
    args = build_parser().parse_args()
    extension, vocabulary_files = extend(args)
    agreement = write_tokenizer(args, extension, vocabulary_files)
    summarise(args, extension, agreement)


if __name__ == "__main__":
    # Loading a tokenizer needs no torch, whose import takes longer than everything else together.
    os.environ.update(USE_TORCH="0", TRANSFORMERS_NO_ADVISORY_WARNINGS="1")
    run_command(main)

"""Command-line flags that the two prepare scripts share. Nothing heavy is imported here."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path

from colossal_llama.dataset.storage import is_url
from colossal_llama.tokenizer.output_directory import objection_to_output
from colossal_llama.utils.arguments import (
    ArgumentParser,
    add_max_length,
    add_seed,
    directory_list,
    existing_directory,
    number,
    positive_int,
)


def add_preparation_flags(parser: ArgumentParser) -> None:
    paths = parser.add_argument_group("input and output")
    paths.add_argument(
        "--data_input_dirs",
        type=_input_list,
        required=True,
        help="comma list of directories with *.jsonl, *.jsonl.gz or *.jsonl.zst files, or URLs of such: "
        "s3://, gs://, hf://, https://, …",
    )
    parser.add_flag(
        "--recursive",
        default=False,
        help="read the directories below --data_input_dirs too; off: one that holds input is an error",
        group=paths,
    )
    paths.add_argument(
        "--tokenizer_dir", type=existing_directory, required=True, help="tokenizer in Hugging Face format"
    )
    paths.add_argument(
        "--data_output_dirs",
        type=Path,
        default=Path("data_output_dirs"),
        help="directory for cache/, jsonl/, arrow/ and stats.json",
    )
    paths.add_argument(
        "--data_arrow_output_dir",
        type=Path,
        help="directory for the Arrow parts (default: <data_output_dirs>/arrow)",
    )
    parser.add_flag("--overwrite", default=False, help="replace output that is there", group=paths)
    data = parser.add_argument_group("data")
    add_max_length(parser, data)
    data.add_argument(
        "--num_spliced_dataset_bins",
        type=number(int, 1, 99999),
        default=10,
        help="number of bins (part directories), 1 to 99999",
    )
    add_seed(parser, data)
    data.add_argument(
        "--on_bad_record",
        choices=("error", "skip"),
        default="error",
        help="malformed records: list them and stop, or count them and go on",
    )
    work = parser.add_argument_group("workers")
    work.add_argument(
        "--num_workers",
        type=positive_int,
        help="processes that encode and pack, with Ray tasks at a time; the output does not depend on it "
        "(default: all cores)",
    )
    work.add_argument(
        "--ray_address",
        type=_ray_address,
        default="none",
        help="where the work runs: none (this machine), local, auto or HOST:PORT of a Ray cluster",
    )
    parser.add_check(_check_directories)


def _input_list(text: str) -> list[Path | str]:
    """A comma list of existing directories, and of URLs, which nothing is asked for yet."""
    names = [name.strip().removeprefix("file://") for name in text.split(",")]
    local = ",".join(name for name in names if name and not is_url(name))
    directories = iter(directory_list(local)) if local or not any(names) else iter(())
    return [name if is_url(name) else next(directories) for name in names if name]


def _ray_address(text: str) -> str:
    if text in ("none", "local", "auto") or re.fullmatch(r"[^\s:]+:\d+", text):
        return text
    raise ValueError("choose from none, local, auto, HOST:PORT")


def _check_directories(args: Namespace) -> list[str]:
    """Output must be writable; in an input directory it would be read as input by the next run."""
    problems = [
        f"{flag} {directory}: {objection}"
        for flag, directory in (
            ("--data_output_dirs", args.data_output_dirs),
            ("--data_arrow_output_dir", args.data_arrow_output_dir),
        )
        if directory is not None and (objection := objection_to_output(directory))
    ]
    if problems:
        return problems
    if args.data_arrow_output_dir is None:
        args.data_arrow_output_dir = args.data_output_dirs / "arrow"
    written = {
        path.resolve()
        for path in (args.data_output_dirs, args.data_output_dirs / "jsonl", args.data_arrow_output_dir)
    }
    if args.recursive:  # a next run would read what lies anywhere below
        written |= {parent for path in written for parent in path.parents}
    return [
        f"--data_output_dirs {args.data_output_dirs}: would write into the input directory {directory}"
        for directory in args.data_input_dirs
        if isinstance(directory, Path) and directory.resolve() in written
    ]

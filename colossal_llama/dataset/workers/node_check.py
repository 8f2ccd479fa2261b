"""What a machine must have before it may prepare data for another: the same software, and the same files.

The check travels as names and sizes, and is answered with a list of what is wrong.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from colossal_llama.corpus.storage import InputFile, stat_file
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.files import wait_for_file

# What the bytes of the output depend on.
PACKAGES = ("tokenizers", "numpy", "orjson", "pyarrow", "transformers", "jinja2")
OWN = "colossal_llama"
SOURCES = ("corpus", "conversation", "dataset", "tokenizer", "utils")
MAX_SAMPLES = 50
SECONDS_TO_SEE_A_FILE = 60.0
TOKEN_PREFIX = ".visible-"


@dataclass(frozen=True)
class NodeCheck:
    """Made by `make_node_check` on the machine that the command runs on.

    Args:
        key: stands for this check.
        token_files: files that this machine has just written, one in each output directory; absolute paths.
        samples: some of the input files.
        software: versions by name; see `describe_software`.
    """

    key: str
    token_files: tuple[str, ...]
    samples: tuple[InputFile, ...]
    software: dict[str, str] = field(default_factory=dict)


@contextlib.contextmanager
def make_node_check(
    output_dirs: Sequence[Path], files: Sequence[InputFile], packages: Sequence[str] = ()
) -> Iterator[NodeCheck]:
    """A check against these directories (made where they are missing) and files, valid inside the block."""
    remove_token_files(output_dirs)
    key = secrets.token_hex(8)
    token_files = []
    try:
        for directory in sorted({path.absolute() for path in output_dirs}):
            directory.mkdir(parents=True, exist_ok=True)
            token_files.append(directory / f"{TOKEN_PREFIX}{key}")
            token_files[-1].write_text(key, encoding="utf-8")
        step = max(1, -(-len(files) // MAX_SAMPLES))
        yield NodeCheck(key, tuple(map(str, token_files)), tuple(files[::step]), describe_software(packages))
    finally:
        for path in token_files:
            path.unlink(missing_ok=True)


def remove_token_files(output_dirs: Sequence[Path]) -> None:
    """Removes what the check of a run that was killed left behind."""
    for directory in output_dirs:
        for path in directory.glob(f"{TOKEN_PREFIX}*"):
            path.unlink(missing_ok=True)


def describe_software(packages: Iterable[str] = ()) -> dict[str, str]:
    """Versions of everything that decides the output's bytes, this package's own sources among it.

    Args:
        packages: others that the run needs.
    """
    found = {}
    for package in (*PACKAGES, *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    digest = hashlib.sha256()
    package_dir = Path(__file__).resolve().parents[2]
    for path in sorted(path for name in SOURCES for path in (package_dir / name).rglob("*.py")):
        digest.update(path.read_bytes())
    return {**found, OWN: digest.hexdigest()[:12]}


def find_node_problems(check: NodeCheck) -> list[str]:
    """What keeps this machine from taking part, each as a sentence without the machine's name."""
    problems = []
    found = describe_software(name for name in check.software if name not in (*PACKAGES, OWN))
    for name, wanted in check.software.items():
        if (ours := found[name]) != wanted:
            problems.append(f"has {name} {ours}, not {wanted}; install the same versions on every node")
    directory_problems = [_find_directory_problem(Path(path), check.key) for path in check.token_files]
    problems += [problem for problem in directory_problems if problem]
    for sample in check.samples:
        try:
            found = stat_file(sample.path)
        except UserError as error:
            problems.append(f"does not see the input: {error}")
            break
        if found != sample:
            problems.append(f"sees another {sample.path}, of another size or time; use shared storage")
            break
    return problems


def _find_directory_problem(token_file: Path, key: str) -> str | None:
    directory = token_file.parent
    try:
        if wait_for_file(token_file, SECONDS_TO_SEE_A_FILE if directory.is_dir() else 0).read_text() != key:
            return f"sees another {directory}; it has to be on storage that all nodes share"
        trial = directory / f"{token_file.name}-{secrets.token_hex(8)}"
        try:
            trial.write_text(os.uname().nodename, encoding="utf-8")
        finally:
            trial.unlink(missing_ok=True)
    except FileNotFoundError:
        return f"does not see {directory}; it has to be on storage that all nodes share"
    except OSError as error:
        return f"can't write to {directory}: {error.strerror}"
    return None

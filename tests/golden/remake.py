"""Rewrites `outputs.json`: SHA-256 of files of integers and text that the scripts write from small inputs.

    python tests/golden/remake.py

Run it when an output is meant to change, read what `git diff` then shows, and give the reason in the commit:
users who repeat a preparation get these other files.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.extend(str(Path(__file__).resolve().parents[1] / part) for part in ("", "distributed"))

from golden.commands import (
    ROOT,
    Case,
    make_working_directory,
    order_cases,
    preparation_cases,
    script_environment,
)

OUTPUTS = ROOT / "tests" / "golden" / "outputs.json"
# Libraries whose versions may show in the files of which `depends_on_versions` is true.
LIBRARIES = ("datasets", "pyarrow", "sentencepiece", "tokenizers", "transformers")
ROWS = " (rows)"


def versions() -> dict[str, str]:
    return {library: importlib.metadata.version(library) for library in LIBRARIES}


def depends_on_versions(name: str) -> bool:
    """Written by a library in a format of its own, or learned by one. The rows of Arrow files do not."""
    return name.endswith((".arrow", "/dataset_info.json", "/state.json")) or name.startswith(
        "tokenizers/learned/"
    )


def promised_files(directory: Path) -> list[Path]:
    """The files that equal inputs give equally: not the cache, pictures and locks."""
    return sorted(
        path
        for path in directory.rglob("*")
        if path.is_file()
        and "cache" not in path.relative_to(directory).parts
        and path.name != ".lock"
        and path.suffix != ".png"
    )


def hash_rows(path: Path) -> str:
    """Of the columns by value, whatever the file's layout."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        table = pyarrow.ipc.open_stream(file).read_all()
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    return hashlib.sha256(json.dumps(columns).encode()).hexdigest()


def hash_files(directory: Path, root: Path) -> dict[str, str]:
    """Path from `root` -> SHA-256; the rows of Arrow files have an entry of their own."""
    hashes = {}
    for path in promised_files(directory):
        name = path.relative_to(root).as_posix()
        hashes[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        if path.suffix == ".arrow":
            hashes[name + ROWS] = hash_rows(path)
    return hashes


def tokens_of_steps(case: Case, root: Path) -> list[int]:
    """Tokens that each step of a run used."""
    metrics = root / case.name / "logs" / "metrics.jsonl"
    totals = [json.loads(line)["tokens"] for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [after - before for before, after in zip([0, *totals], totals, strict=False)]


def run_case(case: Case, directory: Path) -> None:
    for command in case.commands:
        finished = command.run(directory, script_environment())
        if finished.returncode:
            raise RuntimeError(f"{command}: exit code {finished.returncode}\n{finished.stderr[-3000:]}")


def make_outputs(directory: Path) -> dict[str, object]:
    """Runs all commands in an empty directory; returns what `outputs.json` holds."""
    make_working_directory(directory)
    files = {
        name: value
        for name, value in hash_files(directory / "inputs", directory).items()
        if "/small-model/" not in name
    }
    left, done = [*preparation_cases(), *order_cases()], set()
    with ThreadPoolExecutor(2) as pool:
        while left:
            ready = [case for case in left if done.issuperset(case.needs)]
            list(pool.map(lambda case: run_case(case, directory), ready))
            done.update(case.name for case in ready)
            left = [case for case in left if case not in ready]
    for case in preparation_cases():
        files.update(hash_files(directory / case.name, directory))
    return {
        "versions": versions(),
        "files": files,
        "tokens_of_steps": {case.name: tokens_of_steps(case, directory) for case in order_cases()},
    }


def dump(outputs: dict) -> str:
    """JSON with an entry a line; lists of numbers stay on theirs."""
    orders = {name: json.dumps(steps) for name, steps in outputs["tokens_of_steps"].items()}
    text = json.dumps({**outputs, "tokens_of_steps": orders}, indent=1, ensure_ascii=False)
    for steps in orders.values():
        text = text.replace(json.dumps(steps), steps)
    return text + "\n"


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        OUTPUTS.write_text(dump(make_outputs(Path(name))), encoding="utf-8")


if __name__ == "__main__":
    main()

"""The files and directories of a preparation, and which run they belong to."""

from __future__ import annotations

import contextlib
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colossal_llama.dataset.settings import PathSettings
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.files import read_json, remove_path, write_json

PART_NAME = re.compile(r"part-\d{5}(\.jsonl)?")
ASIDE_NAME = re.compile(r"\.part-\d{5}(\.jsonl)?(\.[0-9a-f]{16})?\.tmp")


@dataclass(frozen=True)
class OutputPaths:
    """Everything that a preparation writes; `stats_path` comes last: where it is, the output is complete."""

    directory: Path
    arrow_dir: Path

    @classmethod
    def of_settings(cls, paths: PathSettings) -> OutputPaths:
        return cls(paths.data_output_dirs, paths.arrow_dir)

    @property
    def cache_dir(self) -> Path:
        return self.directory / "cache"

    @property
    def jsonl_dir(self) -> Path:
        return self.directory / "jsonl"

    @property
    def held_out_dir(self) -> Path:
        """Records that are held out; `held_out_arrow_dir` has their rows."""
        return self.directory / "held_out"

    @property
    def held_out_arrow_dir(self) -> Path:
        return self.held_out_dir / "arrow"

    @property
    def part_dirs(self) -> list[Path]:
        """Where parts are written."""
        return [self.arrow_dir, self.jsonl_dir, self.held_out_arrow_dir, self.held_out_dir]

    @property
    def stats_path(self) -> Path:
        return self.directory / "stats.json"

    @property
    def picture_path(self) -> Path:
        return self.directory / "stats.png"

    @property
    def run_file(self) -> Path:
        """Says which run the output belongs to."""
        return self.cache_dir / "run.json"


def claim_output(output: OutputPaths, run_key: str, overwrite: bool) -> str:
    """Refuses output that is there, except parts of this very run; with `--overwrite`, removes it.

    Only names that preparation itself gives are ever removed. Returns an id of this run: what is left of
    earlier ones on other machines may not write any more.
    """
    run: Any = {}
    with contextlib.suppress(UserError):  # missing or damaged: of another run
        run = read_json(output.run_file)
    if not isinstance(run, dict) or (run and "run_key" not in run):
        raise UserError(
            f"{output.run_file}: is there already, and no preparation wrote it; use another directory"
        )
    is_same_run = run.get("run_key") == run_key
    is_complete = output.stats_path.exists()
    parts = [
        path
        for directory in output.part_dirs
        if directory.is_dir()
        for path in directory.iterdir()
        if PART_NAME.fullmatch(path.name)
    ]
    if is_complete and not overwrite:
        raise UserError(
            f"--data_output_dirs {output.directory}: holds a prepared data set; "
            "use another directory, or --overwrite"
        )
    if parts and not is_same_run and not overwrite:
        raise UserError(
            f"{parts[0]}: is there already, from another run that did not finish or had other settings; "
            "use another directory, or --overwrite"
        )
    picture = output.picture_path
    if picture.exists() and not (is_complete or run or overwrite):
        raise UserError(
            f"{picture}: is there already, without a data set; use another directory, or --overwrite"
        )
    if is_complete or not is_same_run:
        output.stats_path.unlink(missing_ok=True)  # first: from here on the output is not complete
        picture.unlink(missing_ok=True)
        for path in parts:
            remove_path(path)
        for name in ("bins", "held_out"):
            for path in (output.cache_dir / name).glob("part-*.json"):
                path.unlink()
    run_id = secrets.token_hex(8)
    write_json(output.run_file, {"run_key": run_key, "run_id": run_id})
    remove_unfinished_parts(output)
    return run_id


def remove_unfinished_parts(output: OutputPaths) -> None:
    """Removes what killed workers left half-written."""
    for directory in output.part_dirs:
        for path in directory.iterdir() if directory.is_dir() else ():
            if ASIDE_NAME.fullmatch(path.name):
                remove_path(path)

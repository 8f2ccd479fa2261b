"""Scores on disk while they come about: a comparison that was killed continues, and a stage that is added to
one later needs the others no more.

One file for each model and everything that its scores depend on, a line for each batch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from colossal_llama.evaluation.scoring import WindowScore
from colossal_llama.utils.files import with_filename_in_errors

SCORES_DIRECTORY = "scores"


def score_file(directory: Path, model: str, depends_on: Mapping[str, Any]) -> Path:
    """The file of a model's scores below the output directory.

    Args:
        model: its path, whose end is in the name of the file, for people.
        depends_on: what the scores depend on; other values, another file.
    """
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]
    readable = "-".join(re.sub(r"[^\w.-]+", "-", part) for part in Path(model).parts[-2:]).strip("-")
    return directory / SCORES_DIRECTORY / f"{readable}-{digest}.jsonl"


class ScoreFile:
    """The scores of one model by the number of the window; what is added is on disk at once.

    Attributes:
        scores: those that are known.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.scores: dict[int, WindowScore] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        if lines and not lines[-1].endswith(b"\n"):  # killed while it wrote
            lines.pop()
            path.write_bytes(b"".join(lines))
        for line in lines:
            for number, loss, new_rows_loss in json.loads(line):
                self.scores[number] = WindowScore(loss, new_rows_loss)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  (closed by __exit__)

    def add(self, numbers: Sequence[int], scores: Sequence[WindowScore]) -> None:
        """Adds the scores of a batch."""
        pairs = list(zip(numbers, scores, strict=True))
        line = json.dumps([[number, score.loss, score.new_rows_loss] for number, score in pairs])
        with with_filename_in_errors(self.path):
            self._file.write(line + "\n")
            self._file.flush()
        self.scores.update(pairs)

    def __enter__(self) -> ScoreFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

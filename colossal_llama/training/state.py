"""Where a run stands: everything of the loop that a resumed run has to know."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class TrainState:
    """Attributes:
    step: optimizer steps done since the start of the run's training.
    epoch: the epoch that the next step belongs to, from 0.
    position: rows of that epoch already used, over all ranks.
    tokens: seen so far by all ranks, padding not counted.
    """

    step: int = 0
    epoch: int = 0
    position: int = 0
    tokens: int = 0

    def advance(self, rows: int, tokens: int, rows_per_epoch: int) -> bool:
        """Accounts for one step; returns whether it was the last of its epoch (a shorter tail is left
        out).
        """
        self.step += 1
        self.position += rows
        self.tokens += tokens
        if self.position + rows <= rows_per_epoch:
            return False
        self.epoch += 1
        self.position = 0
        return True

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

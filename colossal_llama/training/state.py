"""Where a run is: everything of the loop that a resumed run has to know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class TrainState:
    """Attributes:
    step: optimizer steps done since the start of the run's training.
    epoch: the epoch that the next step belongs to, from 0.
    position: rows of that epoch already used, over all ranks.
    tokens: seen so far by all ranks, padding not counted.
    schedule_offset: what to add to `step` to get the step of the schedule; not zero once the number of rows
        of a step has changed.
    evaluation_due: an evaluation after `step` was cut short, or not begun, when the run was stopped.
    set_tokens: `tokens` by set, where there are several.
    """

    step: int = 0
    epoch: int = 0
    position: int = 0
    tokens: int = 0
    schedule_offset: int = 0
    evaluation_due: bool = False
    set_tokens: list[int] = field(default_factory=list)

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

    def change_rows_per_step(
        self, rows_per_step: int, rows_per_epoch: Callable[[int], int], num_epochs: int, total_steps: int
    ) -> None:
        """Continues at the same row with steps of another size.

        The schedule ends, as it would have, with the last row: steps done count for as much of it as their
        rows do.

        Args:
            rows_per_epoch: rows of an epoch, by its number.
            total_steps: of a whole run with steps of this size.
        """
        if self.epoch < num_epochs and self.position + rows_per_step > rows_per_epoch(self.epoch):
            self.epoch, self.position = self.epoch + 1, 0
        used, remaining = self.position, 0
        for epoch in range(self.epoch, num_epochs):
            remaining += (rows_per_epoch(epoch) - used) // rows_per_step
            used = 0
        self.schedule_offset = total_steps - remaining - self.step

    def to_json(self) -> dict[str, Any]:
        value = asdict(self)
        if not self.set_tokens:
            del value["set_tokens"]
        return value

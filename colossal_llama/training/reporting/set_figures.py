"""Loss, tokens, share and passes of each set of a run's data.

They ride in the two collectives that a step has anyway: counts with the counts, losses with the loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from colossal_llama.dataset.labels import NO_LOSS_LABEL
from colossal_llama.training.data.rows import RowDataset
from colossal_llama.training.reporting.figures import RankFigures
from colossal_llama.training.state import TrainState
from colossal_llama.utils.console import log

LOSS, LOSS_TOKENS, TOKENS, SHARE, PASSES = (
    f"{name}/" for name in ("loss", "loss_tokens", "tokens", "share", "passes")
)


class SetFigures:
    """The figures of one step after the other.

    Args:
        row_losses: where the model leaves the summed loss of each row of a pass, on the device; emptied at
            each step. A pipeline stage that is not the last one leaves nothing.
    """

    def __init__(self, dataset: RowDataset, row_losses: list[torch.Tensor], device: torch.device) -> None:
        self.dataset, self.sets = dataset, dataset.sets
        self.row_losses, self.device = row_losses, device
        self._is_of_set = torch.zeros(0)

    def begin(self, state: TrainState) -> None:
        """The tokens of each set so far are as the checkpoint says; one of an earlier version does not."""
        if state.step == 0:
            state.set_tokens = [0] * len(self.sets)
        elif len(state.set_tokens) != len(self.sets):
            state.set_tokens = []
            log("The checkpoint does not say how many tokens of each set were seen: they are not counted")

    def record_counts(self, figures: RankFigures, collated: Sequence[Mapping[str, Any]]) -> None:
        """Counts this rank's tokens, and brings to the device which rows are of which set."""
        rows = np.concatenate([batch["row_index"].numpy() for batch in collated])
        tokens = np.concatenate([(batch["document_index"] >= 0).sum(dim=1).numpy() for batch in collated])
        labels = np.concatenate([(batch["labels"] != NO_LOSS_LABEL).sum(dim=1).numpy() for batch in collated])
        is_of_set = np.arange(len(self.sets))[:, None] == self.dataset.sets_of(rows)
        for each, is_own in zip(self.sets, is_of_set, strict=True):
            figures.record(TOKENS + each.name, int(tokens[is_own].sum()))
            figures.record(LOSS_TOKENS + each.name, int(labels[is_own].sum()))
        self.row_losses.clear()
        # Now, while the device has nothing to do: a copy after the forward pass would wait for it.
        self._is_of_set = torch.from_numpy(is_of_set).to(self.device, non_blocking=True)

    def record_losses(self, figures: RankFigures) -> None:
        """Sums this rank's losses on the device."""
        if self.row_losses:
            losses = torch.cat(self.row_losses).double()
            sums = torch.where(self._is_of_set, losses, 0.0).sum(dim=1)
        else:
            sums = torch.zeros(len(self.sets), dtype=torch.float64, device=self.device)
        for each, loss in zip(self.sets, sums, strict=True):
            figures.record(LOSS + each.name, loss)

    def end_step(
        self, counts: Mapping[str, float], losses: Mapping[str, float], state: TrainState
    ) -> dict[str, Any]:
        """What the metrics say of each set after a step; its tokens are added to the state.

        Args:
            counts, losses: the recorded figures of all ranks.
        """
        record: dict[str, Any] = {}
        for each in self.sets:
            if num_labels := int(counts[LOSS_TOKENS + each.name]):
                record[LOSS + each.name] = losses[LOSS + each.name] / num_labels
                record[LOSS_TOKENS + each.name] = num_labels
        if not state.set_tokens:
            return record
        tokens = [
            before + int(counts[TOKENS + each.name])
            for before, each in zip(state.set_tokens, self.sets, strict=True)
        ]
        state.set_tokens = tokens  # a new list: copies of the state keep theirs
        for each, number in zip(self.sets, tokens, strict=True):
            record[TOKENS + each.name] = number
            record[SHARE + each.name] = number / max(1, sum(tokens))
            record[PASSES + each.name] = number / max(1, each.num_tokens)
        return record

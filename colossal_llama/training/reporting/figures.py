"""Figures of a step that every rank has a share of, put together by one collective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

Reduce = Literal["sum", "any", "all"]


class RankFigures:
    """Figures by name, recorded on this rank and then reduced over all ranks at once.

        figures = RankFigures()
        figures.record("tokens", 812)
        figures.record("stop", stop.requested, "any")
        total = figures.reduce(plugin.sum_counts, plugin.layout.dp_size)
        total["tokens"], total["stop"]

    Every rank records the same names in the same order.
    """

    def __init__(self) -> None:
        self._values: dict[str, float | torch.Tensor] = {}
        self._reduce: dict[str, Reduce] = {}

    def record(self, name: str, value: float | torch.Tensor, reduce: Reduce = "sum") -> None:
        """Sets a figure.

        Args:
            value: a number, or a scalar tensor on the device.
            reduce: over the ranks: their sum, or whether it is true of any or of all of them.
        """
        assert name not in self._values, name
        self._values[name], self._reduce[name] = value, reduce

    def reduce(
        self, sum_over_ranks: Callable[[torch.Tensor], torch.Tensor], num_ranks: int
    ) -> dict[str, float]:
        """The figures of all ranks together; "any" and "all" come back as 0.0 or 1.0.

        Args:
            sum_over_ranks: the collective, float64 [figures] -> float64 [figures].
            num_ranks: ranks that it counts.
        """
        tensors = [torch.as_tensor(value, dtype=torch.float64) for value in self._values.values()]
        devices = {tensor.device for tensor in tensors if tensor.device.type != "cpu"}
        device = devices.pop() if devices else torch.device("cpu")
        totals = sum_over_ranks(torch.stack([tensor.to(device) for tensor in tensors])).tolist()
        finish = {
            "sum": lambda total: total,
            "any": lambda total: float(total > 0),
            # The sum of ones may have been divided by the number of replicas of each rank.
            "all": lambda total: float(round(total * 1e6) >= round(num_ranks * 1e6)),
        }
        return {
            name: finish[self._reduce[name]](total) for name, total in zip(self._values, totals, strict=True)
        }

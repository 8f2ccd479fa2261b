"""Figures of several ranks, put together by one collective. The ranks are simulated."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from colossal_llama.training.reporting.figures import RankFigures


class Ranks:
    """`replicas` of each of the data-parallel ranks, whose collective is that of the plugins: the sum over
    all, by the number of replicas.
    """

    def __init__(self, num_ranks: int, replicas: int = 1) -> None:
        self.num_ranks, self.replicas = num_ranks, replicas
        self.figures = [RankFigures() for _ in range(num_ranks * replicas)]
        self.num_collectives = 0

    def record(self, name: str, values: list, *reduce: str) -> None:
        for figures, value in zip(self.figures, values, strict=True):
            figures.record(name, value, *reduce)

    def reduce(self) -> dict[str, float]:
        """What every rank has got."""
        sent: list[torch.Tensor] = []

        def send(values: torch.Tensor) -> torch.Tensor:
            assert values.dtype == torch.float64
            sent.append(values)
            return values

        for figures in self.figures:
            figures.reduce(send, self.num_ranks)
        total = torch.stack(sent).sum(0) / self.replicas
        self.num_collectives = len(sent) // len(self.figures)
        results = [figures.reduce(lambda _: total, self.num_ranks) for figures in self.figures]
        assert all(result == results[0] for result in results)
        return results[0]


def test_many_figures_take_one_collective() -> None:
    ranks = Ranks(3)
    ranks.record("tokens", [812, 0, 5])
    ranks.record("loss", [torch.tensor(0.5), torch.tensor(0.25), torch.tensor(2.0)])
    ranks.record("stop", [False, True, False], "any")
    ranks.record("written", [True, True, False], "all")
    assert ranks.reduce() == {"tokens": 817.0, "loss": 2.75, "stop": 1.0, "written": 0.0}
    assert ranks.num_collectives == 1


@given(st.integers(1, 64), st.integers(1, 64), st.data())
def test_any_and_all_are_true_of_what_the_ranks_say(
    num_ranks: int, replicas: int, data: st.DataObject
) -> None:
    """Also where one replica of a rank alone differs."""
    size = num_ranks * replicas
    odd = data.draw(st.integers(0, size - 1))
    ranks = Ranks(num_ranks, replicas)
    ranks.record("none", [False] * size, "any")
    ranks.record("one", [rank == odd for rank in range(size)], "any")
    ranks.record("but one", [rank != odd for rank in range(size)], "all")
    ranks.record("every", [True] * size, "all")
    assert ranks.reduce() == {"none": 0.0, "one": 1.0, "but one": 0.0, "every": 1.0}


@given(st.lists(st.integers(0, 2**50), min_size=1, max_size=8))
def test_counts_are_summed_exactly(counts: list[int]) -> None:
    ranks = Ranks(len(counts))
    ranks.record("tokens", counts)
    assert ranks.reduce()["tokens"] == sum(counts)


def test_a_figure_is_recorded_once() -> None:
    figures = RankFigures()
    figures.record("tokens", 1)
    with pytest.raises(AssertionError, match="tokens"):
        figures.record("tokens", 2)

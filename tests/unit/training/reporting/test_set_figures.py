"""Figures of each set of the data: what ranks record, and what a step's metrics say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from colossal_llama.training.data.sets import RowSet
from colossal_llama.training.reporting.figures import RankFigures
from colossal_llama.training.reporting.set_figures import SetFigures
from colossal_llama.training.state import TrainState

SETS = [RowSet("zh/web", 4, 100, [[(0, 4)]]), RowSet("en", 6, 20, [[(4, 10)]])]


class Source:
    """Rows 0 to 3 are of the first set, all others of the second."""

    sets = SETS

    def sets_of(self, rows: np.ndarray) -> np.ndarray:
        return (rows >= 4).astype(np.int64)


def batch(rows: list[int], tokens: list[int], labels: list[int]) -> dict[str, torch.Tensor]:
    width = torch.arange(10)
    return {
        "row_index": torch.tensor(rows),
        "document_index": torch.where(width < torch.tensor(tokens)[:, None], 0, -1),
        "labels": torch.where(width < torch.tensor(labels)[:, None], 7, -100),
    }


class Ranks:
    """Sums what the ranks bring; counts the collectives."""

    def __init__(self) -> None:
        self.own: list[list[torch.Tensor]] = []
        self.num_calls = 0

    def add(self, figures: RankFigures) -> None:
        def keep(values: torch.Tensor) -> torch.Tensor:
            self.own.append(values)
            return values

        figures.reduce(keep, 1)

    def sum(self, figures: RankFigures) -> dict[str, float]:
        self.num_calls += 1
        return figures.reduce(lambda values: values + sum(self.own), 1)


def step(
    row_losses: list[torch.Tensor], batches: list[dict], losses: list[list[float]], **other: list
) -> dict:
    """One step of this rank; returns the reduced figures of counts and losses."""
    figures = SetFigures(Source(), row_losses, torch.device("cpu"))
    counts, sums = RankFigures(), RankFigures()
    figures.record_counts(counts, batches)
    row_losses.extend(torch.tensor(each) for each in losses)
    figures.record_losses(sums)
    return {"figures": figures, "counts": counts, "losses": sums}


def test_losses_are_means_over_the_tokens_of_a_set_on_all_ranks() -> None:
    first = step(
        [torch.ones(3)],
        [batch([0, 5], [8, 4], [6, 3]), batch([1, 6], [2, 2], [2, 1])],
        [[12.0, 3.0], [1.0, 5.0]],
    )
    second = step(
        [], [batch([7, 8], [5, 5], [4, 4]), batch([9, 4], [1, 1], [0, 0])], [[4.0, 8.0], [0.0, 0.0]]
    )
    reduced = {}
    for name in ("counts", "losses"):
        ranks = Ranks()
        ranks.add(second[name])
        reduced[name] = ranks.sum(first[name])
    state = TrainState(step=3, set_tokens=[90, 10])
    before = state.set_tokens
    record = first["figures"].end_step(reduced["counts"], reduced["losses"], state)
    assert record == {
        "loss/zh/web": pytest.approx(13 / 8),
        "loss_tokens/zh/web": 8,
        "loss/en": pytest.approx(20 / 12),
        "loss_tokens/en": 12,
        "tokens/zh/web": 100,
        "share/zh/web": pytest.approx(100 / 128),
        "passes/zh/web": 1.0,
        "tokens/en": 28,
        "share/en": pytest.approx(28 / 128),
        "passes/en": 1.4,
    }
    assert (state.set_tokens, before) == ([100, 28], [90, 10])


def test_a_set_without_loss_in_a_step_has_none_and_earlier_stages_of_a_pipeline_add_nothing() -> None:
    made = step([], [batch([0, 1], [3, 3], [2, 0])], [])
    counts = made["counts"].reduce(lambda values: values, 1)
    losses = made["losses"].reduce(lambda values: values, 1)
    assert losses == {"loss/zh/web": 0.0, "loss/en": 0.0}
    record = made["figures"].end_step(counts, losses, TrainState(set_tokens=[0, 0]))
    assert "loss/en" not in record
    assert record["tokens/en"] == 0


def test_tokens_begin_at_nothing_and_are_not_guessed_where_a_checkpoint_does_not_have_them(capsys) -> None:
    figures = SetFigures(Source(), [], torch.device("cpu"))
    state = TrainState()
    figures.begin(state)
    assert state.set_tokens == [0, 0]
    for known in ([], [5]):
        state = TrainState(step=7, set_tokens=known)
        figures.begin(state)
        assert state.set_tokens == []
        made = step([], [batch([0, 5], [3, 3], [2, 1])], [[1.0, 1.0]])
        counts, losses = (made[name].reduce(lambda values: values, 1) for name in ("counts", "losses"))
        assert figures.end_step(counts, losses, state) == {
            "loss/zh/web": 0.5,
            "loss_tokens/zh/web": 2,
            "loss/en": 1.0,
            "loss_tokens/en": 1,
        }
    state = TrainState(step=7, set_tokens=[3, 4])
    figures.begin(state)
    assert state.set_tokens == [3, 4]


def test_the_tokens_of_sets_are_saved_only_where_there_are_several() -> None:
    assert "set_tokens" not in TrainState(step=3).to_json()
    assert TrainState(step=3, set_tokens=[1, 2]).to_json()["set_tokens"] == [1, 2]


class Operations(TorchDispatchMode):
    """Names of the operations that torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_losses_are_not_read_before_the_collective_that_there_is_anyway() -> None:
    """Reading a value, or finding where a mask is true, would wait for the device."""
    row_losses: list[torch.Tensor] = []
    made = SetFigures(Source(), row_losses, torch.device("cpu"))
    made.record_counts(RankFigures(), [batch([0, 5], [8, 4], [6, 3]), batch([1, 6], [2, 2], [2, 1])])
    row_losses += [torch.ones(2), torch.ones(2)]
    with Operations() as operations:
        made.record_losses(RankFigures())
    assert operations.names
    assert not {"_local_scalar_dense", "nonzero", "index", "item", "masked_select"} & set(operations.names)

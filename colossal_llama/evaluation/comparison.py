"""From losses of documents to the figures of a comparison: bits per byte, changes, their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from colossal_llama.evaluation.held_out_text import Document

NUM_RESAMPLES = 1000
CONFIDENCE = 0.95
SEED = 42
# Numbers drawn at once while resampling.
DRAWN_AT_ONCE = 2**24


@dataclass(frozen=True)
class ModelScores:
    """What one model makes of all documents.

    Attributes:
        name: of the model, in tables.
        losses: in nats, float64 [documents].
        new_rows_losses: what of them its new rows cause; None where it is the base, or no extension of it.
        num_tokens: of the whole text, without BOS and EOS, int64 [documents].
        num_new_rows: how many the base does not have.
        num_used_rows: how many of those occur in the text.
    """

    name: str
    losses: np.ndarray
    new_rows_losses: np.ndarray | None
    num_tokens: np.ndarray
    num_new_rows: int = 0
    num_used_rows: int = 0


@dataclass(frozen=True)
class Result:
    """The figures of a model on a set, or on one category of it (None: all of it).

    Attributes:
        change: of bits per byte against the base; below zero is better.
        interval: of the change, 95 %; None with a single document.
    """

    model: str
    set: str
    category: str | None
    documents: int
    bytes: int
    bits_per_byte: float
    change: float
    interval: tuple[float, float] | None
    tokens_per_character: float


@dataclass(frozen=True)
class NewRowsCost:
    """What the new rows of an extended model take from tokens that the base has too, in bits per byte."""

    model: str
    set: str
    category: str | None
    cost_of_new_rows: float


@dataclass(frozen=True)
class Group:
    """A set, or one category of it: the numbers of its documents."""

    set: str
    category: str | None
    documents: np.ndarray


def group_documents(documents: Sequence[Document]) -> list[Group]:
    """Each set in order of appearance, then its categories by name."""
    by_set: dict[str, list[int]] = {}
    by_category: dict[str, dict[str, list[int]]] = {}
    for number, document in enumerate(documents):
        by_set.setdefault(document.set, []).append(number)
        by_category.setdefault(document.set, {}).setdefault(document.category, []).append(number)
    groups = []
    for name, numbers in by_set.items():
        groups.append(Group(name, None, np.array(numbers)))
        groups += [
            Group(name, category, np.array(found)) for category, found in sorted(by_category[name].items())
        ]
    return groups


def compare(documents: Sequence[Document], models: Sequence[ModelScores]) -> list[Result]:
    """The results of all models on all groups; the first model is the base."""
    num_bytes = np.array([document.num_bytes for document in documents], dtype=np.float64)
    num_characters = np.array([len(document.text) for document in documents], dtype=np.int64)
    base = models[0]
    results = []
    for group in group_documents(documents):
        numbers = group.documents
        size = num_bytes[numbers].sum()
        differences = np.stack([model.losses[numbers] - base.losses[numbers] for model in models])
        intervals = bootstrap_intervals(differences, num_bytes[numbers])
        for model, difference, interval in zip(models, differences, intervals, strict=True):
            results.append(
                Result(
                    model.name,
                    group.set,
                    group.category,
                    len(numbers),
                    int(size),
                    bits_per_byte(model.losses[numbers].sum(), size),
                    bits_per_byte(difference.sum(), size),
                    interval,
                    float(model.num_tokens[numbers].sum() / num_characters[numbers].sum()),
                )
            )
    return results


def costs_of_new_rows(documents: Sequence[Document], models: Sequence[ModelScores]) -> list[NewRowsCost]:
    """Of the models that are extensions of the base, on all groups."""
    num_bytes = np.array([document.num_bytes for document in documents], dtype=np.float64)
    return [
        NewRowsCost(
            model.name,
            group.set,
            group.category,
            bits_per_byte(model.new_rows_losses[group.documents].sum(), num_bytes[group.documents].sum()),
        )
        for group in group_documents(documents)
        for model in models
        if model.new_rows_losses is not None
    ]


def bits_per_byte(loss: float, num_bytes: float) -> float:
    """Of a summed loss in nats."""
    return float(loss / (math.log(2) * num_bytes))


def bootstrap_intervals(differences: np.ndarray, num_bytes: np.ndarray) -> list[tuple[float, float] | None]:
    """Of the change of bits per byte, by resampling documents; the same samples for all models.

    Args:
        differences: of losses against the base, in nats, [models, documents].
        num_bytes: [documents].
    """
    num_models, num_documents = differences.shape
    if num_documents < 2:
        return [None] * num_models
    generator = np.random.default_rng(SEED)
    shares = np.full(num_documents, 1 / num_documents)
    changes = np.empty((num_models, NUM_RESAMPLES))
    step = max(1, DRAWN_AT_ONCE // num_documents)
    for start in range(0, NUM_RESAMPLES, step):
        count = min(step, NUM_RESAMPLES - start)
        times = generator.multinomial(num_documents, shares, size=count).astype(np.float64)
        changes[:, start : start + count] = differences @ times.T / (math.log(2) * (times @ num_bytes))
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(changes, [tail, 100 - tail], axis=1)
    return [(float(a), float(b)) for a, b in zip(low, high, strict=True)]


def as_json(result: Result | NewRowsCost) -> dict[str, Any]:
    return asdict(result)

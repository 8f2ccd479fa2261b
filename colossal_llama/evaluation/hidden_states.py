"""What the output head gets at the positions of a text, and what comes next there."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from colossal_llama.evaluation.scoring import score_in_halves
from colossal_llama.evaluation.windows import Window, make_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tokens of a forward pass, padding included.
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class HiddenStates:
    """Positions that count, in the order of their windows.

    Attributes:
        states: [positions, hidden], in the dtype of the model.
        targets: the token that follows each, int64 [positions].
        documents: the document of each, int64 [positions].
    """

    states: torch.Tensor
    targets: torch.Tensor
    documents: np.ndarray


@torch.inference_mode()
def find_hidden_states(
    model: PreTrainedModel, windows: Sequence[Window], advance: Callable[[int], object] = lambda _: None
) -> HiddenStates:
    """Runs the model over windows, in batches of about equal length.

    Args:
        advance: called with the number of tokens that a batch had.
    """
    states: list[torch.Tensor] = [torch.empty(0)] * len(windows)
    for batch in make_batches(windows, BATCH_TOKENS):
        chosen = [windows[number] for number in batch]
        for number, found in zip(batch, score_in_halves(partial(_states, model), chosen), strict=True):
            states[number] = found
        advance(sum(len(window.ids) for window in chosen))
    targets = [window.ids[len(window.ids) - window.num_scored :] for window in windows]
    documents = [np.full(window.num_scored, window.document) for window in windows]
    return HiddenStates(
        torch.cat(states),
        torch.from_numpy(np.concatenate(targets).astype(np.int64)).to(model.device),
        np.concatenate(documents),
    )


def _states(model: PreTrainedModel, windows: Sequence[Window]) -> list[torch.Tensor]:
    """The states of each window's positions that count, in one forward pass."""
    ids = np.zeros((len(windows), max(len(window.ids) for window in windows)), dtype=np.int64)
    for row, window in enumerate(windows):
        ids[row, : len(window.ids)] = window.ids
    # Padding is at the end, where a causal model's earlier tokens don't see it.
    input_ids = torch.from_numpy(ids).to(model.device)
    hidden = model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
    return [
        hidden[row, len(window.ids) - window.num_scored - 1 : len(window.ids) - 1].clone()
        for row, window in enumerate(windows)
    ]


class TextSample:
    """A random sample of the texts of a corpus, fixed by the seed and their order.

    Args:
        size: texts that are kept at most.
        max_characters: of a longer text a stretch of this many is kept, from a random place.
    """

    def __init__(self, size: int, max_characters: int, seed: int) -> None:
        self.size, self.max_characters = size, max_characters
        self.random = random.Random(seed)
        self.texts: list[str] = []
        self.num_seen = 0

    def pass_on(self, texts: Iterable[str]) -> Iterable[str]:
        """The same texts, seen on their way."""
        for text in texts:
            self.num_seen += 1
            place = len(self.texts) if len(self.texts) < self.size else self.random.randrange(self.num_seen)
            if place < self.size and text:
                start = self.random.randrange(max(0, len(text) - self.max_characters) + 1)
                kept = text[start : start + self.max_characters]
                if place == len(self.texts):
                    self.texts.append(kept)
                else:
                    self.texts[place] = kept
            yield text

    def shuffled(self) -> list[str]:
        return self.random.sample(self.texts, len(self.texts))

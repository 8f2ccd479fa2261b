"""Losses of windows under one model, in batches of about equal length."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from colossal_llama.evaluation.windows import Window
from colossal_llama.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Score = TypeVar("Score")

# Logits are made for this many of them at once, in fp32: 128 MiB.
LOGITS_AT_ONCE = 2**25


@dataclass(frozen=True)
class WindowScore:
    """Over the tokens of a window that count, in nats.

    Attributes:
        loss: summed loss.
        new_rows_loss: what of it the new rows of the vocabulary cause at tokens that are not new: -log of the
            probability that is left for all others.
    """

    loss: float
    new_rows_loss: float


class Scorer:
    """A model that scores windows.

    Args:
        model: a LLaMA of transformers, in evaluation mode.
        new_rows: output rows that the base model does not have; none where it is no extension.
    """

    def __init__(self, model: PreTrainedModel, new_rows: Sequence[int] = ()) -> None:
        self.model = model
        num_rows = model.get_output_embeddings().weight.size(0)
        self.is_new = torch.zeros(num_rows, dtype=torch.bool, device=model.device)
        self.is_new[torch.as_tensor(list(new_rows), dtype=torch.long, device=model.device)] = True
        self.has_new = bool(len(new_rows))

    @torch.inference_mode()
    def score(self, windows: Sequence[Window]) -> list[WindowScore]:
        """Scores windows in one forward pass; they are padded to the longest."""
        rows, losses, new_rows_losses = self._score_tokens(windows)
        sums = torch.zeros(2, len(windows), dtype=torch.float64, device=losses.device)
        sums[0].index_add_(0, rows, losses)
        sums[1].index_add_(0, rows, new_rows_losses)
        return [WindowScore(*pair) for pair in sums.T.tolist()]

    @torch.inference_mode()
    def token_losses(self, windows: Sequence[Window]) -> list[np.ndarray]:
        """The loss of each token of a window that counts, float64 [num_scored], in one forward pass."""
        _, losses, _ = self._score_tokens(windows)
        borders = np.cumsum([window.num_scored for window in windows])[:-1]
        return np.split(losses.cpu().numpy(), borders)

    def _score_tokens(self, windows: Sequence[Window]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of all tokens that count, in order: number of the window, loss, what new rows cause of it.

        Padding is at the end, where a causal model's earlier tokens don't see it.
        """
        device = self.model.device
        length = max(len(window.ids) for window in windows)
        ids = np.zeros((len(windows), length), dtype=np.int64)
        for row, window in enumerate(windows):
            ids[row, : len(window.ids)] = window.ids
        input_ids = torch.from_numpy(ids).to(device)
        hidden = self.model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
        rows, positions = [], []
        for row, window in enumerate(windows):
            size = len(window.ids)
            rows += [row] * window.num_scored
            positions += range(size - window.num_scored - 1, size - 1)
        at = torch.tensor(rows, device=device), torch.tensor(positions, device=device)
        return at[0], *self._losses(hidden[at], input_ids[at[0], at[1] + 1])

    def _losses(self, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For each of [tokens, width] and [tokens]: the loss, and what new rows cause of it, float64."""
        head = self.model.get_output_embeddings()
        step = max(1, LOGITS_AT_ONCE // head.weight.size(0))
        losses, new_rows_losses = [], []
        for part, wanted in zip(hidden.split(step), targets.split(step), strict=True):
            logits = head(part).float()
            normalizer = logits.logsumexp(dim=-1)
            losses.append((normalizer - logits.gather(1, wanted[:, None])[:, 0]).double())
            if self.has_new:
                of_old = logits.masked_fill(self.is_new, -math.inf).logsumexp(dim=-1)
                cost = (normalizer - of_old).clamp(min=0).double()
                new_rows_losses.append(cost.masked_fill(self.is_new[wanted], 0.0))
        found = torch.cat(losses)
        return found, torch.cat(new_rows_losses) if self.has_new else torch.zeros_like(found)


def score_batch(scorer: Scorer, windows: Sequence[Window]) -> list[WindowScore]:
    """`Scorer.score`; halves the batch where the GPU's memory is full."""
    return score_in_halves(scorer.score, windows)


def score_in_halves(
    score: Callable[[Sequence[Window]], list[Score]], windows: Sequence[Window]
) -> list[Score]:
    """Scores windows; halves the batch where the GPU's memory is full.

    Raises:
        UserError: a single window does not fit the GPU's memory.
    """
    try:
        return score(windows)
    except torch.OutOfMemoryError:
        if len(windows) == 1:
            raise UserError(
                f"the GPU's memory is full with one window of {len(windows[0].ids):,} tokens; lower "
                "--context_bytes, or use --dtype bf16 or --device cpu"
            ) from None
    torch.cuda.empty_cache()
    half = len(windows) // 2
    return [*score_in_halves(score, windows[:half]), *score_in_halves(score, windows[half:])]


def find_rows_beyond_base(
    base_vocabulary: dict[str, int], vocabulary: dict[str, int], num_base_rows: int, num_rows: int
) -> list[int] | None:
    """Output rows of an extended model that its base does not have; None where it is no extension.

    Args:
        base_vocabulary, vocabulary: token -> id.
        num_base_rows, num_rows: rows of the matrices, which may be padded.
    """
    if any(vocabulary.get(token) != token_id for token, token_id in base_vocabulary.items()):
        return None
    added = vocabulary.keys() - base_vocabulary.keys()
    return sorted({vocabulary[token] for token in added} | set(range(num_base_rows, num_rows)))


def release(scorer: Any) -> None:
    """Frees a model's memory before the next is loaded."""
    import gc

    scorer.model = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

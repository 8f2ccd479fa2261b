"""Biases of new output rows: the model expects each new piece as often as the corpus has it.

Hidden states before the output head are nearly constant in one direction, that of their mean h̄. So adding b·u
to an output row, u = h̄/|h̄|², adds about b to its logit at every position: a bias, kept in the row itself.

    old logits  ┐                            ┌ frequencies of new pieces in the corpus: p
    new logits + b·(h·u) ┘ softmax → P(piece | h_t), mean over t ──────┘ b is right when they are equal

The biases are those of maximum likelihood, where only they are free: the gradient of the mean log-likelihood
in the bias of a piece is its frequency minus the mean of its probability.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

NUM_ITERATIONS = 4
# A bias moves at most so far in an iteration, in nats: the first guesses of rare pieces are rough.
MAX_MOVE = 3.0
# Logits are made for this many of them at once, in fp32: 64 MiB, and a few copies.
LOGITS_AT_ONCE = 2**24


@dataclass(frozen=True)
class Calibration:
    """What was found for new rows.

    Attributes:
        direction: u, [hidden], fp32.
        biases: b, [new rows], fp32.
        expected: frequencies p, [new rows].
        before, reached: mean probability of each new row without and with its bias.
    """

    direction: torch.Tensor
    biases: torch.Tensor
    expected: torch.Tensor
    before: torch.Tensor
    reached: torch.Tensor


def smooth_frequencies(counts: torch.Tensor, total: int) -> torch.Tensor:
    """The share of the corpus's tokens that each new piece is: (count + ½) / (total + ½ N).

    Args:
        counts: [N] occurrences of each.
        total: tokens of the corpus, old and new. A piece that never occurs has a small share, not none.
    """
    return (counts.double() + 0.5) / (total + 0.5 * len(counts))


def mean_direction(hidden: torch.Tensor) -> torch.Tensor:
    """u = h̄/|h̄|² of hidden states [positions, hidden]: h̄·u is 1."""
    mean = hidden.double().mean(0)
    return (mean / mean.square().sum()).float()


def normalizers(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """log Σ exp of the logits of `rows` [rows, hidden] at each of `hidden` [positions, hidden]; fp64."""
    import torch

    # In fp32, as a model's loss is: the error is some 1e-6 nats, and fp64 takes three times as long.
    return torch.cat([logits.logsumexp(1).double() for _, logits in _logits(hidden, rows)])


def calibrate(
    hidden: torch.Tensor,
    new_rows: torch.Tensor,
    old_normalizers: torch.Tensor,
    expected: torch.Tensor,
    advance: Callable[[int], object] = lambda _: None,
) -> Calibration:
    """Finds the biases.

    Args:
        hidden: [positions, hidden], what the output head gets.
        new_rows: [N, hidden], the new rows of the head.
        old_normalizers: `normalizers` of all other rows.
        expected: [N] frequencies.
        advance: called with the number of positions that an iteration has seen.
    """
    import torch

    direction = mean_direction(hidden)
    biases = torch.zeros(len(new_rows), dtype=torch.float64, device=hidden.device)
    target = expected.to(hidden.device).double().log()
    # In fp32 within a stretch of positions, which is exact enough for a bias by far; in fp64 over stretches.
    scale = hidden.float() @ direction

    def mean_log_probability() -> torch.Tensor:
        total = torch.full_like(biases, -torch.inf)
        for part, logits in _logits(hidden, new_rows):
            logits.addr_(scale[part], biases.float())
            normalizer = torch.logaddexp(old_normalizers[part], logits.logsumexp(1).double())
            logits.sub_(normalizer[:, None])
            total = torch.logaddexp(total, logits.logsumexp(0).double())
            advance(len(logits))
        return total - torch.tensor(float(len(hidden)), dtype=torch.float64).log()

    found = before = mean_log_probability()
    for _ in range(NUM_ITERATIONS):
        biases = biases + (target - found).clamp(-MAX_MOVE, MAX_MOVE)
        found = mean_log_probability()
    return Calibration(
        direction.cpu(), biases.float().cpu(), expected.cpu(), before.exp().cpu(), found.exp().cpu()
    )


def token_losses(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    old_rows: torch.Tensor,
    new_rows: torch.Tensor,
    new_ids: range,
    old_normalizers: torch.Tensor,
) -> torch.Tensor:
    """The loss at each position, in nats, fp64 [positions]: new rows are tried without the old ones' logits.

    Args:
        targets: the token that follows, int64 [positions].
        old_rows: rows of the head before `new_ids`.
        old_normalizers: `normalizers` of all rows that are not new.
    """
    import torch

    losses = torch.empty(len(hidden), dtype=torch.float64, device=hidden.device)
    is_new = (targets >= new_ids.start) & (targets < new_ids.stop)
    for part, logits in _logits(hidden, new_rows):
        normalizer = torch.logaddexp(old_normalizers[part], logits.logsumexp(1).double())
        new, wanted = is_new[part], targets[part]
        of_new = logits.gather(1, (wanted - new_ids.start).clamp(0, len(new_ids) - 1)[:, None])[:, 0]
        rows = old_rows[wanted.masked_fill(new, 0)]
        of_old = (hidden[part].float() * rows.float()).sum(1)
        losses[part] = normalizer - torch.where(new, of_new, of_old).double()
    return losses


def _logits(hidden: torch.Tensor, rows: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """(positions, logits [positions, rows] in fp32), a stretch of positions at a time."""
    step = max(1, LOGITS_AT_ONCE // max(1, len(rows)))
    rows = rows.to(hidden.dtype)
    for start in range(0, len(hidden), step):
        part = slice(start, min(start + step, len(hidden)))
        yield part, (hidden[part] @ rows.T).float()

"""Evaluation of the model that trains: loss and bits per byte of held-out sets, over all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from colossal_llama.dataset.labels import NO_LOSS_LABEL
from colossal_llama.tokenizer.token_bytes import TokenBytes
from colossal_llama.training.data.collator import Collator
from colossal_llama.training.data.loader import make_loader
from colossal_llama.training.data.order import BatchShape, EvaluationSampler
from colossal_llama.training.data.prepared_rows import PreparedDataset
from colossal_llama.utils.console import progress_bar, warn
from colossal_llama.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from colossal_llama.training.plugins.base import Plugin


@dataclass(frozen=True)
class EvaluationSums:
    """Over the tokens of a set that have loss.

    Attributes:
        loss: in nats.
        tokens: their number.
        bytes: of the text that they stand for.
    """

    loss: float
    tokens: int
    bytes: int

    @classmethod
    def of_all(cls, sums: Mapping[str, EvaluationSums]) -> EvaluationSums:
        columns = [(each.loss, each.tokens, each.bytes) for each in sums.values()]
        return cls(*map(sum, zip(*columns, strict=True)))

    @property
    def mean_loss(self) -> float:
        return self.loss / self.tokens

    @property
    def bits_per_byte(self) -> float | None:
        """None without text, or where the bytes of tokens are not known."""
        return self.loss / (math.log(2) * self.bytes) if self.bytes else None


class Evaluator:
    """Evaluates sets of prepared rows.

    Args:
        sets: by name.
        make_collator: for the rows of a set.
    """

    def __init__(
        self,
        sets: Mapping[str, PreparedDataset],
        plugin: Plugin,
        batch_shape: BatchShape,
        make_collator: Callable[[PreparedDataset], Collator],
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        self.sets, self.plugin, self.batch_shape = sets, plugin, batch_shape
        self.make_collator = make_collator
        self.token_bytes: TokenBytes | None = None
        if sets and tokenizer is not None:
            self.token_bytes, self.bos_id = TokenBytes.of_tokenizer(tokenizer), tokenizer.bos_token_id
            if self.token_bytes is None:
                warn(
                    "the tokenizer is neither sentencepiece-like nor byte-level, so the bytes of its tokens "
                    "are not known: evaluations have no bits per byte"
                )

    def measure(self, stop_requested: Callable[[], bool]) -> dict[str, EvaluationSums] | None:
        """The sums of each set over all ranks; None when a stop was asked for on some rank."""
        own = []
        for name in self.sets:
            share = self._measure_set(name, stop_requested)
            if share is None:
                return None
            own.append(share)
        losses, counts = (torch.tensor(column, dtype=torch.float64) for column in zip(*own, strict=True))
        losses = self.plugin.sum_losses(losses).tolist()
        counts = self.plugin.sum_counts(counts.flatten()).view(-1, 2).tolist()
        return {
            name: EvaluationSums(loss, round(num_tokens), round(num_bytes))
            for name, loss, (num_tokens, num_bytes) in zip(self.sets, losses, counts, strict=True)
        }

    def _measure_set(
        self, name: str, stop_requested: Callable[[], bool]
    ) -> tuple[float, tuple[int, int]] | None:
        """This rank's share: summed loss; tokens with loss and their bytes."""
        dataset = self.sets[name]
        sampler = EvaluationSampler(len(dataset), self.batch_shape)
        loader = make_loader(dataset, sampler, self.make_collator(dataset), 0, pin_memory=False)
        loss_sum = torch.zeros((), dtype=torch.float64)
        num_tokens = num_bytes = 0
        for batch in progress_bar(loader, total=len(sampler), desc="evaluate", leave=False):
            if batch["problem"]:
                raise UserError(batch["problem"], this_rank_only=True)
            stop = torch.tensor([float(stop_requested())], dtype=torch.float64)
            if self.plugin.sum_counts(stop).item() > 0:
                return None
            has_loss = batch["labels"] != NO_LOSS_LABEL
            num_tokens += int(has_loss.sum())
            num_bytes += self._count_bytes(batch, has_loss)
            loss_sum += self.plugin.evaluate_pass(self.plugin.to_device(batch)).double().cpu()
        return float(loss_sum), (num_tokens, num_bytes)

    def _count_bytes(self, batch: dict[str, Any], has_loss: torch.Tensor) -> int:
        if self.token_bytes is None:
            return 0
        # Labels are shifted: `input_ids` at their place is the token before.
        tokens, previous = batch["labels"][has_loss], batch["input_ids"][has_loss]
        return self.token_bytes.count(tokens.numpy(), previous.numpy(), self.bos_id)


def evaluation_figures(sums: Mapping[str, EvaluationSums]) -> dict[str, float]:
    """What the metrics say of an evaluation: all sets together, and where there are several, each."""
    figures: dict[str, float] = {}
    measured = {name: each for name, each in sums.items() if each.tokens}
    if not measured:
        return figures
    if len(sums) > 1:
        for name, each in measured.items():
            figures[f"eval_loss/{name}"] = each.mean_loss
            if each.bits_per_byte is not None:
                figures[f"eval_bits_per_byte/{name}"] = each.bits_per_byte
    total = EvaluationSums.of_all(measured)
    figures |= {"eval_loss": total.mean_loss, "eval_perplexity": math.exp(min(total.mean_loss, 700.0))}
    if total.bits_per_byte is not None:
        figures["eval_bits_per_byte"] = total.bits_per_byte
    return figures


def describe_evaluation(step: int, figures: Mapping[str, float]) -> str:
    """A line for people."""
    line = (
        f"step {step}: evaluation loss {figures['eval_loss']:.4f}, perplexity "
        f"{figures['eval_perplexity']:.2f}"
    )
    if "eval_bits_per_byte" not in figures:
        return line
    prefix = "eval_bits_per_byte/"
    sets = [
        f"{name.removeprefix(prefix)} {value:.4f}"
        for name, value in figures.items()
        if name.startswith(prefix)
    ]
    return f"{line}, {figures['eval_bits_per_byte']:.4f} bits per byte" + (
        f" ({', '.join(sets)})" if sets else ""
    )

"""`--keep_optimizer`: a new stage that begins with the optimizer of a checkpoint.

Weights, Adam's moments and its step count are those of the checkpoint; data, schedule and counters begin
anew. The vocabulary may have been extended a second time in between. Then the weights are those of
`--pretrained`, and rows that the checkpoint knows keep their moments:

    embedding matrix    known rows: as in the checkpoint    | added rows: as initialised
    moments             known rows: as in the checkpoint    | added rows: zero

Adam's step count belongs to the whole optimizer (HybridAdam has one for all parameters), so parameters that
begin at zero share it: their first steps are less than half as long as in a run that begins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from colossal_llama.tokenizer.fingerprint import tokenizer_fingerprint
from colossal_llama.tokenizer.loading import load_pretrained_tokenizer
from colossal_llama.training.checkpoint.modeling_files import MODELING_DIRECTORY
from colossal_llama.training.checkpoint.optimizer_files import (
    OPTIMIZER_DIRECTORY,
    SavedOptimizer,
    cut_part,
    tensor_parallel_dim,
)
from colossal_llama.training.checkpoint.record import MODEL_FIELDS, SavedRun, model_facts
from colossal_llama.training.llama.adapters import is_embedding
from colossal_llama.utils.console import log
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.messages import first_line

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerBase

    from colossal_llama.training.plugins.base import Plugin
    from colossal_llama.training.settings import RunSettings

# What of the model's configuration a new stage may change.
_MAY_CHANGE = ("vocab_size", "rope_theta", "rope_scaling", "max_position_embeddings")
_SAME_FLAGS = ("lora_rank", "lora_embeddings")
_MOMENTS = ("exp_avg", "exp_avg_sq")
_ALL_ROWS = 2**62


@dataclass(frozen=True)
class KeptOptimizer:
    """Attributes:
    saved: the checkpoint, and the run that it belongs to.
    known_rows: leading rows of the embeddings that the checkpoint knows; None where it knows all.
    """

    saved: SavedRun
    known_rows: int | None = None

    @classmethod
    def find(
        cls,
        saved: SavedRun,
        settings: RunSettings,
        config: LlamaConfig,
        tokenizer: PreTrainedTokenizerBase,
    ) -> KeptOptimizer:
        """Checks that the checkpoint's optimizer fits this stage's model.

        Raises:
            UserError: with every reason why it does not.
        """
        checkpoint, pretrained = saved.checkpoint, settings.data.pretrained
        problems = []
        facts = model_facts(config)
        for key in MODEL_FIELDS:
            old = saved.record.model.get(key, facts[key])
            if key not in _MAY_CHANGE and old != facts[key]:
                problems.append(f"--pretrained {pretrained}: {key} {facts[key]}, but {old} in {checkpoint}")
        flags, values = settings.flags(), settings.as_json()
        for name in _SAME_FLAGS:
            old = flags[name].meaning(saved.record.arguments.get(name, flags[name].default))
            now = flags[name].meaning(values[name])
            if old != now:
                problems.append(
                    f"--{name}: {old} in {checkpoint}, {now} now; --keep_optimizer needs the same"
                )
        known_rows = _count_known_rows(saved.checkpoint / MODELING_DIRECTORY, pretrained, tokenizer)
        if known_rows is not None and settings.adaptation.lora_rank:
            problems.append(
                f"--pretrained {pretrained}: has an extended vocabulary, and adapters belong to the model "
                "that they were trained on; merge them, or leave --keep_optimizer out"
            )
        if problems:
            raise UserError(problems)
        SavedOptimizer(saved.checkpoint / OPTIMIZER_DIRECTORY)
        return cls(saved, known_rows)

    def restore(self, plugin: Plugin) -> None:
        """Gives the boosted model's optimizer the moments, and logs how many there are; every rank calls it.

        Raises:
            UserError: `--pretrained` does not hold the checkpoint's weights.
        """
        optimizer = SavedOptimizer(self.saved.checkpoint / OPTIMIZER_DIRECTORY)
        place, config = plugin.shard_coordinates(), plugin.causal_lm.config
        steps = max(optimizer.steps.values(), default=0.0)
        kept = total = differing = 0
        for name, (parameter, master) in plugin.master_weights().items():
            dim = tensor_parallel_dim(parameter)
            known = real = _ALL_ROWS
            if is_embedding(name):
                real = config.vocab_size
                known = real if self.known_rows is None else self.known_rows
            shape, size = tuple(parameter.shape), master.numel()
            begin = plugin.slice_begin(parameter, master)
            moments = {kind: torch.zeros(size, device=master.device).view_as(master) for kind in _MOMENTS}
            here = 0
            if optimizer.has(name, _MOMENTS[0]):
                here = _count_leading(known, shape, dim, place.tensor_rank, begin, size)
                flat = master.detach().view(-1)
                for kind in ("master", *_MOMENTS):
                    part = cut_part(optimizer.whole(name, kind), shape, dim, place.tensor_rank)
                    value = part.flatten()[begin : begin + here].to(master.device)
                    if kind == "master":
                        differing += int(_differs(flat[:here], value).sum())
                        flat[:here] = value
                    else:
                        moments[kind].view(-1)[:here] = value
            step = plugin.optimizer_step_count(steps, master)
            plugin.optimizer.optim.state[master] = {**moments, "step": step}
            is_counted_elsewhere = place.is_replica or (dim is None and place.tensor_rank > 0)
            if is_counted_elsewhere or (config.tie_word_embeddings and name.endswith("lm_head.weight")):
                continue
            kept += here
            total += _count_leading(real, shape, dim, place.tensor_rank, begin, size)
        if plugin.new_ids is not None:
            _forget_other_rows(plugin)
        self._report(plugin, int(steps), kept, total, differing)

    def _report(self, plugin: Plugin, steps: int, kept: int, total: int, differing: int) -> None:
        counts = torch.tensor([kept, total, differing], dtype=torch.float64, device=plugin.device)
        dist.all_reduce(counts)
        kept, total, differing = (int(value) for value in counts)
        if differing:
            raise UserError(
                f"--keep_optimizer: {differing:,} weights of --pretrained "
                f"{plugin.settings.data.pretrained} are not those of {self.saved.checkpoint}; extend "
                f"{self.saved.checkpoint / MODELING_DIRECTORY} with init_model.py"
            )
        if not kept:
            raise UserError(
                f"--keep_optimizer: {self.saved.checkpoint} has no moments of the parameters that train now; "
                "leave it out"
            )
        rows = ""
        if self.known_rows is not None:
            rows = f" (rows of the embeddings from {self.known_rows:,} on are among them)"
        log(
            f"Kept Adam's moments of {kept:,} of {total:,} trained parameters and its step count, {steps:,}, "
            f"from {self.saved.checkpoint}; {total - kept:,} start at zero{rows}"
        )


def _forget_other_rows(plugin: Plugin) -> None:
    """Makes the moments of rows that do not train zero: Adam would go on moving them."""
    for row in plugin.new_row_values():
        for kind in _MOMENTS:
            values = plugin.optimizer.optim.state[row.master][kind].view(-1)
            values[: row.values.start] = 0
            values[row.values.stop :] = 0


def _count_known_rows(modeling: Path, pretrained: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Tokens of the checkpoint where `tokenizer` has more; None where both are the same.

    Raises:
        UserError: the checkpoint's tokens are others.
    """
    before = load_pretrained_tokenizer(
        modeling, lambda error: f"{modeling}: its tokenizer cannot be read ({first_line(error)})", False
    )
    if tokenizer_fingerprint(before) == tokenizer_fingerprint(tokenizer):
        return None
    old, new = before.get_vocab(), tokenizer.get_vocab()
    if any(new.get(token) != token_id for token, token_id in old.items()) or len(new) == len(old):
        raise UserError(
            f"--pretrained {pretrained}: its tokenizer is neither that of {modeling} nor an extension of it, "
            "so the optimizer's rows would belong to other tokens; leave --keep_optimizer out"
        )
    return max(old.values()) + 1


def _count_leading(
    rows: int, shape: tuple[int, ...], dim: int | None, tensor_rank: int, begin: int, size: int
) -> int:
    """How many leading values of this process's slice belong to the first `rows` rows of a parameter.

    Args:
        shape, dim: of the tensor-parallel rank's part, and the dimension that it was split along.
        begin, size: of the slice, in values of the part.
    """
    first = tensor_rank * shape[0] if dim == 0 else 0
    inside = min(max(rows - first, 0), shape[0]) * math.prod(shape[1:])
    return min(max(inside - begin, 0), size)


def _differs(loaded: torch.Tensor, saved: torch.Tensor) -> torch.Tensor:
    """Where a loaded weight is not the saved fp32 one rounded to any precision of a run."""
    return (loaded.float() - saved).abs() > saved.abs() * 2**-7 + 1e-6

"""Plain loops that runs of `train.py` with groups, or with new rows alone, are compared with.

They share no code with the package: transformers' model, torch's AdamW, fp32. Where new rows alone train,
they are the only parameters of the optimizer; the model computes with matrices that are put together anew
each step.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from launch import Run, train
from safetensors.torch import load_file
from torch.func import functional_call
from training_inputs import TrainingInputs

STEPS, ROWS_PER_STEP, WARMUP, SEED = 6, 8, 2, 7
LR, LR_EMBEDDINGS, WEIGHT_DECAY, GRAD_CLIP = 1e-3, 4e-3, 0.5, 0.25
# The rest of the 501 rows are those of a source, and padding after the new ones.
NEW_IDS = range(441, 495)
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
SETS = ("new/text", "old")
COMMON = [
    *("--lr", LR, "--warmup_steps", WARMUP, "--max_steps", STEPS, "--seed", SEED),
    *("--grad_clip", GRAD_CLIP, "--weight_decay", WEIGHT_DECAY),
]


def two_sets(inputs: TrainingInputs, directory: Path) -> list[Path]:
    """Two `arrow/` directories, named `SETS`; the second has fewer rows than an even share asks for."""
    paths = [directory / name / "arrow" for name in SETS]
    for path, part in zip(paths, ("part-00000", "part-00001"), strict=True):
        shutil.copytree(inputs.data / part, path / "part-00000")
    return paths


def extended(inputs: TrainingInputs, directory: Path, tied: bool = False) -> TrainingInputs:
    """The inputs with a model whose last rows are those of new pieces."""
    if tied:
        changed = inputs.with_tied_model(directory)
    else:
        changed = TrainingInputs(Path(shutil.copytree(inputs.model, directory)), inputs.data)
    counts = {"source_vocabulary_size": NEW_IDS.start, "target_vocabulary_size": NEW_IDS.stop}
    (directory / "vocabulary_extension.json").write_text(json.dumps({"counts": counts}))
    return changed


def with_four_layers(inputs: TrainingInputs) -> TrainingInputs:
    """Another model in the same directory, with a layer for each of four pipeline stages."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(inputs.model, num_hidden_layers=4)
    LlamaForCausalLM(config).save_pretrained(inputs.model)
    return inputs


@dataclass(frozen=True)
class PlainLoop:
    """What trains, and how.

    Attributes:
        new_rows: nothing but `NEW_IDS` of the embeddings.
        embeddings: nothing but the embeddings.
        no_decay: "norms", "embeddings".
    """

    inputs: TrainingInputs
    new_rows: bool = False
    embeddings: bool = False
    lr_embeddings: float = LR
    no_decay: tuple[str, ...] = ()
    weight_decay: float = WEIGHT_DECAY
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    def run(self) -> dict[str, torch.Tensor]:
        """Trains; returns the final weights by name."""
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM.from_pretrained(self.inputs.model, torch_dtype=torch.float32)
        source = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
        trained = {}
        for name, tensor in source.items():
            if name in EMBEDDINGS and self.new_rows:
                trained[name] = tensor[NEW_IDS.start : NEW_IDS.stop].clone().requires_grad_()
            elif name in EMBEDDINGS or not (self.new_rows or self.embeddings):
                trained[name] = tensor.clone().requires_grad_()
        groups: list[dict[str, Any]] = [
            {
                "params": [tensor],
                "peak": self.lr_embeddings if name in EMBEDDINGS else LR,
                "weight_decay": 0.0 if self._is_without_decay(name) else self.weight_decay,
            }
            for name, tensor in trained.items()
        ]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)

        def weights() -> dict[str, torch.Tensor]:
            whole = {**source, **trained}
            if self.new_rows:
                for name, rows in trained.items():
                    before, after = source[name][: NEW_IDS.start], source[name][NEW_IDS.stop :]
                    whole[name] = torch.cat([before, rows, after])
            return whole

        total_steps = len(self._data()) // ROWS_PER_STEP
        for step in range(STEPS):
            loss = self._loss(model, weights(), step)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(list(trained.values()), GRAD_CLIP)
            self.norms.append(float(norm))
            for group in optimizer.param_groups:
                if step < WARMUP:
                    group["lr"] = group["peak"] * (step + 1) / WARMUP
                else:
                    cosine = 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (total_steps - WARMUP)))
                    group["lr"] = group["peak"] * (0.1 + 0.9 * cosine)
            optimizer.step()
            optimizer.zero_grad()
            self.losses.append(float(loss))
        return {name: tensor.detach() for name, tensor in weights().items()}

    def _is_without_decay(self, name: str) -> bool:
        return ("norms" in self.no_decay and "norm" in name) or (
            "embeddings" in self.no_decay and name in EMBEDDINGS
        )

    def _data(self) -> datasets.Dataset:
        parts = [datasets.load_from_disk(str(path)) for path in sorted(self.inputs.data.glob("part-*"))]
        return datasets.concatenate_datasets(parts)

    def _loss(self, model: torch.nn.Module, weights: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        """Documents one by one: nothing to isolate, positions from 0, the first token is never predicted."""
        data = self._data()
        order = np.arange(len(data), dtype=np.uint32)
        np.random.default_rng([SEED, 0, 0]).shuffle(order)
        total, count = torch.zeros(()), 0
        for row in order[step * ROWS_PER_STEP : (step + 1) * ROWS_PER_STEP]:
            start = 0
            for length in data[int(row)]["document_lengths"]:
                ids = torch.tensor(data[int(row)]["input_ids"][start : start + length])[None]
                labels = torch.tensor(data[int(row)]["labels"][start : start + length])[None, 1:]
                start += length
                logits = functional_call(model, weights, (ids,)).logits[:, :-1]
                total = total + torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
                )
                count += int((labels != -100).sum())
        return total / count


@dataclass(frozen=True)
class Reference:
    """A plain loop that has run, and the weights it would have without decay."""

    loop: PlainLoop
    weights: dict[str, torch.Tensor]

    @classmethod
    def of(cls, loop: PlainLoop) -> Reference:
        weights = loop.run()
        before = load_weights(loop.inputs.model)
        moved = max(float((weights[name] - tensor).abs().max()) for name, tensor in before.items())
        assert moved > 4e-3, "it has to learn for a comparison to mean something"
        assert max(loop.norms) > GRAD_CLIP, "clipping has to act in some step"
        return cls(loop, weights)

    def compare(self, run: Run, loss: float = 1e-5, norm: float = 1e-3, weights: float = 1e-5) -> str:
        """Asserts that a run did the same; returns the largest differences."""
        assert run.returncode == 0, run.output[-3000:]
        final = load_weights(run.save_dir / "modeling")
        assert final.keys() == self.weights.keys()
        pairs = zip(run.losses(), self.loop.losses, strict=True)
        loss_error = max(abs(found - wanted) / wanted for found, wanted in pairs)
        pairs = zip([record["grad_norm"] for record in run.metrics()], self.loop.norms, strict=True)
        norm_error = max(abs(found - wanted) / wanted for found, wanted in pairs)
        errors = {name: float((final[name].float() - self.weights[name]).abs().max()) for name in final}
        worst = max(errors, key=errors.__getitem__)
        summary = f"loss {loss_error:.1e}, norm {norm_error:.1e}, weights {errors[worst]:.1e} ({worst})"
        assert loss_error < loss, summary
        assert norm_error < norm, summary
        assert errors[worst] < weights, summary
        return summary


def without_decay(loop: PlainLoop) -> dict[str, torch.Tensor]:
    return replace(loop, weight_decay=0.0, losses=[], norms=[]).run()


def load_weights(directory: Path) -> dict[str, torch.Tensor]:
    """Of a model directory by name, a tied matrix once."""
    found: dict[str, torch.Tensor] = {}
    for path in directory.glob("*.safetensors"):
        found.update(load_file(path))
    return found


def run_extended(
    directory: Path, inputs: TrainingInputs, processes: int, *flags: object, precision: str = "fp32"
) -> Run:
    return train(directory, processes, *inputs.flags(), *COMMON, "--mixed_precision", precision, *flags)

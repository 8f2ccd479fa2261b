"""The suite's trainer inside a benchmark's process, and the bare loop that it is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama.training.arguments import parse_settings

if TYPE_CHECKING:
    import torch

    from colossal_llama.training.data.rows import RowDataset
    from colossal_llama.training.loop import TrainingLoop
    from colossal_llama.training.resilience.interruption import StopRequest
    from colossal_llama.training.run import Run


def write_config(
    directory: Path,
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    max_length: int,
    intermediate_size: int | None = None,
    num_heads: int = 8,
    num_key_value_heads: int | None = None,
) -> None:
    """A model directory with a shape and no weights: `--benchmark` makes random ones."""
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size or hidden_size * 11 // 4,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_key_value_heads or num_heads,
        max_position_embeddings=max_length,
    ).save_pretrained(directory)


def start_run(flags: Sequence[str], dataset: RowDataset | None = None) -> tuple[Run, StopRequest]:
    """What `train.py` does up to its first step, on `--benchmark` rows or on those given.

    Args:
        flags: of `train.py`; `--benchmark` is added.
        dataset: rows in place of random ones.
    """
    from colossal_llama.training.process import start_process
    from colossal_llama.upstream.quiet import quieten_libraries

    settings = parse_settings([*flags, "--benchmark"])
    quieten_libraries()
    stop = start_process(settings.optimizer)
    import torch.distributed as dist

    from colossal_llama.training.run import Run

    run = Run.prepare(settings, dist.get_world_size(), dataset)
    run.plugin.start()
    run.boost()
    return run, stop


def start_loop(flags: Sequence[str], dataset: RowDataset | None = None) -> TrainingLoop:
    """The loop of `start_run`, ready for its first step; nothing is saved."""
    from colossal_llama.training.loop import TrainingLoop
    from colossal_llama.training.state import TrainState

    run, stop = start_run(flags, dataset)
    return TrainingLoop(run, TrainState(), None, None, stop)


class BareLoop:
    """A training step in plain PyTorch: transformers' model with its own loss, AdamW, clipping, nothing else.

    In half precision the optimizer keeps fp32 masters of the weights, as the suite's plugins do.
    """

    def __init__(self, model: Any, learning_rate: float) -> None:
        import torch

        from colossal_llama.training.plugins.base import ADAM_BETAS, ADAM_EPS

        self.model = model.train()
        self.parameters = list(model.parameters())
        self.is_half = self.parameters[0].dtype != torch.float32
        self.masters = [p.detach().float() for p in self.parameters] if self.is_half else self.parameters
        self.optimizer = torch.optim.AdamW(
            self.masters, lr=learning_rate, betas=ADAM_BETAS, eps=ADAM_EPS, weight_decay=0.1, fused=True
        )

    def step(self, batches: Iterator[torch.Tensor], accumulation_steps: int) -> float:
        """One optimizer step over `input_ids` [rows, length] of each micro-batch; returns the mean loss."""
        import torch

        total = 0.0
        for _ in range(accumulation_steps):
            ids = next(batches)
            loss = self.model(input_ids=ids, labels=ids).loss / accumulation_steps
            loss.backward()
            total += float(loss)
        if self.is_half:
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                master.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.is_half:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self.masters)
        return total


def transformers_trainer(
    model: Any,
    rows: torch.Tensor,
    batch_size: int,
    accumulation_steps: int,
    learning_rate: float,
    output_dir: Path,
    callback: Any,
    **options: Any,
) -> Any:
    """A `transformers.Trainer` over the same rows, in their order, with the same optimizer.

    Args:
        rows: `input_ids` [rows, length], all used once; labels are the same.
        callback: a `TrainerCallback`.
        options: more of `TrainingArguments`.
    """
    import torch
    from transformers import Trainer, TrainingArguments

    from colossal_llama.training.plugins.base import ADAM_BETAS, ADAM_EPS

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any) -> torch.utils.data.Sampler:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    arguments = TrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation_steps,
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        adam_beta1=ADAM_BETAS[0],
        adam_beta2=ADAM_BETAS[1],
        adam_epsilon=ADAM_EPS,
        weight_decay=0.1,
        max_grad_norm=1.0,
        num_train_epochs=1,
        optim="adamw_torch_fused",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        **options,
    )
    # The Trainer divides by the number of labels, the first one included, which nothing predicts.
    labels = rows.clone()
    labels[:, 0] = -100
    dataset = [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)]
    return InOrder(model=model, args=arguments, train_dataset=dataset, callbacks=[callback])

"""The plain loop that every layout is compared with: transformers' model and loss, torch's AdamW, fp32."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import train

STEPS = 20
ROWS_PER_STEP = 8
PEAK_LR = 1e-3
WARMUP = 3
SEED = 7
COMMON = ["--lr", PEAK_LR, "--warmup_steps", WARMUP, "--max_steps", STEPS, "--seed", SEED, "--grad_clip", 0.8]

FP32 = ["--mixed_precision", "fp32"]
BF16 = ["--mixed_precision", "bf16"]


def rows(batch: int, accumulation: int) -> list:
    return ["--batch_size", batch, "--accumulation_steps", accumulation]


@pytest.fixture(scope="session")
def reference(training_inputs):
    """Losses, gradient norms and final weights of the plain loop; it shares no code with the package."""
    import datasets
    from transformers import LlamaForCausalLM

    parts = [datasets.load_from_disk(str(path)) for path in sorted(training_inputs.data.glob("part-*"))]
    data = datasets.concatenate_datasets(parts)
    order = np.arange(len(data), dtype=np.uint32)
    np.random.default_rng([SEED, 0, 0]).shuffle(order)
    total_steps = len(data) // ROWS_PER_STEP
    assert total_steps >= STEPS
    model = LlamaForCausalLM.from_pretrained(training_inputs.model, torch_dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    losses, norms = [], []
    for step in range(STEPS):
        loss_sum, num_labels = 0.0, 0
        for row in order[step * ROWS_PER_STEP : (step + 1) * ROWS_PER_STEP]:
            # Documents one by one: nothing to isolate, positions from 0, the first token is never predicted.
            start = 0
            for length in data[int(row)]["document_lengths"]:
                ids = torch.tensor(data[int(row)]["input_ids"][start : start + length])[None]
                labels = torch.tensor(data[int(row)]["labels"][start : start + length])[None]
                start += length
                logits = model(input_ids=ids).logits[:, :-1]
                loss_sum = loss_sum + torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
                )
                num_labels += int((labels[:, 1:] != -100).sum())
        loss = loss_sum / num_labels
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.8)))
        if step < WARMUP:
            lr = PEAK_LR * (step + 1) / WARMUP
        else:
            cosine = 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (total_steps - WARMUP)))
            lr = PEAK_LR * (0.1 + 0.9 * cosine)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.3, "the reference has to learn for a comparison to mean something"
    assert any(norm > 0.8 for norm in norms), "clipping has to act in some step"
    return losses, norms, model.state_dict()


def check_parity(
    directory: Path, training_inputs, reference, processes: int, flags: list, precision: list
) -> str:
    run = train(directory, processes, *training_inputs.flags(), *COMMON, *flags, *precision)
    assert run.returncode == 0, run.output[-3000:]
    losses, norms, weights = reference
    is_fp32 = precision == FP32
    loss_error = max(abs(a - b) / b for a, b in zip(run.losses(), losses, strict=True))
    norm_error = max(abs(a["grad_norm"] - b) / b for a, b in zip(run.metrics(), norms, strict=True))
    from transformers import AutoModelForCausalLM

    final = AutoModelForCausalLM.from_pretrained(
        run.save_dir / "modeling", torch_dtype=torch.float32
    ).state_dict()
    assert final.keys() == weights.keys()
    weight_error = max(float((final[name] - weights[name]).abs().max()) for name in weights)
    summary = f"loss {loss_error:.1e}, norm {norm_error:.1e}, weights {weight_error:.1e}"
    assert loss_error < (1e-4 if is_fp32 else 2e-2), summary
    assert norm_error < (1e-3 if is_fp32 else 5e-2), summary
    assert weight_error < (1e-4 if is_fp32 else 2e-2), summary
    return summary

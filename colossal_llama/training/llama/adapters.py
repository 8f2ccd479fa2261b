"""What of the model trains: all of it, its embeddings, or LoRA adapters with or without them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import LlamaForCausalLM

LORA_ALPHA = 32
LORA_DROPOUT = 0.1
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def freeze_all_but_embeddings(model: LlamaForCausalLM) -> None:
    """Leaves only the input and output embeddings to train."""
    model.requires_grad_(False)
    train_embeddings_too(model)


def train_embeddings_too(model: LlamaForCausalLM) -> None:
    model.get_input_embeddings().requires_grad_(True)
    model.get_output_embeddings().requires_grad_(True)


def is_embedding(name: str) -> bool:
    """Whether a parameter of this name is the input or the output embedding; in a PEFT model too."""
    return name.endswith(("embed_tokens.weight", "lm_head.weight"))


def lora_config(rank: int) -> LoraConfig:
    """Adapters on all attention and MLP projections."""
    from peft import LoraConfig, TaskType

    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=rank,
        lora_alpha=LORA_ALPHA,
        lora_dropout=LORA_DROPOUT,
        target_modules=LORA_TARGETS,
    )


def add_lora(
    model: LlamaForCausalLM, rank: int, adapter: Path | None, seed: int, train_embeddings: bool = False
) -> nn.Module:
    """Wraps the model with LoRA on all attention and MLP projections: new adapters, or saved ones
    from `adapter`.

    Args:
        seed: of the new adapters, the same on every rank: each plugin takes its own rank's for granted.
        train_embeddings: trains the model's own embeddings too. peft's `modules_to_save` would train copies
            of them, which untie tied ones and which the plugins can't handle.
    """
    from peft import PeftModel, get_peft_model

    if adapter is not None:
        # Embeddings among its tensors go into the model's own. peft would read them onto a GPU first.
        wrapped = PeftModel.from_pretrained(
            model, adapter, is_trainable=True, autocast_adapter_dtype=False, torch_device="cpu"
        )
    else:
        with torch.random.fork_rng(devices=[]):
            # The CPU's alone: ranks keep dropout masks of their own.
            torch.default_generator.manual_seed(seed)
            wrapped = get_peft_model(model, lora_config(rank), autocast_adapter_dtype=False)
    base = model.name_or_path
    if base and Path(base).is_dir():
        base = str(Path(base).absolute())  # a relative path would lead nowhere from another directory
    wrapped.peft_config["default"].base_model_name_or_path = base
    if train_embeddings:
        train_embeddings_too(model)
    return wrapped

"""Casting a model to half precision rounds the rotary frequencies.

Broken in: colossalai 0.5.0, 3d, zero2 and Gemini plugins, which cast every buffer.
Shows as: phases that are off by several radians at position 4095, and a trained model that differs from what
`transformers` later loads.
Cure: compute `inv_freq` again in fp32 after boosting.
"""

from __future__ import annotations

from torch import nn


def restore_rotary_frequencies(model: nn.Module) -> None:
    """Gives every rotary embedding inside `model` its fp32 frequencies back."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    for module in model.modules():
        if isinstance(module, LlamaRotaryEmbedding):
            frequencies, module.attention_scaling = module.rope_init_fn(module.config, module.inv_freq.device)
            module.register_buffer("inv_freq", frequencies.float(), persistent=False)
            module.original_inv_freq = module.inv_freq

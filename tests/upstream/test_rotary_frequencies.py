"""Rotary frequencies stay fp32 when a model is cast."""

from __future__ import annotations

import pytest
import torch

from colossal_llama.upstream.rotary_frequencies import restore_rotary_frequencies


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotary_frequencies_are_fp32_after_casting(tiny_model_dir, dtype):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_model_dir, torch_dtype=torch.float32)
    expected = model.model.rotary_emb.inv_freq.clone()
    model.to(dtype)
    assert not torch.equal(model.model.rotary_emb.inv_freq.float(), expected)
    restore_rotary_frequencies(model)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(model.model.rotary_emb.inv_freq, expected)

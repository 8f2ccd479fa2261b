"""FLOPs of a LLaMA by hand and by torch's counter; sizes read from a configuration file."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from colossal_llama.utils.llama_size import count_parameters, flops_per_token, read_size

CONFIG = LlamaConfig(
    vocab_size=100,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)


@pytest.mark.parametrize("tied", [False, True])
def test_flops_per_token_by_hand(tied: bool) -> None:
    config = LlamaConfig(**{**CONFIG.to_dict(), "tie_word_embeddings": tied})
    model = LlamaForCausalLM(config)
    multiplied = sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name)
    if tied:
        multiplied += model.lm_head.weight.numel()
    # Documents of 2 and 4 tokens: 4 + 16 over 6.
    assert flops_per_token(config, 6, 20) == pytest.approx(6 * multiplied + 6 * 3 * 32 * 20 / 6)


def test_heads_wider_than_the_model_count_with_their_own_width() -> None:
    config = LlamaConfig(**{**CONFIG.to_dict(), "head_dim": 16})
    more = flops_per_token(config, 10, 100) - flops_per_token(config, 10, 0)
    assert more == pytest.approx(6 * 3 * (4 * 16) * 10)


def test_matrix_products_that_torch_counts() -> None:
    """torch's own counter over forward and backward; it counts attention whole, not its causal half."""
    from torch.utils.flop_counter import FlopCounterMode

    model = LlamaForCausalLM._from_config(CONFIG, attn_implementation="eager")
    tokens = torch.randint(0, 100, (2, 8))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens).loss.backward()
    # 2 products, forward and twice backward, of 2 FLOPs, over each pair of positions and each of d columns.
    attention = 12 * 3 * 32 * 8
    norms = 7 * 32
    expected = flops_per_token(CONFIG, 1, 0) - 6 * norms + attention
    # The tolerance is for the rotary angles, which torch computes by a small matrix product.
    assert counter.get_total_flops() / tokens.numel() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("changes", [{}, {"head_dim": 16}, {"tie_word_embeddings": True, "mlp_bias": True}])
def test_sizes_of_a_file(changes: dict) -> None:
    config = LlamaConfig(**{**CONFIG.to_dict(), **changes})
    assert count_parameters(read_size(config.to_dict())) == count_parameters(config)
    few = {name: value for name, value in config.to_diff_dict().items() if value is not None}
    assert flops_per_token(read_size({**few, **changes}), 6, 20) == flops_per_token(config, 6, 20)


def test_a_size_that_is_missing() -> None:
    with pytest.raises(ValueError, match="hidden_size None: is not a whole number above 0"):
        read_size({"vocab_size": 10})

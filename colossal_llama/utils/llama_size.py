"""Parameters and FLOPs of a LLaMA, from the values of its configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, Protocol


class LlamaConfiguration(Protocol):
    """What is read of a `LlamaConfig`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool


def read_size(config: Mapping[str, Any]) -> LlamaConfiguration:
    """The sizes in the content of a `config.json`.

    Raises:
        ValueError: naming what is missing or no size.
    """
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    found: dict[str, Any] = {}
    for name in sizes:
        found[name] = config.get(name)
        if not isinstance(found[name], int) or found[name] < 1:
            raise ValueError(f"{name} {found[name]!r}: is not a whole number above 0")
    groups = config.get("num_key_value_heads") or found["num_attention_heads"]
    switches = ("attention_bias", "mlp_bias", "tie_word_embeddings")
    return SimpleNamespace(  # type: ignore[return-value]
        **found,
        num_key_value_heads=groups,
        head_dim=config.get("head_dim"),
        **{name: bool(config.get(name, False)) for name in switches},
    )


def head_size(config: LlamaConfiguration) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def projections(config: LlamaConfiguration) -> list[tuple[int, int, bool, bool]]:
    """(inputs, outputs, has a bias, tp shards the outputs rather than inputs) of a layer's linear layers."""
    width, mlp = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * head_size(config)
    keys = config.num_key_value_heads * head_size(config)
    attention_bias, mlp_bias = config.attention_bias, config.mlp_bias
    return [
        (width, queries, attention_bias, True),
        (width, keys, attention_bias, True),
        (width, keys, attention_bias, True),
        (queries, width, attention_bias, False),
        (width, mlp, mlp_bias, True),
        (width, mlp, mlp_bias, True),
        (mlp, width, mlp_bias, False),
    ]


def layer_parameters(config: LlamaConfiguration, tp: int) -> tuple[int, int]:
    """(all parameters, those of linear layers) of a decoder layer on one of `tp` processes."""
    linear = sum(
        inputs * outputs // tp + (outputs // (tp if by_outputs else 1) if has_bias else 0)
        for inputs, outputs, has_bias, by_outputs in projections(config)
    )
    return linear + 2 * config.hidden_size, linear


def count_parameters(config: LlamaConfiguration) -> int:
    """All parameters of a `LlamaForCausalLM`; a tied embedding is counted once."""
    return layer_parameters(config, 1)[0] * config.num_hidden_layers + config.hidden_size * (
        1 + config.vocab_size * (1 if config.tie_word_embeddings else 2)
    )


def matrix_parameters(config: LlamaConfiguration) -> int:
    """N - N_input_embedding: all parameters but the embedding; a tied head multiplies too and is counted."""
    embedding = config.vocab_size * config.hidden_size
    return count_parameters(config) - (0 if config.tie_word_embeddings else embedding)


def flops_per_token(
    config: LlamaConfiguration, document_lengths_sum: float, document_lengths_square_sum: float
) -> float:
    """Forward and backward pass, for each token: 6 (N - N_input_embedding) + 6 L d (sum len^2 / sum len).

    The input embedding is left out: a look-up multiplies nothing. A tied matrix is the head, and counts. d is
    heads x head size, L the number of layers. After Kaplan et al. 2020 (6 N) and Chowdhery et al. 2022
    (attention: 12 L d len there, of which a causal mask uses half).

    Args:
        document_lengths_sum: of real documents; whole rows where documents are not isolated.
    """
    mean_length = document_lengths_square_sum / document_lengths_sum
    width = config.num_attention_heads * head_size(config)
    return 6 * matrix_parameters(config) + 6 * config.num_hidden_layers * width * mean_length

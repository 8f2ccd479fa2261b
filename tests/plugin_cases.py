"""Plugins with settings from flags, and configurations of models, for tests that start no process group."""

from __future__ import annotations

from transformers import LlamaConfig

from colossal_llama.training.arguments import parse_settings
from colossal_llama.training.plugins import find_plugin
from colossal_llama.training.plugins.base import Plugin
from colossal_llama.training.settings import RunSettings

SEQUENCE_PARALLEL = "--tp 2 --enable_sequence_parallelism --sp_mode split_gather"
ULYSSES = "--sp 2 --enable_sequence_parallelism --sp_mode all_to_all"


def parse(flags: str = "") -> RunSettings:
    return parse_settings(["--pretrained", "some/model", "--benchmark", *flags.split()])


def plugin_of(flags: str, world_size: int = 8) -> Plugin:
    settings = parse(flags)
    return find_plugin(settings.layout.plugin)(settings, world_size)


def make_config(**changes: object) -> LlamaConfig:
    shape = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 8192,
    }
    return LlamaConfig(**{**shape, **changes})


def model_problems(flags: str, world_size: int, **changes: object) -> list[str]:
    """What keeps a plugin from training a model of this shape on so many processes."""
    return plugin_of(flags, world_size).model_conflicts(make_config(**changes))


LLAMA2_7B = LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    max_position_embeddings=4096,
)

"""Loads the model that is trained: configuration, tokenizer and weights, or random weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from colossal_llama.model.model_config import (
    GENERATION_CONFIG_FILE,
    find_context_length,
    find_model_file,
    load_model_config,
    outside_vocabulary,
)
from colossal_llama.model.weight_files import check_index
from colossal_llama.tokenizer.loading import load_pretrained_tokenizer
from colossal_llama.upstream.byte_order_marks import accept_byte_order_marks
from colossal_llama.upstream.padding_row import without_padding_row
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.messages import cap_problems, first_line

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase


def load_config(path: str, trust_remote_code: bool) -> LlamaConfig:
    """Reads the model's configuration; raises `UserError` when it is not a LLaMA."""
    where = f"--pretrained {path}"
    try:
        config = load_model_config(path, where, trust_remote_code)
    except UserError:
        raise
    except Exception as error:  # a damaged file can make any of them
        if not Path(path).exists():
            raise UserError(
                f"{where}: no such directory, and no model of the Hugging Face hub, as far as can "
                f"be seen from here ({first_line(error)})"
            ) from None
        raise UserError(f"{where}: cannot be read as a Hugging Face model ({first_line(error)})") from None
    if config.model_type != "llama":
        raise UserError(
            f"--pretrained {path}: is a {config.model_type} model; this suite trains llama models"
        )
    if config.attention_dropout:
        raise UserError(
            f"--pretrained {path}: its config.json has attention_dropout {config.attention_dropout}, which "
            "this suite does not apply; set it to 0.0 (no LLaMA was trained with it)"
        )
    return config


def find_too_long_rows(config: LlamaConfig, max_length: int) -> list[str]:
    """Rows that have more tokens than the model has positions."""
    positions = find_context_length(config)
    if max_length <= positions:
        return []
    return [
        f"--max_length {max_length}: the model has {positions} positions; give at most {positions}, or make "
        "its context longer with --rope_theta or --rope_scaling, and --max_position_embeddings"
    ]


def load_tokenizer(path: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    return load_pretrained_tokenizer(
        path,
        lambda error: (
            f"--pretrained {path}: its tokenizer cannot be read ({first_line(error)}); "
            "copy the tokenizer files into the model directory"
        ),
        trust_remote_code,
    )


def load_causal_lm(weights: str, flag: str, config: LlamaConfig, dtype: torch.dtype) -> LlamaForCausalLM:
    """Loads `weights` into a model of shape `config`.

    Args:
        weights: model directory or hub name; safetensors or `.bin`, sharded or not.
        flag: the argument that named it, for messages.

    Raises:
        UserError: files are missing or damaged, or tensors are missing or of another shape.
    """
    from transformers import LlamaForCausalLM

    accept_byte_order_marks()
    if Path(weights).is_dir():
        check_index(Path(weights), flag)
    try:
        with without_padding_row(config) as pad_token_id:
            model, info = LlamaForCausalLM.from_pretrained(
                weights,
                config=config,
                torch_dtype=dtype,
                attn_implementation="sdpa",
                output_loading_info=True,
            )
            _restore_padding(model, pad_token_id, find_model_file(weights, GENERATION_CONFIG_FILE) is None)
    except Exception as error:
        raise UserError(f"{flag} {weights}: the weights cannot be loaded ({first_line(error)})") from None
    problems = [f"{flag} {weights}: tensor {name} is missing" for name in sorted(info["missing_keys"])]
    problems += [f"{flag} {weights}: tensor {name[0]} has another shape" for name in info["mismatched_keys"]]
    if problems:
        raise UserError(cap_problems(problems, "such tensors"))
    return model


def random_causal_lm(config: LlamaConfig, dtype: torch.dtype, seed: int) -> LlamaForCausalLM:
    """A model with random weights, the same on every rank, for benchmarks of a shape without weights."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    config.torch_dtype = dtype
    with without_padding_row(config) as pad_token_id:
        model = LlamaForCausalLM._from_config(config, torch_dtype=dtype, attn_implementation="sdpa")
        return _restore_padding(model, pad_token_id, True)


def _restore_padding(
    model: LlamaForCausalLM, pad_token_id: int | None, generation_of_config: bool
) -> LlamaForCausalLM:
    """Writes back what `without_padding_row` hid, so that what is saved holds it as before.

    Args:
        generation_of_config: the model's generation configuration was derived from its configuration.
    """
    from transformers import GenerationConfig

    config = model.config
    config.pad_token_id = pad_token_id
    if generation_of_config and not outside_vocabulary(pad_token_id, config.vocab_size):
        model.generation_config = GenerationConfig.from_model_config(config)
    if outside_vocabulary(model.generation_config.pad_token_id, config.vocab_size):
        model.generation_config.pad_token_id = None  # with -1, transformers refuses to save it
    return model


def is_weights_directory(path: Path) -> bool:
    """Whether a directory holds model weights in one of the forms that `from_pretrained` reads."""
    return (
        any(path.glob("*.safetensors"))
        or any(path.glob("*.safetensors.index.json"))
        or any(path.glob("*.bin*"))
    )

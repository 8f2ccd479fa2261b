"""Loads a model and its tokenizer from the hub or a directory, with what suits the machine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import find_adapter_config_file

from colossal_llama.inference.settings import ModelSettings, model_name
from colossal_llama.model.dtypes import flag_name, torch_dtype
from colossal_llama.model.model_config import (
    GENERATION_CONFIG_FILE,
    find_context_length,
    load_model_config,
    outside_vocabulary,
)
from colossal_llama.model.weight_files import check_index
from colossal_llama.tokenizer.loading import load_pretrained_tokenizer
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.files import read_json_object
from colossal_llama.utils.messages import join_names, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HALF_DTYPES = (torch.bfloat16, torch.float16)
# What fp32 weights may take of the memory that is free; the rest is for the cache and activations.
MEMORY_SHARE = 0.8
MAX_NAMED_TENSORS = 5
MAX_REASON_LENGTH = 400


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode on its device. `context_length` is in tokens, prompt and answer together."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    context_length: int

    def describe(self) -> str:
        dtype = flag_name(self.model.dtype) or self.model.dtype
        return f"{self.model.num_parameters():,} parameters, {dtype}, {self.model.device}"


def resolve_device(name: str) -> torch.device:
    """The device of `--device`; `UserError` when this machine does not have it."""
    if name == "auto":
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        found = torch.cuda.device_count()
        if found == 0:
            raise UserError(f"--device {name}: torch finds no GPU here; use --device cpu or auto")
        if (device.index or 0) >= found:
            raise UserError(f"--device {name}: this machine has {found} GPUs, cuda:0 to cuda:{found - 1}")
    return device


def choose_dtype(
    name: str, device: torch.device, stored: torch.dtype | None, num_parameters: int
) -> torch.dtype:
    """The dtype of `--dtype`; for "auto", what is exact and fits.

    Args:
        stored: dtype of the weights on disk, where the configuration states it.
    """
    if name != "auto":
        return torch_dtype(name)
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
        if stored in HALF_DTYPES and (has_bf16 or stored == torch.float16):
            return stored
        return torch.bfloat16 if has_bf16 else torch.float16
    fits = 4 * num_parameters < MEMORY_SHARE * psutil.virtual_memory().available
    return torch.float32 if fits else torch.bfloat16


def load_model(settings: ModelSettings) -> LoadedModel:
    """The model of `--model_path`; a LoRA adapter is merged into the base model that it names.

    Raises:
        UserError: the device is not there, or something can't be loaded, or not completely.
    """
    name, trust_remote_code = settings.model_path, settings.trust_remote_code
    device = resolve_device(settings.device)
    with loading_errors(f"--model_path {name}", name):
        adapter_config = find_adapter_config_file(name)
    base = name if adapter_config is None else _find_base_model(name, Path(adapter_config))
    where = f"--model_path {name}" + ("" if adapter_config is None else f": base model {base}")
    with loading_errors(where, base):
        config = load_model_config(base, where, trust_remote_code)
        if Path(base).is_dir():
            check_index(Path(base), where)
        # torch refuses to build an embedding with one.
        if outside_vocabulary(config.pad_token_id, getattr(config, "vocab_size", None)):
            config.pad_token_id = None
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        dtype = choose_dtype(settings.dtype, device, config.torch_dtype, empty.num_parameters())
        model, report = AutoModelForCausalLM.from_pretrained(
            base,
            config=config,
            torch_dtype=dtype,
            trust_remote_code=trust_remote_code,
            low_cpu_mem_usage=True,
            output_loading_info=True,
        )
    _refuse_incomplete(where, report["missing_keys"])
    if adapter_config is not None:
        model = _merge_adapter(model, name)
        _add_adapter_ends(model, Path(adapter_config).parent)
    with loading_errors(f"--device {settings.device}: {name}"):
        model.to(device)
    tokenizer = load_tokenizer(settings.tokenizer_path, name, base, trust_remote_code)
    return LoadedModel(model.eval(), tokenizer, find_context_length(model.config))


def load_tokenizer(
    given: str | None, model: str, base: str, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    """The tokenizer of `--tokenizer_path`, else the model's; an adapter may leave it to its base model."""
    flag, name = "--tokenizer_path", given
    if given is None:
        flag = "--model_path"
        has_own = not Path(model).is_dir() or (Path(model) / "tokenizer_config.json").is_file()
        name = model if has_own else base
    remedy = "" if given else "; name one with --tokenizer_path"
    return load_pretrained_tokenizer(
        name,
        lambda error: (
            f"{flag} {name}: no tokenizer can be loaded: {one_line(error, MAX_REASON_LENGTH)}{remedy}"
        ),
        trust_remote_code=trust_remote_code,
    )


@contextlib.contextmanager
def loading_errors(where: str, source: str | None = None) -> Iterator[None]:
    """Files that are missing, damaged or of another kind, and a hub out of reach, are the user's to fix.

    Args:
        where: how a message begins.
        source: the directory or hub name that is read.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(f"{where}: the GPU's memory is full; use --dtype bf16, or --device cpu") from None
    except UserError:
        raise
    except Exception as error:  # a damaged file can make any of them
        what = "can't be loaded"
        if source is not None and not Path(source).exists():
            what = "no such directory here, and it can't be had from the Hugging Face hub"
        raise UserError(f"{where}: {what}: {one_line(error, MAX_REASON_LENGTH)}") from None


def _refuse_incomplete(where: str, missing: list[str]) -> None:
    """Weights that are not in the files would be random, and the answers noise."""
    if missing:
        named = join_names(sorted(missing), MAX_NAMED_TENSORS)
        raise UserError(f"{where}: weights are missing from its files: {named}")


def _find_base_model(adapter: str, config_file: Path) -> str:
    """The base model that an adapter names; `UserError` when it is a directory that is not there."""
    try:
        values = read_json_object(config_file)
        base = values["base_model_name_or_path"]
        return model_name(base)
    except UserError as error:
        raise UserError(f"--model_path {adapter}: {error}; copy the adapter again") from None
    except (KeyError, TypeError):
        problem = "names no base model"
    except ValueError as error:
        problem = f"base model {base}: {error}"
    raise UserError(f"--model_path {adapter}: {config_file}: {problem}; set base_model_name_or_path in it")


def _add_adapter_ends(model: Any, directory: Path) -> None:
    """An adapter that was trained on conversations says what ends an answer; its base model can't know."""
    if (directory / GENERATION_CONFIG_FILE).is_file():
        with loading_errors(f"--model_path {directory}"):
            ends = GenerationConfig.from_pretrained(directory).eos_token_id
        if ends is not None:
            model.generation_config.eos_token_id = ends


def _merge_adapter(model: PreTrainedModel, adapter: str) -> Any:
    from peft import PeftConfig, get_peft_model

    with loading_errors(f"--model_path {adapter}", adapter):
        adapted = get_peft_model(model, PeftConfig.from_pretrained(adapter))
        # peft prefers a GPU of its own choice.
        report = adapted.load_adapter(adapter, "default", torch_device="cpu")
        _refuse_incomplete(f"--model_path {adapter}", [key for key in report.missing_keys if "lora_" in key])
        if report.unexpected_keys:
            names = ", ".join(sorted(report.unexpected_keys)[:MAX_NAMED_TENSORS])
            raise UserError(f"--model_path {adapter}: its base model has no place for {names}")
        return adapted.merge_and_unload()

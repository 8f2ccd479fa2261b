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
from colossal_llama.model.model_config import GENERATION_CONFIG_FILE, load_model_config, outside_vocabulary
from colossal_llama.model.weight_files import check_index
from colossal_llama.tokenizer.loading import load_pretrained_tokenizer
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.files import read_json_object
from colossal_llama.utils.messages import join_names, one_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

HALF_DTYPES = (torch.bfloat16, torch.float16)
# What fp32 weights may take of the memory that is free; the rest is for the cache and activations.
MEMORY_SHARE = 0.8
# These kinds of rotary scaling stretch the positions by their factor; the others state the full length.
STRETCHED_ROPE_TYPES = ("linear", "dynamic")
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
    """The dtype of `--dtype`; for "auto", what is exact and fits; for "source", as the weights are stored.

    Args:
        stored: dtype of the weights on disk, where the configuration states it.
    """
    if name == "source":
        return stored or torch.float32
    if name != "auto":
        return torch_dtype(name)
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
        if stored in HALF_DTYPES and (has_bf16 or stored == torch.float16):
            return stored
        return torch.bfloat16 if has_bf16 else torch.float16
    fits = 4 * num_parameters < MEMORY_SHARE * psutil.virtual_memory().available
    return torch.float32 if fits else torch.bfloat16


def find_context_length(config: PretrainedConfig) -> int:
    """Positions that the model's rotary embedding covers."""
    scaling = getattr(config, "rope_scaling", None)
    if not isinstance(scaling, dict):
        return int(config.max_position_embeddings)
    rope_type = scaling.get("rope_type", scaling.get("type"))
    factor = scaling.get("factor", 1.0) if rope_type in STRETCHED_ROPE_TYPES else 1.0
    return int(config.max_position_embeddings * factor)


def load_model(settings: ModelSettings, flag: str = "--model_path") -> LoadedModel:
    """The model of `--model_path`; a LoRA adapter is merged into the base model that it names.

    Args:
        flag: the argument that named it, for messages.

    Raises:
        UserError: the device is not there, or something can't be loaded, or not completely.
    """
    name, trust_remote_code = settings.model_path, settings.trust_remote_code
    device = resolve_device(settings.device)
    base, adapter_config = find_base(name, flag)
    where = f"{flag} {name}" + ("" if adapter_config is None else f": base model {base}")
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
        model = _merge_adapter(model, name, flag)
        _add_adapter_ends(model, adapter_config.parent, flag)
    with loading_errors(f"--device {settings.device}: {name}"):
        model.to(device)
    tokenizer = load_tokenizer(settings.tokenizer_path, name, base, trust_remote_code, flag)
    return LoadedModel(model.eval(), tokenizer, find_context_length(model.config))


def find_base(name: str, flag: str = "--model_path") -> tuple[str, Path | None]:
    """Whose weights a model has: its own, or of a LoRA adapter its base model's, with the adapter's
    configuration file.

    Raises:
        UserError: the adapter names no base model that is there.
    """
    with loading_errors(f"{flag} {name}", name):
        adapter_config = find_adapter_config_file(name)
    if adapter_config is None:
        return name, None
    return _find_base_model(name, Path(adapter_config), flag), Path(adapter_config)


def load_tokenizer(
    given: str | None, model: str, base: str, trust_remote_code: bool, flag: str = "--model_path"
) -> PreTrainedTokenizerBase:
    """The tokenizer of `--tokenizer_path`, else the model's; an adapter may leave it to its base model."""
    model_flag, flag, name = flag, "--tokenizer_path", given
    if given is None:
        flag = model_flag
        has_own = not Path(model).is_dir() or (Path(model) / "tokenizer_config.json").is_file()
        name = model if has_own else base
    remedy = "; name one with --tokenizer_path"
    if given or flag != "--model_path":
        remedy = ""
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


def _find_base_model(adapter: str, config_file: Path, flag: str) -> str:
    """The base model that an adapter names; `UserError` when it is a directory that is not there."""
    try:
        values = read_json_object(config_file)
        base = values["base_model_name_or_path"]
        return model_name(base)
    except UserError as error:
        raise UserError(f"{flag} {adapter}: {error}; copy the adapter again") from None
    except (KeyError, TypeError):
        problem = "names no base model"
    except ValueError as error:
        problem = f"base model {base}: {error}"
    raise UserError(f"{flag} {adapter}: {config_file}: {problem}; set base_model_name_or_path in it")


def _add_adapter_ends(model: Any, directory: Path, flag: str) -> None:
    """An adapter that was trained on conversations says what ends an answer; its base model can't know."""
    if (directory / GENERATION_CONFIG_FILE).is_file():
        with loading_errors(f"{flag} {directory}"):
            ends = GenerationConfig.from_pretrained(directory).eos_token_id
        if ends is not None:
            model.generation_config.eos_token_id = ends


def _merge_adapter(model: PreTrainedModel, adapter: str, flag: str) -> Any:
    from peft import PeftConfig, get_peft_model

    with loading_errors(f"{flag} {adapter}", adapter):
        adapted = get_peft_model(model, PeftConfig.from_pretrained(adapter))
        # peft prefers a GPU of its own choice.
        report = adapted.load_adapter(adapter, "default", torch_device="cpu")
        _refuse_incomplete(f"{flag} {adapter}", [key for key in report.missing_keys if "lora_" in key])
        if report.unexpected_keys:
            names = ", ".join(sorted(report.unexpected_keys)[:MAX_NAMED_TENSORS])
            raise UserError(f"{flag} {adapter}: its base model has no place for {names}")
        return adapted.merge_and_unload()

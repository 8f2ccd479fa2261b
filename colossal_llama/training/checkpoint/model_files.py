"""What a save writes beside the weights: made once before the first step, loaded again and compared.

A run that trains for a week must not find out at its first save that transformers refuses to write what it
has read. So every small file of `modeling/` is made here, and a save only adds the bytes to its plan.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama.conversation.carried import CarriedTemplate
from colossal_llama.model.model_config import CONFIG_FILE, GENERATION_CONFIG_FILE
from colossal_llama.tokenizer.fingerprint import tokenizer_fingerprint
from colossal_llama.tokenizer.loading import load_pretrained_tokenizer
from colossal_llama.tokenizer.tokenizer_files import (
    REPORT_FILE,
    read_tokenizer_contents,
    with_chat_template,
)
from colossal_llama.training.checkpoint.generation_files import (
    add_end_token_ids,
    load_generation_config,
)
from colossal_llama.upstream.newer_model_config import adopt_earlier_names
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.messages import first_line

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

# What a loaded configuration knows of its own loading.
_LOADING_FACTS = ("_name_or_path", "_commit_hash", "_attn_implementation_autoset", "transformers_version")
_SAMPLE = "It is 12 o'clock.\n人工智能 and  <s> more"


@dataclass(frozen=True)
class ModelFiles:
    """Small files of `modeling/`, name -> bytes.

    Attributes:
        beside_weights: with a whole model.
        beside_adapter: with LoRA adapters, which bring a configuration of their own.
        notes: what was changed of the source's, a sentence each.
    """

    beside_weights: dict[str, bytes]
    beside_adapter: dict[str, bytes]
    notes: list[str]


def prepare_model_files(
    pretrained: str,
    weights: str,
    flag: str,
    config: PretrainedConfig,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase,
    answer_ends: Sequence[int] | None = None,
    template: CarriedTemplate | None = None,
    lora_rank: int = 0,
    trust_remote_code: bool = False,
) -> ModelFiles:
    """Makes the files in a temporary directory, loads them from there and compares.

    Args:
        pretrained: directory or hub name that the tokenizer was loaded from.
        weights: where the weights come from, whose generation configuration is kept.
        flag: the argument that named `weights`, for messages.
        dtype: of the saved weights.
        answer_ends: tokens that end an answer in the data; None where it is for pre-training.
        template: of the data, for the tokenizer's configuration; None: the source's chat template stays.

    Raises:
        UserError: a file can't be saved, or would load as something else; it is named.
    """
    where = f"{flag} {weights}"
    generation_config, notes = load_generation_config(find_model_directory(weights), config, where)
    if answer_ends is not None:
        add_end_token_ids(generation_config, answer_ends, config.eos_token_id)
    saved_config = copy.deepcopy(config)
    saved_config.torch_dtype = dtype
    saved_config.architectures = ["LlamaForCausalLM"]
    saved_config.use_cache = True
    # Where it is stated, transformers does not choose the attention by itself, and takes the slow one.
    vars(saved_config).pop("_attn_implementation_autoset", None)
    tokenizer_files = _read_tokenizer(pretrained)
    if template is not None and template.text is not None:
        tokenizer_files = with_chat_template(tokenizer_files, template.text)
    with tempfile.TemporaryDirectory(prefix="colossal-llama-") as temporary:
        # The name that remote code gets in transformers' cache of modules.
        directory = Path(temporary) / "modeling"
        directory.mkdir()
        model = _rehearse(saved_config, CONFIG_FILE, directory, where)
        model |= _rehearse(generation_config, GENERATION_CONFIG_FILE, directory, where)
        for name, content in tokenizer_files.items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(content)
        _check_tokenizer(tokenizer, directory, f"--pretrained {pretrained}", trust_remote_code, template)
        if lora_rank:
            _rehearse_adapter_config(lora_rank, Path(temporary) / "adapter")
    beside_adapter = dict(tokenizer_files)
    if answer_ends is not None:
        beside_adapter[GENERATION_CONFIG_FILE] = model[GENERATION_CONFIG_FILE]
    return ModelFiles({**model, **tokenizer_files}, beside_adapter, notes)


def find_model_directory(name: str) -> Path:
    """The directory of a model: `name` itself, or what the hub's cache holds of it.

    Raises:
        UserError: neither is there.
    """
    if Path(name).is_dir():
        return Path(name)
    from transformers.utils import cached_file

    found = {}
    try:
        # The last two may be missing, and are in the cache only once they were asked for.
        for file in (CONFIG_FILE, GENERATION_CONFIG_FILE, REPORT_FILE):
            found[file] = cached_file(
                name,
                file,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: not a directory, and not on the hub ({first_line(error)})") from None
    if found[CONFIG_FILE] is None:
        raise UserError(f"{name}: no {CONFIG_FILE} here or in the cache of the hub")
    return Path(found[CONFIG_FILE]).parent


def _read_tokenizer(pretrained: str) -> dict[str, bytes]:
    return read_tokenizer_contents(find_model_directory(pretrained))


def _rehearse(
    config: PretrainedConfig | GenerationConfig, name: str, directory: Path, where: str
) -> dict[str, bytes]:
    """Saves a configuration, loads it and compares; returns the file, name -> bytes."""
    origin = f"{where}: {name}"
    try:
        config.save_pretrained(directory)
        loaded = type(config).from_pretrained(directory)
        if name == CONFIG_FILE:
            loaded = adopt_earlier_names(loaded)
    except Exception as error:  # values of the wrong type fail in any way
        raise UserError(
            f"{origin} can be loaded, but not saved and loaded again ({first_line(error)}); correct it"
        ) from None
    _refuse_differences(config.to_dict(), loaded.to_dict(), origin)
    return {name: (directory / name).read_bytes()}


def _rehearse_adapter_config(rank: int, directory: Path) -> None:
    from peft import LoraConfig

    from colossal_llama.training.llama.adapters import lora_config

    config = lora_config(rank)
    config.save_pretrained(str(directory))
    _refuse_differences(
        config.to_dict(), LoraConfig.from_pretrained(str(directory)).to_dict(), "adapter_config.json"
    )


def _check_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    where: str,
    trust_remote_code: bool,
    template: CarriedTemplate | None = None,
) -> None:
    """That the copied files are the tokenizer that the run works with, and the template is the data's."""
    names = ", ".join(sorted(path.name for path in directory.iterdir() if "token" in path.name))
    copied = load_pretrained_tokenizer(
        directory,
        lambda error: (
            f"{where}: its tokenizer can't be loaded from copies of its files ({names}): {first_line(error)}"
        ),
        trust_remote_code,
    )
    same = tokenizer_fingerprint(copied) == tokenizer_fingerprint(tokenizer)
    if not same or copied(_SAMPLE)["input_ids"] != tokenizer(_SAMPLE)["input_ids"]:
        raise UserError(
            f"{where}: copies of its tokenizer's files ({names}) are another tokenizer than it is itself; "
            "bring all of the tokenizer's files into this directory"
        )
    if template is None or template.text is None:
        return
    if copied.chat_template != template.text:
        raise UserError(f"{where}: its tokenizer can't be given the chat template of the data")
    if not template.fits(copied):
        raise UserError(
            f"{where}: its tokenizer splits conversations otherwise than the one that prepared the data; "
            "prepare the data with --tokenizer_dir set to the model's directory"
        )


def _refuse_differences(before: dict[str, Any], after: dict[str, Any], origin: str) -> None:
    changed = [
        name
        for name in sorted(before.keys() | after.keys())
        if name not in _LOADING_FACTS and _as_json(before.get(name)) != _as_json(after.get(name))
    ]
    if changed:
        values = ", ".join(
            f"{name} {before.get(name)!r} comes back as {after.get(name)!r}" for name in changed
        )
        raise UserError(f"{origin} is not the same once it is saved and loaded again: {values}; correct it")


def _as_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=sorted if isinstance(value, set) else str)

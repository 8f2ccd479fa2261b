"""`modeling/` of a checkpoint: what `from_pretrained` reads, with the weights of the training model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from colossal_llama.model.weight_files import SAFETENSORS_INDEX, SAFETENSORS_SINGLE
from colossal_llama.training.checkpoint.files import FileJobs, Manifest, list_files
from colossal_llama.training.llama.adapters import is_embedding
from colossal_llama.utils.files import write_json

if TYPE_CHECKING:
    from transformers import LlamaConfig

    from colossal_llama.training.checkpoint.model_files import ModelFiles
    from colossal_llama.training.plugins.base import Plugin

MODELING_DIRECTORY = "modeling"
ADAPTER_DIRECTORY = "adapter"
# Weight files are cut so that all processes that hold the same weights write a share, between these sizes.
MAX_FILE_BYTES = 5 * 1024**3
MIN_FILE_BYTES = 512 * 1024**2


def add_modeling(
    plan: FileJobs,
    plugin: Plugin,
    files: ModelFiles | None,
    is_main: bool,
    subdirectory: str = "",
) -> None:
    """Adds a complete Hugging Face model directory; every rank must call it.

    Args:
        files: everything beside the weights; the main process needs them.
        subdirectory: below the plan's directory; "" for that directory itself.
    """
    prefix = f"{subdirectory}/" if subdirectory else ""
    is_adapter = False
    if plugin.settings.adaptation.lora_rank:
        is_adapter = not plugin.settings.adaptation.merge_lora
        if is_main and is_adapter:
            _add_adapter(plan, plugin, subdirectory)
        elif is_main:
            _add_merged(plan, plugin, prefix)
    else:
        _add_weights(plan, plugin, prefix)
    if is_main:
        assert files is not None
        add_small_files(plan, files.beside_adapter if is_adapter else files.beside_weights, prefix)


def add_small_files(plan: FileJobs, contents: Mapping[str, bytes], prefix: str) -> None:
    """Adds what `prepare_model_files` made."""
    for name, content in contents.items():
        plan.add_bytes(prefix + name, content)


def _add_adapter(plan: FileJobs, plugin: Plugin, subdirectory: str) -> None:
    """What trains: the adapters and, with `--lora_embeddings train`, the embeddings under their own names,
    which peft loads into its base model.
    """
    peft_model, config = plugin.peft_model, plugin.causal_lm.config
    has_embeddings = plugin.settings.adaptation.trains_embeddings_beside_lora
    # Not of `state_dict`: colossalai's fails on a padded vocabulary.
    held = {
        name: plan.hold(_unpad(name, parameter, config))
        for name, parameter in peft_model.named_parameters()
        if "lora_" in name or (has_embeddings and is_embedding(name))
    }

    def save(directory: Path) -> None:
        # Told whether embeddings are among them, peft need not look at the base model's files, or at the hub.
        peft_model.save_pretrained(directory, state_dict=held, save_embedding_layers=has_embeddings)

    plan.add_library_files(subdirectory, save)


def _add_merged(plan: FileJobs, plugin: Plugin, prefix: str) -> None:
    """The model with the adapters added to its weights, and the adapters themselves beside it."""
    from peft.tuners.lora import LoraLayer

    merged = {}
    for name, module in plugin.causal_lm.named_modules():
        if isinstance(module, LoraLayer):
            weight = module.get_base_layer().weight
            delta = module.get_delta_weight("default")
            merged[f"{name}.weight"] = (weight.float() + delta.float()).to(weight.dtype)
    weights = {}
    config = plugin.causal_lm.config
    for name, parameter in plugin.causal_lm.named_parameters():
        if ".lora_" in name:
            continue
        name = name.replace(".base_layer", "")
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weights[name] = merged[name].cpu() if name in merged else plan.hold(_unpad(name, parameter, config))
    _add_weight_file(plan, f"{prefix}model-00001-00001.safetensors", weights)
    if prefix:
        _add_adapter(plan, plugin, ADAPTER_DIRECTORY)


def _add_weights(plan: FileJobs, plugin: Plugin, prefix: str) -> None:
    """Each pipeline stage's weights, shared out over the processes that hold the same ones.

    Sharded tensors are gathered one at a time over the tensor-parallel group; rows that pad the vocabulary
    are cut off. colossalai's own `save_model` fails on padded embeddings without tensor parallelism.
    """
    config, place = plugin.causal_lm.config, plugin.shard_coordinates()
    parameters = {
        name: parameter
        for name, parameter in plugin.causal_lm.named_parameters()
        if not (config.tie_word_embeddings and name.startswith("lm_head"))
    }
    sizes = [parameter.nbytes for parameter in parameters.values()]
    files = cut_into_files(sizes, place.num_replicas)
    names = list(parameters)
    failure: Exception | None = None
    for number, indexes in enumerate(files):
        is_ours = number % place.num_replicas == place.replica
        if not is_ours and not plugin.spreads_weights:
            continue
        held = {}
        chosen = [names[index] for index in indexes]
        for name, tensor in zip(chosen, plugin.gather_weights([parameters[n] for n in chosen]), strict=True):
            if not is_ours or place.tensor_rank or failure is not None:
                continue
            try:
                held[name] = plan.hold(_unpad(name, tensor, config))
            except Exception as error:  # the other ranks wait for this one in the next gathering
                failure = error
        if held:
            file = f"{prefix}model-{place.pipeline_rank + 1:05d}-{number + 1:05d}.safetensors"
            _add_weight_file(plan, file, held)
    if failure is not None:
        raise failure


def _unpad(name: str, tensor: torch.Tensor, config: LlamaConfig) -> torch.Tensor:
    """Without the rows that pad the vocabulary."""
    return tensor[: config.vocab_size] if is_embedding(name) else tensor


def _add_weight_file(plan: FileJobs, file: str, tensors: dict[str, torch.Tensor]) -> None:
    plan.location.update({name: (Path(file).name, tensor.nbytes) for name, tensor in tensors.items()})
    plan.add_tensors(file, tensors, {})


def cut_into_files(sizes: Sequence[int], num_writers: int) -> list[list[int]]:
    """Cuts consecutive tensors of `sizes` bytes into files, so that `num_writers` share the work."""
    limit = min(MAX_FILE_BYTES, max(MIN_FILE_BYTES, sum(sizes) / num_writers))
    files: list[list[int]] = []
    room = 0.0
    for index, size in enumerate(sizes):
        if not files or size > room:
            files.append([])
            room = limit
        files[-1].append(index)
        room -= size
    return files


def name_weight_files(directory: Path, prefix: str, location: dict[str, tuple[str, int]]) -> Manifest:
    """Gives the weight files of all processes their usual names and writes the index over them.

    Args:
        directory: of the checkpoint; the weights are in `prefix` below it.
        location: weight name -> (file, bytes).

    Returns:
        The index, where there is one. Files in a listing have to be renamed by `hf_shard_names`.
    """
    renamed = hf_shard_names(location)
    for old, new in renamed.items():
        (directory / prefix / old).rename(directory / prefix / new)
    if len(renamed) < 2:
        return {}
    index = directory / prefix / SAFETENSORS_INDEX
    write_json(
        index,
        {
            "metadata": {"total_size": sum(size for _, size in location.values())},
            "weight_map": {name: renamed[file] for name, (file, _) in sorted(location.items())},
        },
    )
    return list_files(directory, [index])


def hf_shard_names(location: dict[str, tuple[str, int]]) -> dict[str, str]:
    """File name -> the name that transformers has for the n-th of so many weight files."""
    files = sorted({file for file, _ in location.values()})
    if len(files) == 1:
        return {files[0]: SAFETENSORS_SINGLE}
    return {
        file: f"model-{number:05d}-of-{len(files):05d}.safetensors" for number, file in enumerate(files, 1)
    }

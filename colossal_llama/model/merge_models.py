"""Merges models into their weighted mean: of one vocabulary, or of a base and models of one extension of it.

An old row of the embeddings is the mean over all models, a new one over those that have it. The mean of a
base and a model that was trained further forgets less than the trained one, and learned less. Tokenizer and
settings are those of the last model with the largest vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colossal_llama.model.model_config import CONFIG_FILE
from colossal_llama.model.model_output import (
    copy_generation_config,
    find_foreign_files,
    refuse_full_disk,
    refuse_other_weights,
    weight_names,
)
from colossal_llama.utils.arguments import ArgumentParser, directory_list, number
from colossal_llama.utils.console import format_table, log, progress_bar
from colossal_llama.utils.errors import UserError, run_command
from colossal_llama.utils.output_checks import why_not_output_directory
from colossal_llama.utils.settings import add_settings, flag, parse_settings

# Says what was merged, and that the model in the directory is this script's.
MERGE_FILE = "model_merge.json"


def _weight_list(text: str) -> list[float]:
    convert = number(float, above=0)
    return [convert(part) for part in text.split(",")]


@dataclass(frozen=True)
class MergeSettings:
    """The models that are merged, and where their mean goes."""

    models: list[Path] = flag(
        None,
        "comma list of model directories in Hugging Face format, each with its tokenizer; the base first",
        type=directory_list,
        required=True,
    )
    weights: list[float] | None = flag(
        None,
        "comma list of a positive number for each model; only their ratios count (default: all equal)",
        type=_weight_list,
    )
    output_dir: Path = flag(
        None, "where the merged model goes; none of the --models", type=Path, required=True
    )
    dtype: str = flag(
        "source",
        "dtype of the weights written; source keeps every tensor's own, the same in all models",
        choices=("source", "bf16", "fp16", "fp32"),
    )
    overwrite: bool = flag(
        False,
        "replace a model or tokenizer in the output directory that this script did not make; what it made "
        "itself is replaced in any case",
    )


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="merge_models.py", description=__doc__)
    add_settings(parser, MergeSettings, check=_find_conflicts)
    return parser


def _find_conflicts(settings: MergeSettings) -> list[str]:
    target, models = settings.output_dir, settings.models
    problems = []
    if len(models) < 2:
        problems.append(f"--models {models[0]}: one model alone; give two or more, separated by commas")
    if settings.weights is not None and len(settings.weights) != len(models):
        problems.append(
            f"--weights: {len(settings.weights)} numbers for {len(models)} --models; give one for each"
        )
    for model in models:
        if (model / CONFIG_FILE).exists():
            continue
        if (model / "adapter_config.json").exists():
            problems.append(f"--models {model}: is an adapter; merge it into its base first (--merge_lora)")
        else:
            inside = model / "modeling"
            remedy = f"give {inside}" if inside.is_dir() else "give the directory of a model"
            problems.append(f"--models {model}: no {CONFIG_FILE} in it; {remedy}")
    if reason := why_not_output_directory(target):
        problems.append(f"--output_dir {target}: {reason}")
    elif any(target.exists() and target.samefile(model) for model in models):
        problems.append(f"--output_dir {target}: is one of the --models, which are never changed")
    elif not settings.overwrite and (foreign := find_foreign_files(target, MERGE_FILE)):
        problems.append(
            f"--output_dir {target}: holds files that this script did not make "
            f"({', '.join(foreign[:5])}); choose another directory, or --overwrite"
        )
    return problems


def main() -> None:
    settings = parse_settings(build_parser(), MergeSettings)

    from colossal_llama.model.dtypes import FLOAT_FLAGS
    from colossal_llama.model.merging import (
        Merger,
        find_differences,
        find_other_dtypes,
        find_widest,
        open_model,
    )

    given = settings.weights or [1.0] * len(settings.models)
    models = [
        open_model(directory, weight / sum(given))
        for directory, weight in zip(settings.models, given, strict=True)
    ]
    widest = find_widest(models)
    problems = find_differences(models, widest)
    if not problems and settings.dtype == "source":
        problems = find_other_dtypes(models, widest)
    if problems:
        raise UserError(problems)
    with Merger(models, widest, FLOAT_FLAGS.get(settings.dtype)) as merger:
        write_model(settings, merger)
    summarise(settings, merger)


def write_model(settings: MergeSettings, merger: Any) -> None:
    """Writes how it is made, shards, tokenizer and generation config, index, and `config.json` last of all.

    Without `config.json` nothing loads the directory, so a killed run never looks finished.
    """
    from colossal_llama.model.model_extension import index_of
    from colossal_llama.model.weight_files import (
        SAFETENSORS_INDEX,
        SAFETENSORS_SINGLE,
        output_name,
        sum_bytes,
    )
    from colossal_llama.tokenizer.tokenizer_files import copy_tokenizer
    from colossal_llama.utils.files import sync_directory, write_json

    target, source = settings.output_dir, merger.widest.directory
    names = {path: output_name(path) for path in merger.widest.layout.shards if merger.tensors_of(path)}
    if len(names) == 1:
        names = dict.fromkeys(names, SAFETENSORS_SINGLE)
    total = sum(sum_bytes(merger.tensors_of(path)) for path in names)
    expected = {*names.values(), *([SAFETENSORS_INDEX] if len(names) > 1 else [])}
    refuse_other_weights(target, "--output_dir", expected)
    target.resolve().mkdir(parents=True, exist_ok=True)
    refuse_full_disk(target, "--output_dir", total)
    write_json(
        target / MERGE_FILE,
        {
            "models": [{"model": str(model.directory), "weight": model.weight} for model in merger.models],
            "dtype": settings.dtype,
        },
    )
    (target / CONFIG_FILE).unlink(missing_ok=True)
    written = {}
    try:
        with progress_bar(total=total, unit="B", unit_scale=True, desc="weights") as bar:
            for path, name in names.items():
                written[name] = merger.write_shard(path, target / name, bar.update)
    except BaseException:
        if not weight_names(target):
            (target / MERGE_FILE).unlink()
        raise
    copy_tokenizer(source, target)
    copy_generation_config(source, target)
    if len(names) > 1:
        write_json(target / SAFETENSORS_INDEX, index_of(written))
    sync_directory(target)
    write_json(target / CONFIG_FILE, _merged_config(settings, merger))


def _merged_config(settings: MergeSettings, merger: Any) -> dict[str, Any]:
    """The settings of the model that also gives the tokenizer, with the merged model's size and dtype."""
    from colossal_llama.model.dtypes import FLOAT_FLAGS, torch_name
    from colossal_llama.model.model_config import read_model_config

    source = merger.widest.directory
    config = {**read_model_config(source, f"--models {source}"), "vocab_size": merger.num_rows}
    dtype = FLOAT_FLAGS.get(settings.dtype)
    if dtype is not None:
        config["torch_dtype"] = torch_name(dtype)
        if "dtype" in config:
            config["dtype"] = torch_name(dtype)
    return config


def summarise(settings: MergeSettings, merger: Any) -> None:
    models: Sequence[Any] = merger.models
    log(
        format_table(
            ["model", "share", "tokens", "rows"],
            [(str(m.directory), f"{m.weight:.4f}", len(m.tokens), m.rows) for m in models],
        )
    )
    alone = sum(stop - start for start, stop, numbers in merger.row_groups if len(numbers) < len(models))
    log(f"{merger.num_rows:,} rows of embeddings, {alone:,} of them not from all models")
    log(f"Tokenizer and settings: {merger.widest.directory}")
    log(f"Model: {settings.output_dir}")


if __name__ == "__main__":
    run_command(main)

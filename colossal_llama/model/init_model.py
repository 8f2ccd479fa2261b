"""Extends a LLaMA's embeddings to an extended tokenizer: each new row is made from its sub-tokens' rows.

All other weights are copied unchanged. The target directory holds a complete model with its tokenizer and may
be the tokenizer's directory, never the source's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colossal_llama.model.initializations import DEFAULT_INITIALIZATION, INITIALIZATIONS
from colossal_llama.model.model_config import CONFIG_FILE
from colossal_llama.model.model_output import (
    CALIBRATION_FILE,
    copy_generation_config,
    find_foreign_files,
    refuse_full_disk,
    refuse_other_weights,
    weight_names,
)
from colossal_llama.utils.arguments import ArgumentParser, existing_directory, positive_int
from colossal_llama.utils.console import format_table, log, progress_bar
from colossal_llama.utils.errors import run_command
from colossal_llama.utils.output_checks import why_not_output_directory
from colossal_llama.utils.settings import add_settings, flag, parse_settings

# Says how the embeddings were made, and that the model in the directory is this script's. Training, which
# copies vocabulary_extension.json, leaves none.
INITIALIZATION_FILE = "model_initialization.json"


@dataclass(frozen=True)
class ModelSettings:
    """The model and the tokenizer that are read, and the model that is written."""

    source_model_and_tokenizer_path: Path = flag(
        None,
        "base model and its tokenizer in Hugging Face format (safetensors or .bin, sharded or not)",
        type=existing_directory,
        required=True,
    )
    target_tokenizer_path: Path = flag(
        None, "extended tokenizer, made by init_tokenizer.py", type=existing_directory, required=True
    )
    target_model_path: Path = flag(
        None,
        "where the extended model goes; may be the target tokenizer's directory, never the source",
        type=Path,
        required=True,
    )
    dtype: str = flag(
        "source",
        "dtype of the weights written; source keeps every tensor's own",
        choices=("source", "bf16", "fp16", "fp32"),
    )
    pad_to_multiple_of: int = flag(
        1,
        "round the number of embedding rows up to a multiple of this; 1 adds no padding",
        type=positive_int,
    )
    init_input: str = flag(
        DEFAULT_INITIALIZATION,
        "how new rows of the input embeddings are made from the rows of the piece's sub-tokens",
        choices=tuple(INITIALIZATIONS),
    )
    init_output: str = flag(
        DEFAULT_INITIALIZATION,
        "the same for the output head; where it differs from --init_input, tied embeddings are untied",
        choices=tuple(INITIALIZATIONS),
    )
    overwrite: bool = flag(
        False,
        "replace a model or tokenizer in the target directory that this script did not make; what it made "
        "itself is replaced in any case",
    )


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="init_model.py", description=__doc__)
    add_settings(parser, ModelSettings, check=_check_directories)
    return parser


def _check_directories(settings: ModelSettings) -> list[str]:
    source, target = settings.source_model_and_tokenizer_path, settings.target_model_path
    problems = []
    if not (source / CONFIG_FILE).exists():
        problems.append(f"--source_model_and_tokenizer_path {source}: no {CONFIG_FILE} in it")
    if reason := why_not_output_directory(target):
        problems.append(f"--target_model_path {target}: {reason}")
    elif target.exists() and target.samefile(source):
        problems.append(f"--target_model_path {target}: is the source directory; the source is never changed")
    elif not settings.overwrite and (
        foreign := find_foreign_files(target, INITIALIZATION_FILE, settings.target_tokenizer_path)
    ):
        problems.append(
            f"--target_model_path {target}: holds files that this script did not make "
            f"({', '.join(foreign[:5])}); choose another directory, or --overwrite"
        )
    return problems


def main() -> None:
    extend_model(parse_settings(build_parser(), ModelSettings))


def extend_model(settings: ModelSettings) -> None:
    """Writes the extended model, and reports its rows."""
    from colossal_llama.model.dtypes import FLOAT_FLAGS
    from colossal_llama.model.embedding_extension import plan_rows
    from colossal_llama.model.model_config import read_model_config
    from colossal_llama.model.model_extension import Extension, check_embeddings, read_layout
    from colossal_llama.model.weight_files import find_shards
    from colossal_llama.tokenizer.subtokens import encode_tokens, token_table
    from colossal_llama.tokenizer.tokenizer_files import read_tokenizer_files

    source = settings.source_model_and_tokenizer_path
    config = read_model_config(source, f"--source_model_and_tokenizer_path {source}")
    source_tokenizer = read_tokenizer_files(source, "--source_model_and_tokenizer_path")
    target_tokenizer = read_tokenizer_files(settings.target_tokenizer_path, "--target_tokenizer_path")
    layout = read_layout(find_shards(source, "--source_model_and_tokenizer_path"))
    tied = bool(config.get("tie_word_embeddings", False))
    rows, hidden = check_embeddings(layout, tied, source)
    plan = plan_rows(
        token_table(source_tokenizer),
        token_table(target_tokenizer),
        rows,
        settings.pad_to_multiple_of,
        lambda tokens: encode_tokens(source_tokenizer, tokens),
    )
    extension = Extension(
        plan,
        FLOAT_FLAGS.get(settings.dtype),
        settings.init_input,
        settings.init_output,
        untie=tied and settings.init_input != settings.init_output,
    )
    if extension.untie:
        log(
            f"--init_input {settings.init_input} and --init_output {settings.init_output} differ: the output "
            f"head, so far the input embeddings, becomes a matrix of its own; {plan.num_rows * hidden:,} "
            "parameters more to keep and to train"
        )
    write_model(settings, config, layout, extension)
    summarise(settings, rows, plan)


def write_model(settings: ModelSettings, config: dict[str, Any], layout: Any, extension: Any) -> None:
    """Writes how it is made, shards, tokenizer and generation config, index, and `config.json` last of all.

    Without `config.json` nothing loads the directory, so a killed run never looks finished.
    """
    from colossal_llama.model.dtypes import torch_name
    from colossal_llama.model.model_extension import index_of, write_shard
    from colossal_llama.model.weight_files import SAFETENSORS_INDEX
    from colossal_llama.upstream.newer_model_config import earlier_names
    from colossal_llama.utils.files import sync_directory, write_json

    target, plan, dtype = settings.target_model_path, extension.plan, extension.dtype
    names, total = check_target(target, layout, extension)
    write_json(
        target / INITIALIZATION_FILE,
        {
            "dtype": settings.dtype,
            "pad_to_multiple_of": settings.pad_to_multiple_of,
            **_ways(settings),
            **{f"{kind}_rows": plan.count(kind) for kind in ("kept", "new", "padding")},
            **({"calibrated_rows": len(extension.shift.rows)} if extension.shift is not None else {}),
        },
    )
    for stale in (CONFIG_FILE, CALIBRATION_FILE):
        (target / stale).unlink(missing_ok=True)

    written = {}
    try:
        with progress_bar(total=total, unit="B", unit_scale=True, desc="weights") as bar:
            for path, name in names.items():
                written[name] = write_shard(path, target / name, extension, bar.update)
    except BaseException:
        if not weight_names(target):
            (target / INITIALIZATION_FILE).unlink()
        raise
    _copy_small_files(settings)
    if len(names) > 1:
        write_json(target / SAFETENSORS_INDEX, index_of(written))
    pad_token_id = config.get("pad_token_id")
    if pad_token_id is not None and pad_token_id >= config.get("vocab_size", 0):
        config = {**config, "pad_token_id": None}  # none so far; a new row has that number now
    config = {**config, **earlier_names(config), "vocab_size": plan.num_rows}
    if extension.untie:
        config["tie_word_embeddings"] = False
    if dtype is not None:
        config["torch_dtype"] = torch_name(dtype)
        if "dtype" in config:
            config["dtype"] = torch_name(dtype)
    sync_directory(target)
    write_json(target / CONFIG_FILE, config)


def check_target(target: Path, layout: Any, extension: Any) -> tuple[dict[Path, str], int]:
    """The name of each shard's output, and the bytes of all; makes the directory.

    Raises:
        UserError: other weights lie in it, or the disk has no room.
    """
    from colossal_llama.model.weight_files import (
        SAFETENSORS_INDEX,
        SAFETENSORS_SINGLE,
        output_name,
        sum_bytes,
    )

    names = {path: output_name(path) for path in layout.shards}
    if len(names) == 1:  # also of an index of one shard: written without an index, no other name is found
        names = dict.fromkeys(names, SAFETENSORS_SINGLE)
    total = sum(sum_bytes(extension.targets(tensors.values())) for tensors in layout.shards.values())
    expected = {*names.values(), *([SAFETENSORS_INDEX] if len(names) > 1 else [])}
    refuse_other_weights(target, "--target_model_path", expected)
    target.resolve().mkdir(parents=True, exist_ok=True)
    refuse_full_disk(target, "--target_model_path", total)
    return names, total


def _ways(settings: ModelSettings) -> dict[str, str]:
    """How new rows are made, where it is not as by default."""
    ways = {"init_input": settings.init_input, "init_output": settings.init_output}
    return {} if set(ways.values()) == {DEFAULT_INITIALIZATION} else ways


def _copy_small_files(settings: ModelSettings) -> None:
    from colossal_llama.tokenizer.tokenizer_files import copy_tokenizer

    target = settings.target_model_path
    if not target.samefile(settings.target_tokenizer_path):
        copy_tokenizer(settings.target_tokenizer_path, target)
    copy_generation_config(settings.source_model_and_tokenizer_path, target)


def summarise(settings: ModelSettings, source_rows: int, plan: Any) -> None:
    lengths = [len(ids) for ids in plan.subtokens.values()]
    table = [
        ("source rows", source_rows),
        ("rows kept", plan.count("kept")),
        ("new rows", plan.count("new")),
        ("padding rows", plan.count("padding")),
        ("target rows", plan.num_rows),
        ("sub-tokens averaged", sum(lengths)),
    ]
    if lengths:
        table.append(("sub-tokens a new row, mean", sum(lengths) / len(lengths)))
        table.append(("sub-tokens a new row, most", max(lengths)))
    log(format_table(["embeddings", "count"], table))
    log("Checked: kept rows equal the source's, new rows are finite, and samples are right when made alone")
    log(f"Model: {settings.target_model_path}")


if __name__ == "__main__":
    run_command(main)

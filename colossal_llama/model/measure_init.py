"""Measures how each way to start new rows does before training: bits per byte of held-out text at step 0.

Every combination of `--init_input` and `--init_output`, plain and with calibrated output rows, and beside
them the base model with its own tokenizer. The model runs once over the text for each way to make input rows;
the output rows are tried on what it leaves. Writes initializations.md and .json; the best start of the first
set is marked, with the command that makes it.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colossal_llama.inference.settings import device_name
from colossal_llama.model.initializations import INITIALIZATIONS
from colossal_llama.model.model_config import CONFIG_FILE
from colossal_llama.utils.arguments import (
    ArgumentParser,
    directory_list,
    existing_directory,
    non_negative_int,
    positive_int,
)
from colossal_llama.utils.console import log
from colossal_llama.utils.errors import run_command
from colossal_llama.utils.output_checks import why_not_output_directory, why_not_replaceable
from colossal_llama.utils.settings import add_settings, flag, parse_settings

_PLACEHOLDERS = ("target_model_path",)  # for the reader to fill in
JSON_FILE, MARKDOWN_FILE = "initializations.json", "initializations.md"


def _ways(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in INITIALIZATIONS]
    if unknown or not names:
        raise ValueError(f"choose from {', '.join(INITIALIZATIONS)}")
    return names


@dataclass(frozen=True)
class MeasurementSettings:
    """The base, the vocabulary, the corpus and the held-out text."""

    source_model_and_tokenizer_path: Path = flag(
        None, "base model with its tokenizer", type=existing_directory, required=True
    )
    target_tokenizer_path: Path = flag(
        None, "extended tokenizer, made by init_tokenizer.py", type=existing_directory, required=True
    )
    data_input_dirs: list[Path] = flag(
        None,
        "comma list of directories with JSONL: the corpus, for the frequencies that calibrated rows have",
        type=directory_list,
        required=True,
    )
    held_out: list[Path] = flag(
        None,
        "comma list of directories with JSONL pre-training records, not in the corpus; each is a set, the "
        "first one the text that the extension is made for",
        type=directory_list,
        required=True,
    )
    output_dir: Path = flag(
        None, "directory for initializations.md and initializations.json", type=Path, required=True
    )
    init_input: list[str] = flag(tuple(INITIALIZATIONS), "comma list of ways to make input rows", type=_ways)
    init_output: list[str] = flag(
        tuple(INITIALIZATIONS), "comma list of ways to make output rows", type=_ways
    )
    num_positions: int = flag(
        4096, "positions of the corpus at which output rows are calibrated", type=positive_int
    )
    dtype: str = flag(
        "source", "arithmetic; source: as the weights are stored", choices=("source", "bf16", "fp16", "fp32")
    )
    device: str = flag("auto", "auto, cpu, cuda or cuda:N; auto: the GPU if any", type=device_name)
    seed: int = flag(42, "seed of the sample of positions", type=non_negative_int)


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="measure_init.py", description=__doc__)
    add_settings(parser, MeasurementSettings, check=_find_problems)
    return parser


def _find_problems(settings: MeasurementSettings) -> list[str]:
    source, output = settings.source_model_and_tokenizer_path, settings.output_dir
    if not (source / CONFIG_FILE).exists():
        return [f"--source_model_and_tokenizer_path {source}: no {CONFIG_FILE} in it"]
    if reason := why_not_output_directory(output):
        return [f"--output_dir {output}: {reason}"]
    if reason := why_not_replaceable(output / JSON_FILE, _is_measurement):
        return [f"--output_dir {output}: {JSON_FILE} {reason}"]
    return []


def _is_measurement(content: Any) -> bool:
    return isinstance(content, dict) and "init_input" in content["results"][0]


def main() -> None:
    settings = parse_settings(build_parser(), MeasurementSettings)

    from colossal_llama.evaluation.held_out_text import read_documents
    from colossal_llama.evaluation.start_measurement import measure_starts
    from colossal_llama.evaluation.start_report import as_markdown, best_start
    from colossal_llama.utils.files import write_json, write_text_atomically

    documents = read_documents(settings.held_out, "--held_out")
    measured = measure_starts(
        settings.source_model_and_tokenizer_path,
        settings.target_tokenizer_path,
        settings.data_input_dirs,
        documents,
        settings.init_input or list(INITIALIZATIONS),
        settings.init_output or list(INITIALIZATIONS),
        settings.num_positions,
        settings.dtype,
        settings.device,
        settings.seed,
    )
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    content = {"base": measured.base, "results": [start.to_json() for start in measured.starts]}
    write_json(settings.output_dir / JSON_FILE, content)
    text = as_markdown(measured, command_for(settings, best_start(measured)))
    write_text_atomically(settings.output_dir / MARKDOWN_FILE, text)
    log(text)
    log(f"Written: {settings.output_dir / MARKDOWN_FILE}")


def command_for(settings: MeasurementSettings, start: Any) -> str:
    """The command that makes a model with this start."""
    flags = [
        ("source_model_and_tokenizer_path", settings.source_model_and_tokenizer_path),
        ("target_tokenizer_path", settings.target_tokenizer_path),
        ("target_model_path", "<MODEL>"),
        ("init_input", start.init_input),
        ("init_output", start.init_output),
    ]
    script = "init_model.py"
    if start.calibrated:
        script = "calibrate_output.py"
        flags.insert(2, ("data_input_dirs", ",".join(map(str, settings.data_input_dirs))))
    words = ["python", f"colossal_llama/model/{script}"]
    for name, value in flags:
        words += [f"--{name}", str(value) if name in _PLACEHOLDERS else shlex.quote(str(value))]
    return " ".join(words)


if __name__ == "__main__":
    run_command(main)

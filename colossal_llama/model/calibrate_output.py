"""Shifts the output rows of new pieces so that the model expects each as often as the corpus has it.

Give it a base model and an extended tokenizer, or a model that init_model.py has extended. Only new output
rows differ in the model that it writes (where the embeddings are tied, they are the input rows as well). One
pass of the tokenizer over the corpus, one of the model over a few thousand positions: a 7B model needs its
weights in memory, 14 GB in bf16, and about 2 GB beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama.inference.settings import device_name
from colossal_llama.model.init_model import INITIALIZATION_FILE
from colossal_llama.model.initializations import DEFAULT_INITIALIZATION, INITIALIZATIONS
from colossal_llama.model.model_config import CONFIG_FILE
from colossal_llama.model.model_output import CALIBRATION_FILE, find_foreign_files
from colossal_llama.utils.arguments import (
    ArgumentParser,
    directory_list,
    existing_directory,
    non_negative_int,
    positive_int,
)
from colossal_llama.utils.console import format_table, log, progress_bar
from colossal_llama.utils.errors import run_command
from colossal_llama.utils.output_checks import why_not_output_directory
from colossal_llama.utils.settings import add_settings, flag, parse_settings

if TYPE_CHECKING:
    from colossal_llama.evaluation.starts import ExtendedModel
    from colossal_llama.model.output_calibration import Calibration

NUM_LISTED_MOVES = 10
# Of the sampled texts the model sees windows of this many bytes.
CONTEXT_BYTES = 2048


@dataclass(frozen=True)
class CalibrationSettings:
    """The model, the corpus that says how often each piece is to be expected, and the output."""

    source_model_and_tokenizer_path: Path = flag(
        None,
        "base model with its tokenizer, or a model that init_model.py has extended",
        type=existing_directory,
        required=True,
    )
    target_tokenizer_path: Path | None = flag(
        None,
        "extended tokenizer (default: that of the model, which is extended then)",
        type=existing_directory,
    )
    data_input_dirs: list[Path] = flag(
        None,
        "comma list of directories with JSONL records or conversations: what the model will be trained on",
        type=directory_list,
        required=True,
    )
    target_model_path: Path = flag(None, "where the model goes, never the source", type=Path, required=True)
    held_out: list[Path] | None = flag(
        None,
        "comma list of directories with JSONL pre-training records; their bits per byte before and after are "
        "reported",
        type=directory_list,
    )
    num_positions: int = flag(
        4096, "positions of the corpus at which the model's expectation is found", type=positive_int
    )
    init_input: str = flag(
        DEFAULT_INITIALIZATION,
        "of a base model: how new rows of the input embeddings are made",
        choices=tuple(INITIALIZATIONS),
    )
    init_output: str = flag(
        DEFAULT_INITIALIZATION,
        "of a base model: the same for the output head; where it differs from --init_input, tied embeddings "
        "are untied",
        choices=tuple(INITIALIZATIONS),
    )
    dtype: str = flag(
        "source",
        "arithmetic of the forward pass; source: as the weights are stored, and as they stay",
        choices=("source", "bf16", "fp16", "fp32"),
    )
    device: str = flag("auto", "auto, cpu, cuda or cuda:N; auto: the GPU if any", type=device_name)
    seed: int = flag(42, "seed of the sample of positions", type=non_negative_int)
    overwrite: bool = flag(
        False, "replace a model in the target directory that no script of this suite initialised"
    )


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="calibrate_output.py", description=__doc__)
    add_settings(parser, CalibrationSettings, check=_find_problems)
    return parser


def _find_problems(settings: CalibrationSettings) -> list[str]:
    source, target = settings.source_model_and_tokenizer_path, settings.target_model_path
    if not (source / CONFIG_FILE).exists():
        return [f"--source_model_and_tokenizer_path {source}: no {CONFIG_FILE} in it"]
    if reason := why_not_output_directory(target):
        return [f"--target_model_path {target}: {reason}"]
    if target.exists() and target.samefile(source):
        return [f"--target_model_path {target}: is the source directory; the source is never changed"]
    tokenizer = settings.target_tokenizer_path or source
    if not settings.overwrite and (foreign := find_foreign_files(target, INITIALIZATION_FILE, tokenizer)):
        return [
            f"--target_model_path {target}: holds files that this suite's initialisation did not make "
            f"({', '.join(foreign[:5])}); choose another directory, or --overwrite"
        ]
    return []


def main() -> None:
    settings = parse_settings(build_parser(), CalibrationSettings)

    from colossal_llama.evaluation.held_out_text import read_documents
    from colossal_llama.evaluation.starts import load_extended
    from colossal_llama.model.init_model import check_target

    documents = read_documents(settings.held_out, "--held_out") if settings.held_out else []
    extended = load_extended(
        settings.source_model_and_tokenizer_path,
        settings.target_tokenizer_path,
        settings.init_input,
        settings.init_output,
        settings.dtype,
        settings.device,
    )
    # Before the forward passes, not after them.
    check_target(settings.target_model_path, extended.layout, extended.extension())
    before = extended.score(documents, "before") if documents else {}
    calibration, facts = find_biases(settings, extended)
    extended.shift_output(calibration)
    after = extended.score(documents, "after") if documents else {}
    write(settings, extended, calibration)
    report(settings, extended, calibration, facts, before, after)


def find_biases(settings: CalibrationSettings, extended: ExtendedModel) -> tuple[Calibration, dict[str, Any]]:
    """The calibration, and the size of what it was found on."""
    from colossal_llama.evaluation.hidden_states import find_hidden_states
    from colossal_llama.evaluation.new_piece_frequencies import read_corpus, take_windows
    from colossal_llama.model.output_calibration import NUM_ITERATIONS, calibrate

    corpus = read_corpus(
        settings.data_input_dirs, extended.encoder, extended.new_rows, settings.num_positions, settings.seed
    )
    windows = take_windows(corpus.texts, extended.encoder, settings.num_positions, CONTEXT_BYTES)
    num_tokens = sum(len(window.ids) for window in windows)
    with progress_bar(total=num_tokens, desc="hidden states", unit=" tokens") as bar:
        hidden = find_hidden_states(extended.model, windows, bar.update).states
    total = len(hidden) * (NUM_ITERATIONS + 1)
    with progress_bar(total=total, desc="biases", unit=" positions") as bar:
        calibration = calibrate(
            hidden,
            extended.new_output_rows(),
            extended.old_normalizers(hidden),
            corpus.frequencies(),
            bar.update,
        )
    facts = {
        "corpus_tokens": corpus.total,
        "new_tokens": int(corpus.counts.sum()),
        "never": int((corpus.counts == 0).sum()),
        "positions": len(hidden),
    }
    return calibration, facts


def write(settings: CalibrationSettings, extended: ExtendedModel, calibration: Calibration) -> None:
    """Writes the model: the source's bytes, but new output rows."""
    from colossal_llama.model.init_model import ModelSettings, write_model
    from colossal_llama.model.model_extension import RowShift

    shift = RowShift(extended.new_rows, calibration.biases, calibration.direction)
    output = ModelSettings(
        settings.source_model_and_tokenizer_path,
        settings.target_tokenizer_path or settings.source_model_and_tokenizer_path,
        settings.target_model_path,
        init_input=settings.init_input,
        init_output=settings.init_output,
    )
    write_model(output, extended.config, extended.layout, extended.extension(shift))


def report(
    settings: CalibrationSettings,
    extended: ExtendedModel,
    calibration: Calibration,
    facts: dict[str, Any],
    before: dict[str, float],
    after: dict[str, float],
) -> None:
    """Prints what was reached, and writes it beside the model."""
    from colossal_llama.utils.files import write_json

    moves = calibration.biases.abs().argsort(descending=True)[:NUM_LISTED_MOVES].tolist()
    pieces = [
        {
            "piece": extended.piece(extended.new_rows.start + number),
            "bias": round(float(calibration.biases[number]), 4),
            **{name: float(getattr(calibration, name)[number]) for name in ("expected", "before", "reached")},
        }
        for number in moves
    ]
    shares = {name: float(getattr(calibration, name).sum()) for name in ("expected", "before", "reached")}
    content = {
        **facts,
        "share_of_new_tokens": shares,
        "largest_moves": pieces,
        "bits_per_byte": {name: {"before": before[name], "after": after[name]} for name in before},
    }
    write_json(settings.target_model_path / CALIBRATION_FILE, content)
    log(
        f"Share of new tokens: {shares['expected']:.4f} in the corpus, expected by the model before "
        f"{shares['before']:.4f}, now {shares['reached']:.4f} ({facts['positions']:,} positions)"
    )
    header = ["largest moves: piece", "bias", "in the corpus", "before", "now"]
    rows = [
        (piece["piece"], piece["bias"], *(f"{piece[name]:.2e}" for name in ("expected", "before", "reached")))
        for piece in pieces
    ]
    log(format_table(header, rows))
    if before:
        rows = [(name, before[name], after[name], after[name] - before[name]) for name in before]
        log(format_table(["bits per byte", "before", "now", "change"], rows))
    if facts["never"]:
        log(f"{facts['never']:,} of {len(extended.new_rows):,} new pieces do not occur in the corpus")
    log(f"Model: {settings.target_model_path}")


if __name__ == "__main__":
    run_command(main)

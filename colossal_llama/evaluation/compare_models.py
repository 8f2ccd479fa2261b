"""Compares models, each with its own tokenizer, on held-out text: what was learned, what was forgotten.

Bits per byte by model, directory and category, the change against the first model with 95 % intervals,
tokens per character, what new rows of the vocabulary cost old text, and which of them are unused. Writes
comparison.md, comparison.json and comparison.png. Run again after a stop, it continues; only models that are
added are scored.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama.inference.settings import device_name, model_name
from colossal_llama.utils.arguments import ArgumentParser, directory_list, positive_int
from colossal_llama.utils.console import format_table, log, progress_bar, warn
from colossal_llama.utils.errors import run_command
from colossal_llama.utils.output_checks import why_not_output_directory, why_not_replaceable
from colossal_llama.utils.settings import add_settings, flag, parse_settings

if TYPE_CHECKING:
    from colossal_llama.evaluation.comparison import ModelScores
    from colossal_llama.evaluation.held_out_text import Document
    from colossal_llama.evaluation.models import PreparedModel

JSON_FILE, MARKDOWN_FILE, PICTURE_FILE = "comparison.json", "comparison.md", "comparison.png"
LATEST = "latest"
# Tokens of a forward pass, padding included.
BATCH_TOKENS = 16384


def _model_list(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError("give at least one model")
    problems = []
    for name in names:
        try:
            if Path(name).name != LATEST and not (Path(name) / "modeling").is_dir():
                model_name(name)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise ValueError("; ".join(problems))
    return names


@dataclass(frozen=True)
class CompareSettings:
    """The models that are compared, on which text."""

    models: list[str] = flag(
        None,
        "comma list of models, the base first: model directories, LoRA adapters, step directories of "
        "checkpoints, <save_dir>/latest (latest alone: in checkpoint_dir), or names on the hub",
        type=_model_list,
        required=True,
    )
    data_input_dirs: list[Path] = flag(
        None,
        "comma list of directories with JSONL pre-training records, held out from training; each is a set",
        type=directory_list,
        required=True,
    )
    output_dir: Path = flag(
        None, "directory for comparison.md, .json and .png, and the scores so far", type=Path, required=True
    )
    context_bytes: int = flag(
        8192, "text that a model sees at once, in bytes; longer documents are cut", type=positive_int
    )
    stride_bytes: int = flag(
        4096, "bytes from one window of a long document to the next; the rest is context", type=positive_int
    )
    dtype: str = flag(
        "source", "arithmetic; source: as the weights are stored", choices=("source", "bf16", "fp16", "fp32")
    )
    device: str = flag("auto", "auto, cpu, cuda or cuda:N; auto: the GPU if any", type=device_name)


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="compare_models.py", description=__doc__)
    add_settings(parser, CompareSettings, check=_find_problems)
    return parser


def _find_problems(settings: CompareSettings) -> list[str]:
    problems = []
    if settings.stride_bytes > settings.context_bytes:
        problems.append(
            f"--stride_bytes {settings.stride_bytes}: more than --context_bytes {settings.context_bytes}, so "
            "text would be left out"
        )
    if reason := why_not_output_directory(settings.output_dir):
        problems.append(f"--output_dir {settings.output_dir}: {reason}")
    elif reason := why_not_replaceable(settings.output_dir / JSON_FILE, _is_comparison):
        problems.append(f"--output_dir {settings.output_dir}: {JSON_FILE} {reason}")
    return problems


def _is_comparison(content: Any) -> bool:
    return isinstance(content, dict) and "bits_per_byte" in content["results"][0]


def main() -> None:
    settings = parse_settings(build_parser(), CompareSettings)

    from colossal_llama.upstream.lean_imports import lean_imports
    from colossal_llama.utils.files import locked_directory

    with lean_imports():
        from colossal_llama.evaluation.held_out_text import read_documents
        from colossal_llama.evaluation.models import find_models, prepare_models

    with locked_directory(settings.output_dir, "a comparison"):
        models = find_models(settings.models)
        documents = read_documents(settings.data_input_dirs)
        # Names everything that keeps a model from scoring, before the first one is loaded.
        prepared = prepare_models(models, documents, settings.context_bytes, settings.stride_bytes)
        if settings.dtype == "source":
            _warn_of_other_dtypes(prepared)
        scores = score_models(settings, prepared)
        write_comparison(settings, documents, scores, prepared)


def _warn_of_other_dtypes(prepared: list[PreparedModel]) -> None:
    """A base in fp16 and a model trained in bf16 differ by rounding alone."""
    from colossal_llama.model.dtypes import flag_name

    stored = {each.files.name: each.config.torch_dtype for each in prepared}
    names = {name: flag_name(dtype) for name, dtype in stored.items() if dtype is not None}
    if len(set(names.values())) > 1:
        each = ", ".join(f"{name}: {dtype}" for name, dtype in names.items())
        warn(
            f"--dtype source: the models are computed in different types ({each}), so they differ by "
            "rounding too; give --dtype bf16, fp16 or fp32"
        )


def score_models(settings: CompareSettings, prepared: list[PreparedModel]) -> list[ModelScores]:
    """Scores the documents with each model in turn; what earlier runs have scored is in their files."""
    from colossal_llama.evaluation.comparison import ModelScores
    from colossal_llama.evaluation.score_files import ScoreFile, score_file

    scores = []
    for each in prepared:
        depends_on = {**each.facts(settings.dtype, settings.device), "batch_tokens": BATCH_TOKENS}
        with ScoreFile(score_file(settings.output_dir, each.files.path, depends_on)) as file:
            _score(each, file, settings)
            losses = each.sum_by_document([file.scores[i].loss for i in range(len(each.windows))])
            costs = each.sum_by_document([file.scores[i].new_rows_loss for i in range(len(each.windows))])
        scores.append(
            ModelScores(
                each.files.name,
                losses,
                costs if each.new_rows else None,
                each.num_tokens,
                len(each.new_rows or ()),
                each.num_used_rows,
            )
        )
    return scores


def _score(prepared: Any, file: Any, settings: CompareSettings) -> None:
    """Scores the windows that have no score yet."""
    from colossal_llama.evaluation.models import load_scorer
    from colossal_llama.evaluation.scoring import release, score_batch
    from colossal_llama.evaluation.windows import make_batches

    windows, name = prepared.windows, prepared.files.name
    batches = make_batches(windows, BATCH_TOKENS)
    missing = [batch for batch in batches if any(number not in file.scores for number in batch)]
    if not missing:
        log(f"{name}: all scores are in {file.path}")
        return
    scorer = load_scorer(prepared, settings.dtype, settings.device)
    total = sum(len(window.ids) for window in windows)
    left = sum(len(windows[number].ids) for batch in missing for number in batch)
    with progress_bar(total=total, initial=total - left, desc=name, unit=" tokens", unit_scale=True) as bar:
        for batch in missing:
            file.add(batch, score_batch(scorer, [windows[number] for number in batch]))
            bar.update(sum(len(windows[number].ids) for number in batch))
    release(scorer)


def write_comparison(
    settings: CompareSettings,
    documents: list[Document],
    scores: list[ModelScores],
    prepared: list[PreparedModel],
) -> None:
    """Writes the three files and prints the table."""
    from colossal_llama.evaluation.comparison import (
        CONFIDENCE,
        NUM_RESAMPLES,
        SEED,
        as_json,
        compare,
        costs_of_new_rows,
    )
    from colossal_llama.evaluation.report import draw_comparison, make_markdown
    from colossal_llama.evaluation.standing_rows import report_new_rows
    from colossal_llama.utils.files import aside_path, replace_path, write_json, write_text_atomically

    results, costs = compare(documents, scores), costs_of_new_rows(documents, scores)
    new_rows = report_new_rows(prepared)
    content = {
        "models": [
            {
                "name": model.name,
                "path": each.files.path,
                "new_rows": model.num_new_rows,
                "new_rows_in_text": model.num_used_rows,
            }
            for model, each in zip(scores, prepared, strict=True)
        ],
        "context_bytes": settings.context_bytes,
        "stride_bytes": settings.stride_bytes,
        "dtype": settings.dtype,
        "intervals": {"confidence": CONFIDENCE, "resamples": NUM_RESAMPLES, "seed": SEED},
        "results": [as_json(result) for result in results],
        "cost_of_new_rows": [as_json(cost) for cost in costs],
        "new_rows": [asdict(report) for report in new_rows],
    }
    directory = settings.output_dir
    write_json(directory / JSON_FILE, content)
    text = make_markdown(results, costs, new_rows, scores, settings.context_bytes, settings.stride_bytes)
    write_text_atomically(directory / MARKDOWN_FILE, text)
    aside = aside_path(directory / PICTURE_FILE)
    draw_comparison(results, [model.name for model in scores], aside)
    replace_path(aside, directory / PICTURE_FILE)
    rows = [
        (f"{result.set}, {result.model}", result.bits_per_byte, f"{result.change:+.4f}", result.documents)
        for result in results
        if result.category is None
    ]
    log(format_table(("set, model", "bits per byte", "change", "documents"), rows))
    log(f"Comparison: {directory / MARKDOWN_FILE}")


if __name__ == "__main__":
    run_command(main)

"""What a run reads before it trains: model configuration, tokenizer, rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from colossal_llama.tokenizer.fingerprint import tokenizer_fingerprint
from colossal_llama.tokenizer.tokenizer_files import REPORT_FILE
from colossal_llama.training.data.prepared_rows import PreparedDataset, find_part_directories
from colossal_llama.training.data.random_rows import RandomRows
from colossal_llama.training.data.rows import RowDataset
from colossal_llama.training.data.sets import set_directory, set_names
from colossal_llama.training.llama.loading import load_config, load_tokenizer
from colossal_llama.training.settings import RunSettings
from colossal_llama.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Inputs:
    """What a run reads: model configuration, tokenizer, padding, training rows, evaluation sets by name."""

    config: LlamaConfig
    tokenizer: PreTrainedTokenizerBase | None
    pad_token_id: int
    dataset: RowDataset
    evaluation_sets: dict[str, PreparedDataset]


def open_inputs(settings: RunSettings) -> Inputs:
    """Opens configuration, tokenizer and data; all problems with the data are reported together."""
    wanted = settings.data
    config = load_config(wanted.pretrained, wanted.trust_remote_code)
    _refuse_forgotten_rows(settings)
    if settings.output.benchmark:
        rows = RandomRows(
            settings.output.num_samples, wanted.max_length, config.vocab_size, settings.optimizer.seed
        )
        return Inputs(config, None, 0, rows, {})
    tokenizer = load_tokenizer(wanted.pretrained, wanted.trust_remote_code)
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"--pretrained {wanted.pretrained}: the tokenizer has {len(tokenizer)} tokens, the model only "
            f"{config.vocab_size} embeddings; run colossal_llama/model/init_model.py first"
        )
    pad_token_id = tokenizer.eos_token_id if wanted.pad_token == "eos" else tokenizer.unk_token_id
    if pad_token_id is None:
        raise UserError(f"--pad_token {wanted.pad_token}: the tokenizer has no such token; use the other one")
    fingerprint = tokenizer_fingerprint(tokenizer)

    evaluation_paths: dict[Path, list[Path]] = {}
    for path in wanted.eval_dataset or []:
        evaluation_paths.setdefault(set_directory(path), []).append(path)
    flags = [("--dataset", wanted.dataset or [])]
    flags += [("--eval_dataset", paths) for paths in evaluation_paths.values()]
    opened, problems = [], []
    for flag, paths in flags:
        try:
            parts = find_part_directories(paths, flag)
            opened.append(
                PreparedDataset(parts, wanted.max_length, wanted.isolate_documents, fingerprint, flag)
            )
        except UserError as error:
            problems.extend(error.problems)
    if problems:
        raise UserError(problems)
    dataset, *evaluated = opened
    evaluation_sets = dict(zip(set_names(list(evaluation_paths)), evaluated, strict=True))
    return Inputs(config, tokenizer, pad_token_id, dataset, evaluation_sets)


def _refuse_forgotten_rows(settings: RunSettings) -> None:
    """What the arguments' own check can't see: a model of the hub with an extended vocabulary."""
    from transformers.utils import cached_file

    pretrained = settings.data.pretrained
    problems = settings.adaptation.forgotten_rows(f"--pretrained {pretrained}")
    if not problems or Path(pretrained).is_dir():
        return
    reasons = ("missing_entries", "connection_errors", "gated_repo")
    quietly = {f"_raise_exceptions_for_{reason}": False for reason in reasons}
    if cached_file(pretrained, REPORT_FILE, **quietly) is not None:
        raise UserError(problems)

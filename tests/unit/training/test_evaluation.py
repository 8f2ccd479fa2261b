"""What evaluation sums over sets and ranks; `tests/distributed/test_bits_per_byte.py` has real runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus import sample_texts
from transformers import AutoTokenizer

from colossal_llama.dataset.preparation import prepare
from colossal_llama.dataset.settings import (
    PathSettings,
    PreparationSettings,
    PretrainSettings,
    RowSettings,
    SftSettings,
    WorkerSettings,
)
from colossal_llama.training.data.collator import Collator
from colossal_llama.training.data.order import BatchShape
from colossal_llama.training.data.prepared_rows import PreparedDataset, find_part_directories
from colossal_llama.training.evaluation import (
    EvaluationSums,
    Evaluator,
    describe_evaluation,
    evaluation_figures,
)

MAX_LENGTH = 128


class OneRank:
    """A plugin whose model loses one nat a token; the other ranks hold as much as this one."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks, self.num_collectives = num_ranks, 0

    def to_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        return batch

    def evaluate_pass(self, batch: dict[str, Any]) -> torch.Tensor:
        return (batch["labels"] != -100).sum().float()

    def sum_counts(self, counts: torch.Tensor) -> torch.Tensor:
        self.num_collectives += 1
        return self.num_ranks * counts

    sum_losses = sum_counts


def open_set(
    directory: Path, tokenizer: Path, records: list[dict], kind: Any, max_length: int = MAX_LENGTH
) -> PreparedDataset:
    (directory / "in").mkdir(parents=True)
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    (directory / "in" / "records.jsonl").write_text("".join(lines), encoding="utf-8")
    prepare(
        PreparationSettings(
            kind,
            PathSettings([directory / "in"], tokenizer_dir=tokenizer, data_output_dirs=directory),
            RowSettings(max_length, 1),
            WorkerSettings(num_workers=1),
        )
    )
    return PreparedDataset(find_part_directories([directory / "arrow"]), max_length, True)


def make_evaluator(sets: dict[str, PreparedDataset], tokenizer: Path, num_ranks: int = 1) -> Evaluator:
    return Evaluator(
        sets,
        OneRank(num_ranks),
        BatchShape(4, 1, 1, 0),
        lambda dataset: Collator(dataset, 0, None, True, 1000),
        AutoTokenizer.from_pretrained(tokenizer),
    )


@pytest.mark.parametrize("tokenizer", ["llama2_tokenizer_dir", "llama3_tokenizer_dir"])
def test_bytes_are_those_of_the_texts_that_have_loss(
    tokenizer: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Packed, chunked, with a source, and answers of conversations."""
    directory = request.getfixturevalue(tokenizer)
    texts = sample_texts(60, seed=8, max_sentences=2)
    pretrain = PretrainSettings()
    sets = {
        "short": open_set(
            tmp_path / "short", directory, [_record("", text) for text in texts], pretrain, 1024
        ),
        "sources": open_set(
            tmp_path / "sources", directory, [_record("Hm.\n", text) for text in texts], pretrain, 1024
        ),
        "chunked": open_set(tmp_path / "long", directory, [_record("", "ab " * 1000)], pretrain),
    }
    sums = make_evaluator(sets, directory).measure(lambda: False)
    assert sums is not None
    assert sums["short"].bytes == sum(len(text.encode()) for text in texts)
    # A token may reach over the border of source and target; here no more than its line break does.
    assert 0 <= sums["sources"].bytes - sums["short"].bytes <= len(texts)
    # The first token of each row but the first is predicted by nothing.
    assert 3000 - 4 * len(sets["chunked"]) <= sums["chunked"].bytes < 3000
    assert sums["short"].loss == sums["short"].tokens


def test_bytes_of_answers(llama2_tokenizer_dir: Path, tmp_path: Path) -> None:
    answers = sample_texts(20, seed=9, max_sentences=1)
    records = [
        {"messages": [{"from": "human", "content": "Go on."}, {"from": "assistant", "content": answer}]}
        for answer in answers
    ]
    dataset = open_set(tmp_path, llama2_tokenizer_dir, records, SftSettings(llama_version=2), 1024)
    sums = make_evaluator({"": dataset}, llama2_tokenizer_dir).measure(lambda: False)
    assert sums is not None
    assert sums[""].bytes == sum(len(answer.encode()) for answer in answers)


def _record(source: str, target: str) -> dict[str, str]:
    return {"source": source, "target": target, "category": "a"}


def test_two_collectives_for_all_sets_and_one_a_batch_for_the_stop(
    llama2_tokenizer_dir: Path, tmp_path: Path
) -> None:
    records = [_record("", text) for text in sample_texts(20, seed=3)]
    dataset = open_set(tmp_path, llama2_tokenizer_dir, records, PretrainSettings())
    one, three = (
        make_evaluator(sets, llama2_tokenizer_dir, num_ranks)
        for sets, num_ranks in (({"a": dataset}, 1), ({"a": dataset, "b": dataset}, 3))
    )
    batches = -(-len(dataset) // 4)
    (alone,) = one.measure(lambda: False).values()
    assert one.plugin.num_collectives == batches + 2
    sums = three.measure(lambda: False)
    assert three.plugin.num_collectives == 2 * batches + 2
    assert sums == {
        name: EvaluationSums(3 * alone.loss, 3 * alone.tokens, 3 * alone.bytes) for name in ("a", "b")
    }
    answers = iter([False, True])
    assert three.measure(lambda: next(answers)) is None


def test_figures_of_all_sets_and_of_each() -> None:
    sums = {
        "zh": EvaluationSums(100.0, 50, 200),
        "en": EvaluationSums(30.0, 30, 100),
        "empty": EvaluationSums(0.0, 0, 0),
    }
    figures = evaluation_figures(sums)
    assert figures == pytest.approx(
        {
            "eval_loss/zh": 2.0,
            "eval_bits_per_byte/zh": 0.5 / math.log(2),
            "eval_loss/en": 1.0,
            "eval_bits_per_byte/en": 0.3 / math.log(2),
            "eval_loss": 130 / 80,
            "eval_perplexity": math.exp(130 / 80),
            "eval_bits_per_byte": 130 / 300 / math.log(2),
        }
    )
    assert describe_evaluation(7, figures) == (
        "step 7: evaluation loss 1.6250, perplexity 5.08, 0.6252 bits per byte (zh 0.7213, en 0.4328)"
    )
    assert list(evaluation_figures({"zh": sums["zh"]})) == [
        "eval_loss",
        "eval_perplexity",
        "eval_bits_per_byte",
    ]
    assert evaluation_figures({"empty": sums["empty"]}) == {}
    only_eos = evaluation_figures({"x": EvaluationSums(2.0, 1, 0)})
    assert list(only_eos) == ["eval_loss", "eval_perplexity"]
    assert describe_evaluation(1, only_eos).endswith("perplexity 7.39")

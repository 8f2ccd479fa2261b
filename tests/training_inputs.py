"""Data and a tiny model for training runs: an odd vocabulary, unequal label counts, padding."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from corpus import sample_texts
from support import ROOT, load_script

MAX_LENGTH = 96
# Not a multiple of anything that plugins pad to.
VOCAB_SIZE = 501


@dataclass
class TrainingInputs:
    """A model directory and prepared data, as flags of `train.py`."""

    model: Path
    data: Path

    def flags(self) -> list[str]:
        return ["--pretrained", str(self.model), "--dataset", str(self.data), "--max_length", str(MAX_LENGTH)]

    def with_tied_model(self, directory: Path) -> TrainingInputs:
        """The same data, with a model in `directory` whose input and output embeddings are one matrix."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        shutil.copytree(self.model, directory)
        (directory / "model.safetensors").unlink()
        torch.manual_seed(0)
        config = LlamaConfig.from_pretrained(self.model, tie_word_embeddings=True)
        LlamaForCausalLM(config).save_pretrained(directory)
        return TrainingInputs(directory, self.data)


def write_records(directory: Path, count: int, seed: int) -> None:
    """Pre-training records; every third has a source, so that rows differ in their number of labels."""
    directory.mkdir(parents=True)
    with open(directory / "records.jsonl", "w", encoding="utf-8") as file:
        for number, text in enumerate(sample_texts(count, seed=seed, max_sentences=3)):
            cut = 0 if number % 3 else len(text) // 2
            record = {"source": text[:cut], "target": text[cut:], "category": f"c{number % 2}"}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def prepare(raw: Path, model: Path, output: Path, bins: int, *more: str) -> Path:
    """Runs `prepare_pretrain_dataset.py`; returns its `arrow/`."""
    subprocess.run(
        [
            sys.executable,
            str(ROOT / "prepare_pretrain_dataset.py"),
            *(
                "--data_input_dirs",
                str(raw),
                "--tokenizer_dir",
                str(model),
                "--data_output_dirs",
                str(output),
            ),
            *(
                "--max_length",
                str(MAX_LENGTH),
                "--num_spliced_dataset_bins",
                str(bins),
                "--num_workers",
                "1",
                *more,
            ),
        ],
        check=True,
        capture_output=True,
    )
    return output / "arrow"


@pytest.fixture(scope="session")
def training_inputs(tmp_path_factory: pytest.TempPathFactory) -> TrainingInputs:
    directory = tmp_path_factory.mktemp("training")
    maker = load_script(ROOT / "examples" / "make_base_model.py")
    model = directory / "model"
    maker.make_tokenizer(sample_texts(300, seed=1, chinese=False), model, VOCAB_SIZE)
    maker.make_model(model, VOCAB_SIZE, hidden_size=64, num_layers=2, num_heads=4, max_positions=512, seed=0)
    write_records(directory / "raw", 700, seed=5)
    return TrainingInputs(model, prepare(directory / "raw", model, directory / "data", 3))

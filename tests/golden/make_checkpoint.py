"""Makes `checkpoint/`: a run of `train.py` that stopped at a checkpoint, with all that it takes to continue,
and the metrics of the same run never stopped.

A later version has to continue from it. Remake it only when an old checkpoint may no longer be resumed, and
give the reason in the commit: a checkpoint made by the version under test shows nothing.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.extend(str(Path(__file__).resolve().parents[1] / part) for part in ("", "distributed"))

from golden.commands import CHECKPOINT, INPUTS, ROOT, Command, make_model, script_environment, write_jsonl

VOCAB_SIZE = 361
SAVED_STEP, LAST_STEP = 5, 18
CHECKPOINT_NAME = f"epoch-0_step-{SAVED_STEP}"
KEPT_METRICS = ("step", "epoch", "tokens", "loss", "lr", "grad_norm")


def training_command(run: str, last_step: int, *more: object) -> Command:
    """Paths are relative: the record in the checkpoint holds them."""
    return Command(
        "train.py",
        *("--pretrained", "model", "--dataset", "data/arrow", "--max_length", 96),
        *("--plugin", "ddp", "--mixed_precision", "fp32", "--batch_size", 2, "--accumulation_steps", 2),
        *("--lr", 1e-2, "--warmup_steps", 2, "--num_epochs", 2, "--num_workers", 0),
        *("--save_interval", SAVED_STEP, "--skip_save_each_epoch", "--max_steps", last_step),
        *("--save_dir", f"{run}/checkpoints", "--tensorboard_dir", f"{run}/logs"),
        *("--config_file", f"{run}/config.json"),
        *more,
    )


def read_metrics(path: Path) -> list[dict]:
    """What is the same in every run of the same training."""
    records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [{key: record[key] for key in KEPT_METRICS} for record in records]


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        make_model(INPUTS / "llama2", directory / "model", VOCAB_SIZE, hidden_size=8, num_layers=1)
        sample = ROOT / "examples" / "data" / "pretrain" / "science.jsonl"
        lines = sample.read_text(encoding="utf-8").splitlines()[:12]
        write_jsonl(directory / "raw" / "records.jsonl", map(json.loads, lines))
        prepare = Command(
            "prepare_pretrain_dataset.py",
            *("--data_input_dirs", "raw", "--tokenizer_dir", "model", "--data_output_dirs", "data"),
            *("--max_length", 96, "--num_spliced_dataset_bins", 2, "--num_workers", 1),
        )
        for command in (prepare, training_command("whole", LAST_STEP), training_command("run", SAVED_STEP)):
            finished = command.run(directory, script_environment())
            assert finished.returncode == 0, finished.stderr
        shutil.rmtree(CHECKPOINT, ignore_errors=True)
        shutil.copytree(directory / "model", CHECKPOINT / "model")
        shutil.copytree(
            directory / "data" / "arrow", CHECKPOINT / "data" / "arrow", ignore=shutil.ignore_patterns(".*")
        )
        shutil.copytree(
            directory / "run" / "checkpoints" / CHECKPOINT_NAME,
            CHECKPOINT / "run" / "checkpoints" / CHECKPOINT_NAME,
        )
        (CHECKPOINT / "run" / "logs").mkdir()
        for run, target in (("run", "run/logs/metrics.jsonl"), ("whole", "expected_metrics.jsonl")):
            write_jsonl(CHECKPOINT / target, read_metrics(directory / run / "logs" / "metrics.jsonl"))


if __name__ == "__main__":
    main()

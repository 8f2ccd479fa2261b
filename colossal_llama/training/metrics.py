"""What a run leaves for people to look at: metrics.jsonl, TensorBoard scalars, and a picture of the
curves.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from colossal_llama.utils.console import warn

METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "training_curves.png"
# Scalar of metrics.jsonl -> tag in TensorBoard; the ones by tokens use the token count as the step axis.
_TAGS = {
    "loss": "train/loss",
    "lr": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "loss_scale": "train/loss_scale",
    "tokens_per_second": "throughput/tokens_per_second",
    "step_seconds": "throughput/step_seconds",
    "eval_loss": "eval/loss",
    "eval_perplexity": "eval/perplexity",
}
_BY_TOKENS = {"loss": "train/loss_by_tokens", "eval_loss": "eval/loss_by_tokens"}


def read_metrics(directory: Path, up_to_step: int | None = None) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl`, up to a step; a last line that was cut off by a kill is left out."""
    path = directory / METRICS_FILE
    records: list[dict[str, Any]] = []
    if not path.is_file():
        return records
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if up_to_step is None or record["step"] <= up_to_step:
            records.append(record)
    return records


class MetricsWriter:
    """Writes the metrics of a run; made on rank 0 only.

    Args:
        start_step: step that the run continues from. At 0 what an earlier run left is moved to `previous-N`;
            otherwise metrics and TensorBoard are cut back to that step.
        description: text of the run's arguments, shown in TensorBoard.
    """

    def __init__(self, directory: Path, start_step: int, description: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        kept = read_metrics(directory, start_step) if start_step else []
        old_events = sorted(directory.glob("events.out.tfevents.*"))
        if start_step == 0 and ((directory / METRICS_FILE).exists() or old_events):
            _move_aside(directory, old_events)
        else:
            for path in old_events:
                path.unlink()
        self._file = open(directory / METRICS_FILE, "w", encoding="utf-8")  # noqa: SIM115
        self._board = SummaryWriter(str(directory))
        self._board.add_text("arguments", description, 0)
        for record in kept:
            self.write(record)

    def write(self, record: dict[str, Any]) -> None:
        """Appends one object for an optimizer step; `step` and `tokens` are compulsory."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        self._add_scalars(record)

    def _add_scalars(self, record: dict[str, Any]) -> None:
        for name, value in record.items():
            tag = _TAGS.get(name) or (f"eval/{name}" if name.startswith("eval_loss/") else None)
            if tag is not None:
                self._board.add_scalar(tag, value, record["step"])
            if name in _BY_TOKENS:
                self._board.add_scalar(_BY_TOKENS[name], value, record["tokens"])

    def complete_last(self, values: dict[str, Any]) -> None:
        """Adds values to the last record: those of an evaluation that was done after a resume."""
        self._file.close()
        records = read_metrics(self.directory)
        self._file = open(self.directory / METRICS_FILE, "w", encoding="utf-8")  # noqa: SIM115
        for record in records[:-1]:
            self._file.write(json.dumps(record) + "\n")
        last = {**records[-1], **values}
        self._file.write(json.dumps(last) + "\n")
        self._file.flush()
        self._add_scalars({name: last[name] for name in (*values, "step", "tokens")})

    def close(self) -> None:
        self._file.close()
        self._board.close()


def _move_aside(directory: Path, events: Iterable[Path]) -> None:
    number = 1
    while (directory / f"previous-{number}").exists():
        number += 1
    aside = directory / f"previous-{number}"
    aside.mkdir()
    for path in [*events, directory / METRICS_FILE, directory / CURVES_FILE]:
        if path.exists():
            shutil.move(str(path), aside / path.name)


def draw_curves(directory: Path) -> Path | None:
    """Draws loss by step and by tokens, raw and smoothed, with evaluations and the learning rate."""
    records = read_metrics(directory)
    trained = [record for record in records if "loss" in record]
    if not trained:
        return None
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        warn(f"no {CURVES_FILE}: {error}")
        return None
    losses = [record["loss"] for record in trained]
    smoothed = _exponential_mean(losses, window=max(1, len(losses) // 50))
    evaluated = [record for record in records if "eval_loss" in record]
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), constrained_layout=True)
    for axis, key, label in ((axes[0], "step", "optimizer step"), (axes[1], "tokens", "tokens seen")):
        positions = [record[key] for record in trained]
        axis.plot(positions, losses, color="tab:blue", alpha=0.3, linewidth=1, label="loss")
        axis.plot(positions, smoothed, color="tab:blue", linewidth=1.6, label="smoothed")
        if evaluated:
            axis.plot(
                [record[key] for record in evaluated],
                [record["eval_loss"] for record in evaluated],
                "o-",
                color="tab:orange",
                markersize=4,
                label="evaluation",
            )
        axis.set_xlabel(label)
        axis.set_ylabel("loss (nats per token)")
        axis.set_title(f"Loss by {label}")
        axis.grid(alpha=0.3)
        axis.legend()
    axes[2].plot(
        [record["step"] for record in trained], [record["lr"] for record in trained], color="tab:green"
    )
    axes[2].set_xlabel("optimizer step")
    axes[2].set_title("Learning rate")
    axes[2].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes[2].grid(alpha=0.3)
    path = directory / CURVES_FILE
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _exponential_mean(values: list[float], window: int) -> list[float]:
    """Bias-corrected exponential moving average with decay 1 - 1 / window."""
    decay = 1 - 1 / window
    mean, weight, means = 0.0, 0.0, []
    for value in values:
        mean = decay * mean + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        means.append(mean / weight)
    return means

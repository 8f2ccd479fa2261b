"""What a run leaves to be read: metrics.jsonl, TensorBoard, and the metrics of the stages before it."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from colossal_llama.training.checkpoint.directories import STATE_FILE, list_checkpoints
from colossal_llama.training.checkpoint.record import SavedRun
from colossal_llama.utils.console import warn
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.files import write_text_atomically

METRICS_FILE = "metrics.jsonl"
EARLIER_STAGES_FILE = "earlier_stages.jsonl"
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
    "eval_bits_per_byte": "eval/bits_per_byte",
}
_BY_TOKENS = {
    "loss": "train/loss_by_tokens",
    "lr": "train/learning_rate_by_tokens",
    "eval_loss": "eval/loss_by_tokens",
    "eval_bits_per_byte": "eval/bits_per_byte_by_tokens",
}
# Figures of one evaluation set among several: eval_loss/<set> -> eval/loss/<set>.
_OF_ONE_SET = ("eval_loss/", "eval_bits_per_byte/")


def read_metrics(
    directory: Path, up_to_step: int | None = None, file_name: str = METRICS_FILE
) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl`, up to a step.

    A last line that was cut off by a kill is left out, as is everything in a file that no run wrote.
    """
    path = directory / file_name
    records: list[dict[str, Any]] = []
    if not path.is_file():
        return records
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            continue  # nothing that this program wrote
        if up_to_step is None or record["step"] <= up_to_step:
            records.append(record)
    return records


def read_earlier_stages(weights: Path) -> list[list[dict[str, Any]]]:
    """The metrics of the run that left these weights, and of the stages before it, oldest first.

    Args:
        weights: a `modeling/` directory of a checkpoint or of `save_dir`. The checkpoint's record of its
            run says where the metrics are.

    Returns:
        A list of records for each stage; empty for weights from elsewhere, or when the metrics are gone.
    """
    # Beside a `modeling/` directory: its checkpoint's own state, or in `save_dir` the newest checkpoint's.
    checkpoints = [weights.parent, *reversed(list_checkpoints(weights.parent))]
    found = next((path for path in checkpoints if (path / STATE_FILE).is_file()), None)
    try:
        saved = None if found is None else SavedRun.read(found)
    except UserError:
        saved = None  # a checkpoint of the original suite
    if saved is None:
        return []
    last, directory = saved.state, Path(saved.record.arguments["tensorboard_dir"])
    for candidate in (directory, *directory.glob("previous-*")):  # a later run may have moved them
        records = read_metrics(candidate, last.step)
        if records and (records[-1]["step"], records[-1]["tokens"]) == (last.step, last.tokens):
            return [*_split_stages(candidate), records]
    return []


def _split_stages(directory: Path) -> list[list[dict[str, Any]]]:
    stages: dict[int, list[dict[str, Any]]] = {}
    for record in read_metrics(directory, file_name=EARLIER_STAGES_FILE):
        stages.setdefault(record["stage"], []).append(record)
    return [stages[number] for number in sorted(stages)]


def read_all_stages(directory: Path) -> list[list[dict[str, Any]]]:
    """The records of every stage, the run's own last."""
    return [*_split_stages(directory), read_metrics(directory)]


def describe_settings(settings: Mapping[str, Any]) -> str:
    """Markdown tables of a run's settings, one for each group: `{"arguments": {"lr": 1e-3}, ...}`."""
    groups = {name: value for name, value in settings.items() if isinstance(value, Mapping)}
    rest = {name: value for name, value in settings.items() if name not in groups}
    if rest:
        groups["run"] = rest
    parts = []
    for name, group in groups.items():
        rows = [f"| {key} | {_as_cell(value)} |" for key, value in group.items()]
        parts.append("\n".join([f"### {name}", "", "| name | value |", "| --- | --- |", *rows]))
    return "\n\n".join(parts)


def _as_cell(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return "`" + text.replace("|", "\\|").replace("`", "'") + "`" if text else ""


class MetricsWriter:
    """Writes the metrics of a run; made on rank 0 only.

    Args:
        start_step: step that the run continues from. At 0, what an earlier run left is moved to `previous-N`;
            otherwise metrics and TensorBoard are cut back to that step. What no run left is moved too.
        settings: the run's arguments, layout, data and versions, shown as text in TensorBoard.
        weights: directory that the run's weights came from. If an earlier run left them, its metrics are kept
            beside the new ones, for the picture of the stages.
    """

    def __init__(
        self, directory: Path, start_step: int, settings: Mapping[str, Any], weights: Path | None = None
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        kept = read_metrics(directory, start_step) if start_step else []
        # Read before anything moves: a stage may use the directory of the one before.
        earlier = read_earlier_stages(weights) if weights is not None and start_step == 0 else []
        old_events = sorted(directory.glob("events.out.tfevents.*"))
        if start_step and kept:  # the run's own, drawn again up to the step that it continues from
            for path in old_events:
                path.unlink()
        else:
            _move_aside(directory, old_events)
        if earlier:
            _write_earlier_stages(directory, earlier)
        self._works = True
        self._board = SummaryWriter(str(directory))
        self._board.add_text("arguments", describe_settings(settings), 0)
        self._begin_with(kept)
        for record in kept:
            self._add_scalars(record)

    def _begin_with(self, records: list[dict[str, Any]]) -> None:
        """Replaces the file, which stays whole should the process die now, and appends from here on."""
        path = self.directory / METRICS_FILE
        write_text_atomically(path, "".join(json.dumps(record) + "\n" for record in records))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, record: dict[str, Any]) -> None:
        """Appends one object for an optimizer step; `step` and `tokens` are compulsory.

        A value that is not finite (the gradient norm of an fp16 step that overflowed) is null: JSON has no
        word for it.
        """
        record = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
            self._add_scalars(record)
        except OSError as error:
            if self._works:
                warn(
                    f"{self.directory}: metrics can't be written ({error.strerror}); training goes on without"
                )
            self._works = False

    def _add_scalars(self, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if value is None:
                continue
            tag = _TAGS.get(name)
            if name.startswith(_OF_ONE_SET):
                figure, _, set_name = name.partition("/")
                tag = f"{_TAGS[figure]}/{set_name.strip('/')}"
            if tag is not None:
                self._board.add_scalar(tag, value, record["step"])
            if name in _BY_TOKENS:
                self._board.add_scalar(_BY_TOKENS[name], value, record["tokens"])

    def complete_last(self, values: dict[str, Any]) -> None:
        """Adds values to the record of their step: those of an evaluation that was done after a resume.

        Where the earlier metrics are not (another directory, a line that power took), they are a record.
        """
        self._file.close()
        records = read_metrics(self.directory)
        found = records.pop() if records and records[-1]["step"] == values["step"] else {}
        last = {**found, **values}
        self._begin_with([*records, last])
        self._add_scalars({name: last[name] for name in (*values, "step", "tokens")})

    def close(self) -> None:
        # A full disk shows once more here; what could be written is.
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._board.close()


def _write_earlier_stages(directory: Path, stages: list[list[dict[str, Any]]]) -> None:
    """A copy, not a reference: directories of earlier runs are moved and reused."""
    lines = [
        json.dumps({**record, "stage": number}) + "\n"
        for number, records in enumerate(stages, start=1)
        for record in records
    ]
    write_text_atomically(directory / EARLIER_STAGES_FILE, "".join(lines))


def _move_aside(directory: Path, events: Iterable[Path]) -> None:
    names = (METRICS_FILE, EARLIER_STAGES_FILE, CURVES_FILE)
    paths = [*events, *(directory / name for name in names if (directory / name).exists())]
    if not paths:
        return
    number = 1
    while (directory / f"previous-{number}").exists():
        number += 1
    aside = directory / f"previous-{number}"
    aside.mkdir()
    for path in paths:
        shutil.move(str(path), aside / path.name)

"""The training loop: one for all plugins, with one state object."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from colossal_llama.dataset.labels import NO_LOSS_LABEL
from colossal_llama.training.checkpoint.writer import CheckpointWriter, SaveReport
from colossal_llama.training.data.collator import Collator
from colossal_llama.training.data.loader import make_loader
from colossal_llama.training.data.order import BatchShape, StepSampler
from colossal_llama.training.data.rows import RowDataset
from colossal_llama.training.evaluation import Evaluator, describe_evaluation, evaluation_figures
from colossal_llama.training.llama.compiling import count_graphs
from colossal_llama.training.llama.weight_checks import looks_untrained
from colossal_llama.training.reporting.figures import RankFigures
from colossal_llama.training.reporting.metrics import MetricsWriter
from colossal_llama.training.reporting.set_figures import PASSES, SHARE, SetFigures
from colossal_llama.training.reporting.throughput import ThroughputMeter
from colossal_llama.training.resilience.interruption import StopRequest, warn_of_launcher_limit
from colossal_llama.training.state import TrainState
from colossal_llama.utils.console import format_table, log, progress_bar, warn
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.messages import join_names

if TYPE_CHECKING:
    from colossal_llama.training.run import Run


@dataclass
class StepOutcome:
    """Attributes:
    record: the step's metrics.
    epoch_ended: it was the last step of its epoch.
    stop_requested: on some rank; all ranks agree.
    save_is_written: every rank has written its share of the save in progress.
    """

    record: dict[str, Any]
    epoch_ended: bool
    stop_requested: bool
    save_is_written: bool


# A run continues when a save fails (a full disk can be cleared), but not for ever.
MAX_FAILED_SAVES = 3


class TrainingLoop:
    """Runs optimizer steps from `state` to the end, or until a stop is requested.

    Args:
        run: what is trained, on what, and how.
        writer: saves checkpoints; None saves nothing (benchmarks).
        metrics: on rank 0; None elsewhere.
        meter: measures phases for `--benchmark`; None otherwise.
    """

    def __init__(
        self,
        run: Run,
        state: TrainState,
        writer: CheckpointWriter | None,
        metrics: MetricsWriter | None,
        stop: StopRequest,
        meter: ThroughputMeter | None = None,
    ) -> None:
        self.settings, self.plugin, self.inputs = run.settings, run.plugin, run.inputs
        self.dataset, self.schedule = run.inputs.dataset, run.plan.schedule
        self.order, self.planned_sets = run.plan.order, run.plan.sets
        peak = self.settings.adaptation.lr_embeddings
        self.embeddings_schedule = None if peak is None else replace(self.schedule, peak=peak)
        self.state, self.writer, self.metrics = state, writer, metrics
        self.stop, self.meter = stop, meter
        layout, max_steps = self.plugin.layout, self.settings.optimizer.max_steps
        self.batch_shape = BatchShape(
            layout.batch_size, layout.accumulation_steps, layout.dp_size, self.plugin.dp_rank
        )
        total_steps = self.schedule.total_steps - state.schedule_offset
        self.last_step = total_steps if max_steps < 0 else min(max_steps, total_steps)
        self.set_figures: SetFigures | None = None
        if self.plugin.row_losses is not None:
            self.set_figures = SetFigures(self.dataset, self.plugin.row_losses, self.plugin.device)
            self.set_figures.begin(state)
        self.failed_saves = 0
        # A checkpoint of this step exists or is being written.
        self.saved_step = state.step if state.step else -1
        self.saves: list[SaveReport] = []
        self.start_state = replace(state)
        self.first_record: dict[str, Any] | None = None
        self.last_record: dict[str, Any] = {}
        self.steps_without_loss = 0
        # Of steps that made graphs of --compile, which their speed leaves out: how many, seconds, tokens.
        self.compiling = np.zeros(3)
        self.sets_without_loss: set[str] = set()
        self.evaluator = Evaluator(
            self.inputs.evaluation_sets,
            self.plugin,
            self.batch_shape,
            self._make_collator,
            self.inputs.tokenizer,
        )
        self.started = time.perf_counter()

    def run(self) -> bool:
        """Trains; returns whether the run came to its end (False: it was asked to stop, and has saved)."""
        state = self.state
        batches = self.batches()
        bar = progress_bar(total=self.last_step, initial=state.step, desc="train", unit="step")
        stopped = False
        if state.step >= self.last_step:
            log(
                f"Nothing is left to train: {state.step} steps are done, and the run ends at {self.last_step}"
            )
        if state.evaluation_due and self.inputs.evaluation_sets:
            stopped = self._evaluate_again()
        if state.step == 0 and self.settings.data.eval_at_start:
            stopped = self._evaluate_at_start()
        while state.step < self.last_step and not stopped:
            outcome = self.step(batches)
            record, stopped = outcome.record, outcome.stop_requested
            bar.update()
            shown = f"{record['loss']:.4f}" if "loss" in record else "none"
            bar.set_postfix(loss=shown, lr=f"{record['lr']:.2e}", refresh=False)
            state.evaluation_due = self._evaluation_is_due(outcome.epoch_ended)
            if state.evaluation_due and not stopped:
                stopped = self._evaluate(record)
            if "loss" in record:
                self.first_record = self.first_record or record
            self.last_record = {"loss": self.last_record.get("loss"), **record}
            if self.metrics is not None:
                self.metrics.write(record)
            if outcome.save_is_written:
                self._finish_save()
            if self._save_is_due(outcome.epoch_ended) or stopped:
                self._save(is_last=stopped or state.step == self.last_step)
        if self.writer is not None and self.writer.is_saving:
            self._finish_save()
        bar.close()
        del batches  # ends the loader's processes
        return not stopped

    def summary(self) -> str:
        """A table of what this process's run did, for people."""
        state, seconds = self.state, time.perf_counter() - self.started
        steps, tokens = state.step - self.start_state.step, state.tokens - self.start_state.tokens
        rows = [("steps", f"{state.step:,} of {self.schedule.total_steps - state.schedule_offset:,}")]
        if self.start_state.step:
            rows.append(("steps of this run", f"{steps:,}"))
        rows += [
            ("tokens", f"{state.tokens:,}"),
            ("time", f"{timedelta(seconds=round(seconds))}"),
            ("tokens/s", self._tokens_per_second(tokens, seconds)),
        ]
        if self.compiling.any():
            rows.append(
                (
                    "steps that compiled",
                    f"{self.compiling[0]:.0f}, {self.compiling[1]:.1f} s, not in tokens/s",
                )
            )
        if self.steps_without_loss:
            rows.append(("steps without loss", f"{self.steps_without_loss:,}"))
        if self.first_record is not None:
            rows.append(
                ("loss, first to last", f"{self.first_record['loss']:.4f} to {self.last_record['loss']:.4f}")
            )
        if "eval_loss" in self.last_record:
            rows.append(("evaluation loss", f"{self.last_record['eval_loss']:.4f}"))
        if "eval_bits_per_byte" in self.last_record:
            rows.append(("bits per byte", f"{self.last_record['eval_bits_per_byte']:.4f}"))
        if self.saves:
            paused = sum(report.pause_seconds for report in self.saves)
            rows.append(("checkpoints", f"{len(self.saves)}, training paused {paused:.1f} s for them"))
        for each in self.planned_sets:
            if SHARE + each.name in self.last_record:
                share, passes = self.last_record[SHARE + each.name], self.last_record[PASSES + each.name]
                wanted = "" if each.wanted is None else f" (wanted {each.wanted:.2%})"
                rows.append((f"share of {each.name}", f"{share:.2%}{wanted}, {passes:.2f} passes"))
        return format_table(("training", ""), rows)

    def _tokens_per_second(self, tokens: int, seconds: float) -> str:
        """Without the steps that compiled."""
        steps, compiling_seconds, compiling_tokens = self.compiling
        if steps and tokens == compiling_tokens:
            return "none: every step compiled"
        return f"{(tokens - compiling_tokens) / max(seconds - compiling_seconds, 1e-9):,.0f}"

    def batches(self) -> Iterator[dict[str, Any]]:
        """Collated micro-batches of this rank, from the state's position to the end of the last epoch."""
        state = self.state
        wanted, optimizer = self.settings.data, self.settings.optimizer
        sampler = StepSampler(self.order, self.batch_shape, state.epoch, state.position, optimizer.num_epochs)
        loader = make_loader(
            self.dataset,
            sampler,
            self._make_collator(self.dataset),
            wanted.num_workers,
            pin_memory=self.plugin.on_gpu,
        )
        return iter(loader)

    def _make_collator(self, dataset: RowDataset) -> Collator:
        wanted = self.settings.data
        return Collator(
            dataset,
            pad_token_id=self.inputs.pad_token_id,
            pad_to=wanted.max_length if wanted.padding_mode == "max_length" else None,
            isolate_documents=wanted.isolate_documents,
            vocab_size=self.inputs.config.vocab_size,
            multiple_of=self.plugin.layout.length_multiple,
        )

    def _phase(self, name: str) -> Any:
        return nullcontext() if self.meter is None else self.meter.phase(name)

    def step(self, batches: Iterator[dict[str, Any]]) -> StepOutcome:
        """One optimizer step."""
        plugin, state = self.plugin, self.state
        started = time.perf_counter()
        compiles = plugin.layout.compile
        num_graphs = count_graphs() if compiles else 0
        with self._phase("data"):
            collated = [next(batches) for _ in range(self.plugin.layout.accumulation_steps)]
            problem = next((batch["problem"] for batch in collated if batch["problem"]), None)
            if problem:
                raise UserError(problem, this_rank_only=True)
            figures = RankFigures()
            figures.record("labels", sum(int((batch["labels"] != NO_LOSS_LABEL).sum()) for batch in collated))
            figures.record("tokens", sum(batch["num_tokens"] for batch in collated))
            figures.record("stop", self.stop.requested, "any")
            figures.record("written", self.writer is not None and self.writer.is_written, "all")
            if self.set_figures is not None:
                self.set_figures.record_counts(figures, collated)
            counts = figures.reduce(plugin.sum_counts, plugin.layout.dp_size)
            num_labels, num_tokens = int(counts["labels"]), int(counts["tokens"])
            device_batches = [plugin.to_device(batch) for batch in collated]
        own_loss = plugin.run_passes(device_batches, num_labels, state.step, self._phase)
        with self._phase("sum of losses"):
            figures = RankFigures()
            figures.record("loss", own_loss)
            if compiles:
                figures.record("compiled", count_graphs() - num_graphs, "any")
            if self.set_figures is not None:
                self.set_figures.record_losses(figures)
            losses = figures.reduce(plugin.sum_losses, plugin.layout.dp_size)
            loss = losses["loss"] / max(1.0, num_labels)
        if not math.isfinite(loss):
            self._stop_at_broken_loss(loss, own_loss, collated)
        if (
            self.writer is not None
            and state.step == 0
            and num_labels
            and looks_untrained(loss, plugin.causal_lm.config.vocab_size)
        ):
            warn(
                f"the first loss is {loss:.3f}, what a model with random weights gives "
                f"(ln of the vocabulary is {math.log(plugin.causal_lm.config.vocab_size):.3f}); "
                f"are the weights of --pretrained {self.settings.data.pretrained} the ones you meant?"
            )
        schedule_step = state.step + state.schedule_offset
        learning_rate, embeddings_rate = self.schedule.at(schedule_step), None
        if self.embeddings_schedule is not None:
            embeddings_rate = self.embeddings_schedule.at(schedule_step)
        with self._phase("optimizer"):
            grad_norm, skipped = plugin.optimizer_step(learning_rate, embeddings_rate)
        if not skipped and not math.isfinite(grad_norm):
            self._stop_at_broken_loss(grad_norm, own_loss, collated, what="gradient norm")
        epoch = state.epoch
        epoch_rows = self.order.epoch_rows(epoch)
        epoch_ended = state.advance(self.batch_shape.rows_per_step, num_tokens, epoch_rows)
        of_sets = {}
        if self.set_figures is not None:
            of_sets = self.set_figures.end_step(counts, losses, state)
        seconds = time.perf_counter() - started
        has_compiled = compiles and bool(losses["compiled"])
        if has_compiled:
            self.compiling += (1, seconds, num_tokens)
            log(
                f"step {state.step}: decoder layers were compiled ({count_graphs()} graphs so far); "
                f"the step took {seconds:.1f} s and is left out of tokens/s"
            )
        if self.meter is not None:
            lengths = torch.cat([_document_lengths(batch["document_index"]) for batch in collated]).double()
            squares = float((lengths**2).sum())
            self.meter.end_step(num_tokens, float(lengths.sum()), squares, has_compiled)
        record = {
            "step": state.step,
            "epoch": epoch,
            "tokens": state.tokens,
            **({"loss": loss} if num_labels else {}),
            "lr": learning_rate,
            **({} if embeddings_rate is None else {"lr_embeddings": embeddings_rate}),
            "grad_norm": grad_norm,
            **({} if has_compiled else {"tokens_per_second": num_tokens / seconds}),
            "step_seconds": seconds,
            **of_sets,
        }
        if not num_labels:
            self._count_step_without_loss()
        scale = plugin.loss_scale_state().get("scale")
        if scale is not None:
            record["loss_scale"] = scale
        if skipped:
            log(
                f"step {state.step}: fp16 gradients overflowed; the step was left out, the loss scale lowered"
            )
        return StepOutcome(record, epoch_ended, bool(counts["stop"]), bool(counts["written"]))

    def _count_step_without_loss(self) -> None:
        """Data of earlier versions, or of other programs, may hold rows in which no token has loss."""
        self.steps_without_loss += 1
        if self.steps_without_loss == 1:
            warn(
                f"step {self.state.step}: no token of its rows has loss, so nothing is learned from them and "
                "the step has no loss in the metrics; prepare the data again. Further steps of this kind are "
                "counted, not listed"
            )

    def _stop_at_broken_loss(
        self, value: float, own_loss: torch.Tensor, collated: list[dict[str, Any]], what: str = "loss"
    ) -> None:
        """Ends the run, naming step, rank and rows; nothing of this step is saved. All ranks get here."""
        if self.writer is not None and self.writer.is_saving:
            self._finish_save()
        step = self.state.step + 1
        if not bool(torch.isfinite(own_loss)) or what != "loss":
            rows = [int(row) for batch in collated for row in batch["row_index"]]
            named = join_names([self.dataset.describe_row(row) for row in rows], most=8, separator="; ")
            rank = torch.distributed.get_rank()
            raise UserError(
                f"step {step}: the {what} is {value} (rank {rank}, rows: {named}). Training stopped "
                "and saved nothing of it; the last checkpoint is sound. Look at these rows, lower --lr, or "
                "use bf16",
                this_rank_only=True,
                exit_code=1,
            )
        raise UserError(
            f"step {step}: the {what} is {value} on another rank, which names its rows. Training stopped",
            exit_code=1,
        )

    def _evaluation_is_due(self, epoch_ended: bool) -> bool:
        if not self.inputs.evaluation_sets:
            return False
        if self.state.step == self.last_step:
            return True
        interval = self.settings.data.eval_interval
        return epoch_ended if interval == 0 else self.state.step % interval == 0

    def _evaluate_at_start(self) -> bool:
        """What the model is worth before its first step, as the record of step 0; as `_evaluate`."""
        record: dict[str, Any] = {"step": 0, "epoch": 0, "tokens": 0}
        stopped = self._evaluate(record)
        if self.metrics is not None and not stopped:
            self.metrics.write(record)
        return stopped

    def _evaluate_again(self) -> bool:
        """Makes up for the evaluation that the stop of the run has cut short; as `_evaluate`."""
        results: dict[str, Any] = {"step": self.state.step, "tokens": self.state.tokens}
        stopped = self._evaluate(results)
        if self.metrics is not None and not stopped:
            self.metrics.complete_last(results)
        return stopped

    def _evaluate(self, record: dict[str, Any]) -> bool:
        """Adds to the record what the evaluation sets say, all together and each.

        Returns:
            Whether a stop was asked for: then nothing is added, and `state.evaluation_due` stays.
        """
        sums = self.evaluator.measure(lambda: self.stop.requested)
        if sums is None:
            log(f"step {self.state.step}: the evaluation was cut short; the resumed run does it again")
            return True
        for name, each in sums.items():
            if not each.tokens and name not in self.sets_without_loss:
                warn(f"--eval_dataset {name}: no token of it has loss; it has no evaluation loss")
                self.sets_without_loss.add(name)
        figures = evaluation_figures(sums)
        if figures:
            log(describe_evaluation(self.state.step, figures))
        record.update(figures)
        self.state.evaluation_due = False
        return False

    def _save_is_due(self, epoch_ended: bool) -> bool:
        interval, step = self.settings.output.save_interval, self.state.step
        at_interval = interval > 0 and step % interval == 0
        at_epoch = epoch_ended and not self.settings.output.skip_save_each_epoch
        return at_interval or at_epoch or step == self.last_step

    def _save(self, is_last: bool) -> None:
        """Begins a save; the last one is waited for."""
        if self.writer is None or self.saved_step == self.state.step:
            return
        if self.writer.is_saving:
            self._finish_save()
        try:
            self.writer.begin(self.state)
            self.saved_step = self.state.step
        except OSError as error:
            self._report_failed_save(error, is_last)
            return
        if is_last or not self.writer.in_background:
            self._finish_save(is_last)

    def _finish_save(self, is_last: bool = False) -> None:
        try:
            report = self.writer.finish()
        except OSError as error:
            self._report_failed_save(error, is_last)
            return
        self.failed_saves = 0
        self.saves.append(report)
        log(str(report))
        if len(self.saves) == 1 or report.seconds > 2 * self.saves[-2].seconds:
            warn_of_launcher_limit(report.seconds)

    def _report_failed_save(self, error: OSError, is_last: bool) -> None:
        """A failure is reported loudly and the run continues, unless several saves in a row failed."""
        self.failed_saves += 1
        if self.failed_saves >= MAX_FAILED_SAVES or is_last:
            in_a_row = f", {self.failed_saves} times in a row" if self.failed_saves > 1 else ""
            remedy = "free space on the disk of --save_dir, or make it writable,"
            if not getattr(error, "is_disk", True):
                remedy = "the disk is not to blame; remove the cause that is named"
            raise UserError(
                f"{error}{in_a_row}. Earlier checkpoints are kept: {remedy} and continue with "
                "--load_checkpoint latest",
                exit_code=1,
            ) from None
        warn(
            f"{error}; earlier checkpoints are kept, training goes on "
            f"({self.failed_saves} of {MAX_FAILED_SAVES} failures in a row)"
        )


def _document_lengths(document_index: torch.Tensor) -> torch.Tensor:
    """Lengths of all documents in [rows, length] document numbers; padding is not counted."""
    offset = document_index + torch.arange(document_index.size(0))[:, None] * (document_index.size(1) + 1)
    return torch.unique(offset[document_index >= 0], return_counts=True)[1]

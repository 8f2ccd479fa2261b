"""The training loop: one for all plugins, with one state object."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch

from colossal_llama.dataset.loader import (
    BatchPlan,
    Collator,
    EvaluationSampler,
    PreparedDataset,
    RowOrder,
    RowSource,
    StepSampler,
    make_loader,
)
from colossal_llama.training.checkpoint import CheckpointWriter, SaveReport
from colossal_llama.training.interruption import StopRequest, warn_of_launcher_limit
from colossal_llama.training.loss import IGNORE_INDEX
from colossal_llama.training.metrics import MetricsWriter
from colossal_llama.training.model import looks_untrained
from colossal_llama.training.schedule import LearningRateSchedule
from colossal_llama.training.state import TrainState
from colossal_llama.training.strategy import Strategy
from colossal_llama.training.throughput import ThroughputMeter
from colossal_llama.utils.console import format_table, log, progress_bar, warn
from colossal_llama.utils.errors import UserError


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


# A run goes on when a save fails (a full disk can be cleared), but not for ever.
MAX_FAILED_SAVES = 3


class Trainer:
    """Runs optimizer steps from `state` to the end, or until a stop is requested.

    Args:
        collator: for training rows; evaluation rows use the same settings.
        writer: saves checkpoints; None saves nothing (benchmarks).
        metrics: on rank 0; None elsewhere.
        meter: measures phases for `--benchmark`; None otherwise.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        strategy: Strategy,
        source: RowSource,
        evaluation_sets: dict[str, PreparedDataset],
        collator_settings: dict[str, Any],
        schedule: LearningRateSchedule,
        state: TrainState,
        writer: CheckpointWriter | None,
        metrics: MetricsWriter | None,
        stop: StopRequest,
        meter: ThroughputMeter | None = None,
    ) -> None:
        self.args, self.strategy, self.source = args, strategy, source
        self.evaluation_sets, self.collator_settings = evaluation_sets, collator_settings
        self.schedule, self.state, self.writer, self.metrics = schedule, state, writer, metrics
        self.stop, self.meter = stop, meter
        self.plan = BatchPlan(args.batch_size, args.accumulation_steps, strategy.dp_size, strategy.dp_rank)
        total_steps = schedule.total_steps - state.schedule_offset
        self.last_step = total_steps if args.max_steps < 0 else min(args.max_steps, total_steps)
        self.failed_saves = 0
        # A checkpoint of this step exists or is being written.
        self.saved_step = state.step if state.step else -1
        self.saves: list[SaveReport] = []
        self.start_state = replace(state)
        self.first_record: dict[str, Any] | None = None
        self.last_record: dict[str, Any] = {}
        self.steps_without_loss = 0
        self.sets_without_loss: set[str] = set()
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
        if state.evaluation_due and self.evaluation_sets:
            stopped = self._evaluate_again()
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
            ("tokens/s", f"{tokens / max(seconds, 1e-9):,.0f}"),
        ]
        if self.steps_without_loss:
            rows.append(("steps without loss", f"{self.steps_without_loss:,}"))
        if self.first_record is not None:
            rows.append(
                ("loss, first to last", f"{self.first_record['loss']:.4f} to {self.last_record['loss']:.4f}")
            )
        if "eval_loss" in self.last_record:
            rows.append(("evaluation loss", f"{self.last_record['eval_loss']:.4f}"))
        if self.saves:
            paused = sum(report.pause_seconds for report in self.saves)
            rows.append(("checkpoints", f"{len(self.saves)}, training paused {paused:.1f} s for them"))
        return format_table(("training", ""), rows)

    def batches(self) -> Iterator[dict[str, Any]]:
        """Collated micro-batches of this rank, from the state's position to the end of the last epoch."""
        state = self.state
        order = RowOrder(self.source, self.args.seed, self.args.bucketed)
        sampler = StepSampler(order, self.plan, state.epoch, state.position, self.args.num_epochs)
        collator = Collator(self.source, **self.collator_settings)
        on_gpu = self.strategy.device.type == "cuda"
        return iter(make_loader(self.source, sampler, collator, self.args.num_workers, pin_memory=on_gpu))

    def _phase(self, name: str) -> Any:
        return nullcontext() if self.meter is None else self.meter.phase(name)

    def step(self, batches: Iterator[dict[str, Any]]) -> StepOutcome:
        """One optimizer step."""
        strategy, state = self.strategy, self.state
        started = time.perf_counter()
        with self._phase("data"):
            collated = [next(batches) for _ in range(self.args.accumulation_steps)]
            problem = next((batch["problem"] for batch in collated if batch["problem"]), None)
            if problem:
                raise UserError(problem, this_rank_only=True)
            counts = torch.tensor(
                [
                    sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in collated),
                    sum(batch["num_tokens"] for batch in collated),
                    float(self.stop.requested),
                    float(self.writer is not None and self.writer.is_written),
                ],
                dtype=torch.float64,
            )
            num_labels, num_tokens, stop_requests, written = strategy.sum_counts(counts).tolist()
            device_batches = [strategy.to_device(batch) for batch in collated]
        own_loss = strategy.run_passes(device_batches, int(num_labels), state.step, self._phase)
        with self._phase("sum of losses"):
            loss = float(strategy.sum_losses(own_loss.double()[None])[0]) / max(1.0, num_labels)
        if not math.isfinite(loss):
            self._stop_at_broken_loss(loss, own_loss, collated)
        if (
            self.writer is not None
            and state.step == 0
            and num_labels
            and looks_untrained(loss, strategy.causal_lm.config.vocab_size)
        ):
            warn(
                f"the first loss is {loss:.3f}, what a model with random weights gives "
                f"(ln of the vocabulary is {math.log(strategy.causal_lm.config.vocab_size):.3f}); "
                f"are the weights of --pretrained {self.args.pretrained} the ones you meant?"
            )
        learning_rate = self.schedule.at(state.step + state.schedule_offset)
        with self._phase("optimizer"):
            grad_norm, skipped = strategy.optimizer_step(learning_rate)
        if not skipped and not math.isfinite(grad_norm):
            self._stop_at_broken_loss(grad_norm, own_loss, collated, what="gradient norm")
        epoch = state.epoch
        epoch_ended = state.advance(self.plan.rows_per_step, int(num_tokens), len(self.source))
        seconds = time.perf_counter() - started
        if self.meter is not None:
            lengths = torch.cat([_document_lengths(batch["document_index"]) for batch in collated]).double()
            self.meter.end_step(int(num_tokens), float(lengths.sum()), float((lengths**2).sum()))
        record = {
            "step": state.step,
            "epoch": epoch,
            "tokens": state.tokens,
            **({"loss": loss} if num_labels else {}),
            "lr": learning_rate,
            "grad_norm": grad_norm,
            "tokens_per_second": num_tokens / seconds,
            "step_seconds": seconds,
        }
        if not num_labels:
            self._count_step_without_loss()
        scale = strategy.loss_scale_state().get("scale")
        if scale is not None:
            record["loss_scale"] = scale
        if skipped:
            log(
                f"step {state.step}: fp16 gradients overflowed; the step was left out, the loss scale lowered"
            )
        save_is_written = round(written / strategy.dp_size * 1e6) == 1e6
        return StepOutcome(record, epoch_ended, stop_requests > 0, save_is_written)

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
            named = "; ".join(self.source.describe_row(row) for row in rows[:8])
            more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
            rank = torch.distributed.get_rank()
            raise UserError(
                f"step {step}: the {what} is {value} (rank {rank}, rows: {named}{more}). Training stopped "
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
        if not self.evaluation_sets:
            return False
        if self.state.step == self.last_step:
            return True
        interval = self.args.eval_interval
        return epoch_ended if interval == 0 else self.state.step % interval == 0

    def _evaluate_again(self) -> bool:
        """Makes up for the evaluation that the stop of the run has cut short; as `_evaluate`."""
        results: dict[str, Any] = {"step": self.state.step, "tokens": self.state.tokens}
        stopped = self._evaluate(results)
        if self.metrics is not None and not stopped:
            self.metrics.complete_last(results)
        return stopped

    def _evaluate(self, record: dict[str, Any]) -> bool:
        """Adds to the record: token-mean loss and perplexity over all evaluation sets together, and the loss
        of each.

        Returns:
            Whether a stop was asked for: then nothing is added, and `state.evaluation_due` stays.
        """
        totals = torch.zeros(2, dtype=torch.float64)
        results: dict[str, float] = {}
        for name, dataset in self.evaluation_sets.items():
            sums = self._evaluate_set(dataset)
            if sums is None:
                log(f"step {self.state.step}: the evaluation was cut short; the resumed run does it again")
                return True
            totals += sums
            if not sums[1]:
                if name not in self.sets_without_loss:
                    warn(f"--eval_dataset {name}: no token of it has loss; it has no evaluation loss")
                self.sets_without_loss.add(name)
            elif len(self.evaluation_sets) > 1:
                results[f"eval_loss/{name}"] = float(sums[0] / sums[1])
        if totals[1]:
            loss = float(totals[0] / totals[1])
            results.update(eval_loss=loss, eval_perplexity=math.exp(min(loss, 700.0)))
            log(
                f"step {self.state.step}: evaluation loss {loss:.4f}, perplexity "
                f"{results['eval_perplexity']:.2f}"
            )
        record.update(results)
        self.state.evaluation_due = False
        return False

    def _evaluate_set(self, dataset: PreparedDataset) -> torch.Tensor | None:
        """[summed loss, tokens with loss] over a data set and all ranks; None when a stop was asked for."""
        sampler = EvaluationSampler(len(dataset), self.plan)
        loader = make_loader(
            dataset, sampler, Collator(dataset, **self.collator_settings), 0, pin_memory=False
        )
        loss_sum, num_labels = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        for batch in progress_bar(loader, total=len(sampler), desc="evaluate", leave=False):
            if batch["problem"]:
                raise UserError(batch["problem"], this_rank_only=True)
            stop = torch.tensor([float(self.stop.requested)], dtype=torch.float64)
            if self.strategy.sum_counts(stop).item() > 0:
                return None
            num_labels += int((batch["labels"] != IGNORE_INDEX).sum())
            loss_sum += self.strategy.evaluate_pass(self.strategy.to_device(batch)).double().cpu()
        return torch.cat([self.strategy.sum_losses(loss_sum), self.strategy.sum_counts(num_labels)]).cpu()

    def _save_is_due(self, epoch_ended: bool) -> bool:
        interval, step = self.args.save_interval, self.state.step
        at_interval = interval > 0 and step % interval == 0
        at_epoch = epoch_ended and not self.args.skip_save_each_epoch
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
        """A failure is reported loudly and the run goes on, unless several saves in a row failed."""
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

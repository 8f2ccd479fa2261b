"""One run of `train.py`: prepared from its settings, then trained.

    settings ─▶ inputs, plugin ─▶ plan ─▶ boosted model ─▶ loop ─▶ checkpoints, metrics

`train.py`, `--dry_run` and the benchmarks all go through here.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from colossal_llama.model.model_config import find_context_length
from colossal_llama.training.checkpoint.directories import list_checkpoints, resolve_checkpoint
from colossal_llama.training.checkpoint.kept_optimizer import KeptOptimizer
from colossal_llama.training.checkpoint.model_files import ModelFiles, prepare_model_files
from colossal_llama.training.checkpoint.modeling_files import ADAPTER_DIRECTORY, MODELING_DIRECTORY
from colossal_llama.training.checkpoint.record import RunRecord, SavedRun, installed_versions, model_facts
from colossal_llama.training.checkpoint.resume import (
    check_adapter_base,
    check_resumable,
    continue_at_same_row,
    find_checkpoint,
    refuse_used_save_dir,
    resume_schedule,
    warn_of_later_checkpoints,
)
from colossal_llama.training.checkpoint.writer import CheckpointWriter
from colossal_llama.training.costs import estimate_cost, find_device, format_cost
from colossal_llama.training.data.answer_ends import find_answer_ends
from colossal_llama.training.data.prepared_rows import PreparedDataset, sum_lengths
from colossal_llama.training.data.rows import RowDataset
from colossal_llama.training.data.templates import DataTemplate, find_data_template
from colossal_llama.training.extension_report import report_extension
from colossal_llama.training.inputs import Inputs, open_inputs
from colossal_llama.training.llama.adapters import add_lora, freeze_all_but_embeddings, is_embedding
from colossal_llama.training.llama.embedding_noise import EmbeddingNoise
from colossal_llama.training.llama.loading import (
    find_too_long_rows,
    is_weights_directory,
    load_causal_lm,
    random_causal_lm,
)
from colossal_llama.training.llama.weight_checks import check_weights
from colossal_llama.training.loop import TrainingLoop
from colossal_llama.training.memory import GIB, device_memory, memory_in_name, why_too_large
from colossal_llama.training.plan import RunPlan, format_plan, global_batch_line, make_plan
from colossal_llama.training.plugins import find_plugin
from colossal_llama.training.plugins.base import Plugin
from colossal_llama.training.process import check_outputs, lock_save_dir
from colossal_llama.training.reporting.curves import draw_curves
from colossal_llama.training.reporting.kernels import describe_kernels, kernel_warnings
from colossal_llama.training.reporting.metrics import MetricsWriter
from colossal_llama.training.reporting.throughput import ThroughputMeter
from colossal_llama.training.resilience.interruption import StopRequest
from colossal_llama.training.schedule import find_misfits
from colossal_llama.training.settings import RunSettings
from colossal_llama.training.state import TrainState
from colossal_llama.utils.console import log, warn
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.files import write_json

BENCHMARK_WARMUP_STEPS = 3


@dataclass(frozen=True)
class StartingPoint:
    """Where a run begins.

    Attributes:
        saved: the checkpoint that it continues from.
        stage_weights: weights that `--load_checkpoint` started the stage from, in place of `--pretrained`.
        optimizer: that of an earlier stage, which this one keeps.
        kept_arguments: values of flags that were not given and come from the checkpoint.
    """

    saved: SavedRun | None = None
    stage_weights: Path | None = None
    optimizer: KeptOptimizer | None = None
    kept_arguments: Mapping[str, Any] = field(default_factory=dict)

    def describe(self) -> str:
        """For people; empty for a run that begins with `--pretrained`."""
        if self.saved is not None:
            steps = self.saved.state.step
            return f"Continues {self.saved.checkpoint}: {steps:,} steps are done, and part of the plan"
        if self.optimizer is not None:
            saved = self.optimizer.saved
            return f"A new stage that keeps the optimizer of {saved.checkpoint}, step {saved.state.step:,}"
        return f"A new stage with the weights of {self.stage_weights}" if self.stage_weights else ""

    @property
    def adapter_run(self) -> SavedRun | None:
        """The run whose adapters training continues with, where there are any."""
        return self.saved if self.optimizer is None else self.optimizer.saved


@dataclass
class Run:
    """What is trained, on what and how: the inputs are open, and everything fits together.

    Attributes:
        plugin: not started before `boost`: a plan needs no process group.
    """

    settings: RunSettings
    inputs: Inputs
    plugin: Plugin
    plan: RunPlan

    @classmethod
    def prepare(cls, settings: RunSettings, world_size: int, dataset: RowDataset | None = None) -> Run:
        """Opens the inputs, checks that layout, model and machine fit, and plans.

        Args:
            dataset: rows in place of those that the settings name.

        Raises:
            UserError: with every problem that was found.
        """
        inputs = open_inputs(settings)
        if dataset is not None:
            inputs = replace(inputs, dataset=dataset)
        plugin = find_plugin(settings.layout.plugin)(settings, world_size)
        plugin.new_ids = inputs.new_ids
        too_long = find_too_long_rows(inputs.config, settings.data.max_length)
        if problems := [*plugin.model_conflicts(inputs.config), *too_long]:
            raise UserError(problems)
        return cls(settings, inputs, plugin, make_plan(plugin, inputs.config, inputs.dataset))

    def describe(self) -> str:
        """Tables of what the run will do, need and cost; warns of new pieces that the data hardly has."""
        settings, config, dataset = self.settings, self.inputs.config, self.inputs.dataset
        sums = sum_lengths(dataset, settings.data.isolate_documents)
        cost = estimate_cost(self.plan, config, sums, settings)
        parts = [
            format_plan(self.plan, self.plugin, self._more_of_the_plan()),
            format_cost(cost, settings.costs, settings.layout.mixed_precision),
        ]
        device = settings.costs.device_name or find_device()
        peak = max(estimate.peak for estimate in self.plan.memory)
        if device is not None and (available := memory_in_name(device)) and peak > available:
            warn(
                f"a process needs {peak / GIB:,.0f} GiB at its fullest, and {device} has "
                f"{available / GIB:,.0f}: try more processes, gemini or 3d (--tp, --pp), "
                "--use_grad_checkpoint, or a smaller --batch_size"
            )
        if extension := report_extension(settings.data.pretrained, config, dataset):
            parts.append(extension.describe())
            if warning := extension.rare_pieces():
                warn(warning)
        return "\n\n".join(parts)

    def _more_of_the_plan(self) -> list[tuple[str, object]]:
        """Of the inputs: a changed context, and what is evaluated when."""
        config, data = self.inputs.config, self.settings.data
        rows: list[tuple[str, object]] = []
        if self.settings.context.is_changed:
            rows.append(("positions of the model", find_context_length(config)))
            scaling = self.settings.context.rope_scaling
            rows.append(
                ("rotary base", f"{config.rope_theta:,g}{f', scaled by {scaling}' if scaling else ''}")
            )
        if sets := self.inputs.evaluation_sets:
            when = f"every {data.eval_interval:,} steps" if data.eval_interval else "at epoch ends"
            start = "at the start, " if data.eval_at_start else ""
            rows.append(("evaluation", f"{start}{when} and at the end"))
            rows.append(("evaluation rows", sum(len(each) for each in sets.values())))
            rows.append(("evaluation sets", ", ".join(sets)))
        return rows

    def train(self, stop: StopRequest) -> bool:
        """Trains to the end, or until a stop is asked for; returns whether it came to its end."""
        log(global_batch_line(self.plan, self.plugin))
        self._check_memory()
        with contextlib.ExitStack() as cleanup:
            lock_save_dir(self.settings.output, cleanup)
            start = self._find_start()
            record = self.make_record()
            record = replace(
                record,
                arguments={**record.arguments, **start.kept_arguments},
                stage_weights=_absolute(start.stage_weights),
            )
            self.plugin.start()
            self.plugin.choose_attention(self.inputs.config)
            log(describe_kernels(self.plugin))
            for message in kernel_warnings(self.plugin):
                warn(message)
            files = self._prepare_files_together(start)
            self.boost(start)
            base = self._check_adapter_base(start.adapter_run, self.plugin.loaded_sums)
            record = replace(record, adapter_base=base)
            writer = self.make_writer(record, files)
            if start.optimizer is not None:
                start.optimizer.restore(self.plugin)
            state = TrainState() if start.saved is None else self._resume(writer, start.saved)
            metrics = self._open_metrics(state, record, start, cleanup)
            if self.settings.output.benchmark:
                return self._run_benchmark(TrainingLoop(self, state, None, None, stop, self._make_meter()))
            loop = TrainingLoop(self, state, writer, metrics, stop)
            completed = loop.run()
            if completed:
                self._finish(writer, metrics, loop)
            else:
                log(loop.summary())
                log(
                    f"Stopped by {stop.reason or 'another rank'} after step {state.step}; continue with "
                    "--load_checkpoint latest"
                )
        return completed

    # ------------------------------------------------------------------ parts of `train`, for benchmarks too

    def boost(self, start: StartingPoint = StartingPoint()) -> None:
        """Loads the weights, decides what trains, and hands the model to the plugin."""
        adaptation, seed = self.settings.adaptation, self.settings.optimizer.seed
        causal_lm = model = self._load_model(start)
        if adaptation.freeze_non_embeds_params:
            freeze_all_but_embeddings(causal_lm)
        if adaptation.lora_rank:
            model = add_lora(
                causal_lm,
                adaptation.lora_rank,
                _find_adapter(start.adapter_run),
                seed,
                adaptation.trains_embeddings_beside_lora,
            )
        if len(self.inputs.dataset.sets) > 1:
            self.plugin.row_losses = []
        noise = EmbeddingNoise(adaptation.neft_alpha, seed) if adaptation.use_neft else None
        self.plugin.boost(model, causal_lm, noise)

    def make_writer(self, record: RunRecord, files: ModelFiles | None) -> CheckpointWriter:
        """What saves this run's checkpoints.

        Args:
            files: from `prepare_files`; the main process needs them.
        """
        output = self.settings.output
        return CheckpointWriter(
            output.save_dir,
            self.plugin,
            files,
            self.plan.schedule,
            output.save_total_limit,
            record,
            output.async_save,
        )

    def prepare_files(self, start: StartingPoint = StartingPoint()) -> ModelFiles:
        """What saves write beside the weights, made and tried out by this process.

        Raises:
            UserError: something of it could not be saved.
        """
        data, inputs = self.settings.data, self.inputs
        assert inputs.tokenizer is not None
        ends, template = None, DataTemplate()
        if isinstance(inputs.dataset, PreparedDataset):
            template = find_data_template(inputs.dataset)
            ends = find_answer_ends(inputs.dataset, inputs.tokenizer)
        if ends == []:
            warn(
                "--dataset: no token of the tokenizer's own ends its answers, so nothing will end those of "
                "the model; let the chat template write its end of turn inside what has loss"
            )
        weights, flag = self._find_weights(start)
        files = prepare_model_files(
            data.pretrained,
            weights or data.pretrained,
            flag,
            inputs.config,
            self.plugin.parameter_dtype,
            inputs.tokenizer,
            ends,
            template.carried,
            self.settings.adaptation.lora_rank,
            data.trust_remote_code,
        )
        for note in files.notes:
            warn(note)
        if isinstance(inputs.dataset, PreparedDataset):
            _report_template(template)
        return files

    # ------------------------------------------------------------------ the beginning

    def rehearse(self) -> None:
        """What a run checks between its plan and its first step, for `--dry_run`: in one process, from the
        files' headers where loading would take long, and without making or changing a file.

        Raises:
            UserError: the run would end with one too.
        """
        output, config = self.settings.output, self.inputs.config
        for dataset in (self.inputs.dataset, *self.inputs.evaluation_sets.values()):
            if isinstance(dataset, PreparedDataset):
                isolates = self.settings.data.isolate_documents
                if problem := dataset.find_bad_row(config.vocab_size, isolates):
                    raise UserError(problem)
        start = StartingPoint()
        if not output.benchmark:
            check_outputs(output)
            start = self._check_start(*resolve_checkpoint(output.load_checkpoint, output.save_dir))
            if beginning := start.describe():
                log(beginning)
            self.prepare_files(start)
        weights, flag = self._find_weights(start)
        if weights is None:
            return
        reads_tensors = self.settings.adaptation.lora_rank and start.adapter_run is not None
        dtype = self.plugin.parameter_dtype if reads_tensors else None
        sums = check_weights(weights, config, flag, dtype)
        if sums is not None:
            self._check_adapter_base(start.adapter_run, sums)

    def _check_memory(self) -> None:
        """A machine without enough memory ends a process without a word, or after minutes of loading."""
        available = device_memory()
        if available is not None and (reason := why_too_large(self.plan.memory, available)):
            raise UserError(f"--pretrained {self.settings.data.pretrained}: {reason}")

    def _find_start(self) -> StartingPoint:
        """What `--load_checkpoint` means for this run; a checkpoint fits it, or that is an error."""
        return self._check_start(*find_checkpoint(self.settings.output))

    def _check_start(self, checkpoint: Path | None, stage_weights: Path | None) -> StartingPoint:
        output = self.settings.output
        if checkpoint is None or output.keep_optimizer:
            refuse_used_save_dir(output)
            self._check_schedule()
            if checkpoint is not None:
                return self._keep_optimizer(SavedRun.read(checkpoint))
            if output.keep_optimizer:
                raise UserError(
                    f"--keep_optimizer: --load_checkpoint {output.load_checkpoint} holds weights alone; give "
                    "a step directory, or leave it out"
                )
            return StartingPoint(None, stage_weights)
        saved = SavedRun.read(checkpoint)
        check_resumable(saved, self.make_record(), self.settings, self.plugin.layout)
        schedule, kept = resume_schedule(saved, self.settings, self.plan)
        self.plan = replace(self.plan, schedule=schedule)
        self._check_schedule()
        return StartingPoint(saved, self._find_adapter_base(saved), kept_arguments=kept)

    def _keep_optimizer(self, saved: SavedRun) -> StartingPoint:
        """A new stage from a checkpoint's weights, or from a model that extends them, with its optimizer."""
        assert self.inputs.tokenizer is not None
        kept = KeptOptimizer.find(saved, self.settings, self.inputs.config, self.inputs.tokenizer)
        weights = self._find_adapter_base(saved)
        if not self.settings.adaptation.lora_rank and kept.known_rows is None:
            weights = saved.checkpoint / MODELING_DIRECTORY
        return StartingPoint(None, weights, kept)

    def _check_schedule(self) -> None:
        if problems := find_misfits(self.plan.schedule, self.plan.data_steps):
            raise UserError(problems)

    def make_record(self) -> RunRecord:
        dataset = self.inputs.dataset
        data: dict[str, Any] = {
            "fingerprint": dataset.fingerprint,
            "rows": len(dataset),
            "tokens": dataset.num_tokens,
        }
        if self.settings.data.dataset_weights is not None:  # the order depends on which rows are a set
            data["sets"] = [{"rows": each.num_rows, "tokens": each.num_tokens} for each in dataset.sets]
        return RunRecord(
            arguments=self.settings.as_json(),
            layout=self.plugin.layout.as_json(),
            data=data,
            rows_per_step=self.plan.rows_per_step,
            total_steps=self.plan.total_steps,
            model=model_facts(self.inputs.config, self.inputs.new_ids),
            versions=installed_versions(),
        )

    def _find_adapter_base(self, saved: SavedRun) -> Path | None:
        """The weights under a resumed run's adapters when its `--load_checkpoint` gave them, not
        `--pretrained`; `UserError` when they are no longer there.
        """
        if saved.record.stage_weights is None or not self.settings.adaptation.lora_rank:
            return None
        weights = Path(saved.record.stage_weights)
        if not is_weights_directory(weights):
            raise UserError(
                f"--load_checkpoint {saved.checkpoint}: its adapters belong to the weights in {weights}, "
                "which are not there; put them back"
            )
        return weights

    def _check_adapter_base(self, saved: SavedRun | None, sums: Mapping[str, float]) -> dict[str, Any] | None:
        """Which weights the adapters are trained on; a resumed run must have the same.

        Args:
            sums: of the values of each weight, by name, in the dtype of the parameters.
        """
        if not self.settings.adaptation.lora_rank or self.settings.output.benchmark:
            return None
        # Embeddings that train come from the checkpoint, not from the base.
        embeddings_train = self.settings.adaptation.trains_embeddings_beside_lora
        total = math.fsum(
            value
            for name, value in sums.items()
            if "lora_" not in name and not (embeddings_train and is_embedding(name))
        )
        base = {"dtype": str(self.plugin.parameter_dtype), "sum": total}
        check_adapter_base(base, saved, self.settings.data.pretrained)
        return base

    def _load_model(self, start: StartingPoint) -> Any:
        config, dtype = self.inputs.config, self.plugin.parameter_dtype
        weights, flag = self._find_weights(start)
        if weights is None:
            pretrained = self.settings.data.pretrained
            log(f"--benchmark: {pretrained} has no weights; training random ones of its shape")
            return random_causal_lm(config, dtype, self.settings.optimizer.seed)
        return load_causal_lm(weights, flag, config, dtype)

    def _find_weights(self, start: StartingPoint) -> tuple[str | None, str]:
        """The weights that training starts with, and the flag that named them; None for random ones."""
        if start.saved is not None and not self.settings.adaptation.lora_rank:
            return str(start.saved.checkpoint / MODELING_DIRECTORY), "--load_checkpoint"
        if start.stage_weights is not None:
            return str(start.stage_weights), "--load_checkpoint"
        pretrained = self.settings.data.pretrained
        has_weights = not self.settings.output.benchmark or is_weights_directory(Path(pretrained))
        return pretrained if has_weights else None, "--pretrained"

    def _prepare_files_together(self, start: StartingPoint) -> ModelFiles | None:
        """`prepare_files` on rank 0, the only one that returns any; the others hear how that went."""
        files: ModelFiles | None = None
        problems: list[list[str] | None] = [None]
        if self.settings.output.benchmark:
            return None
        if dist.get_rank() == 0:
            try:
                files = self.prepare_files(start)
            except UserError as error:
                problems = [error.problems]
            except Exception as error:  # the others wait
                reason = f"{type(error).__name__}: {error}"
                pretrained = self.settings.data.pretrained
                problems = [[f"--pretrained {pretrained}: saving it was tried out, and failed ({reason})"]]
        dist.broadcast_object_list(problems, src=0)
        if problems[0]:
            raise UserError(problems[0])
        return files

    def _resume(self, writer: CheckpointWriter, saved: SavedRun) -> TrainState:
        state = writer.load(saved)
        continue_at_same_row(saved, state, self.plan, self.settings.optimizer.num_epochs)
        log(f"Resumed from {saved.checkpoint}: step {state.step}, epoch {state.epoch}, row {state.position}")
        warn_of_later_checkpoints(self.settings.output, state)
        return state

    def _open_metrics(
        self, state: TrainState, record: RunRecord, start: StartingPoint, cleanup: contextlib.ExitStack
    ) -> MetricsWriter | None:
        output = self.settings.output
        if dist.get_rank() != 0 or output.benchmark:
            return None
        write_json(output.config_file, record.to_json())
        weights = start.stage_weights or Path(self.settings.data.pretrained)
        metrics = MetricsWriter(output.tensorboard_dir, state.step, record.to_json(), weights)
        cleanup.callback(metrics.close)
        return metrics

    # ------------------------------------------------------------------ the end

    def _finish(self, writer: CheckpointWriter, metrics: MetricsWriter | None, loop: TrainingLoop) -> None:
        final = _save_final_modeling(writer)
        if metrics is not None:
            metrics.close()
            draw_curves(self.settings.output.tensorboard_dir)
        log(loop.summary())
        log(f"Model: {final}")

    def _make_meter(self) -> ThroughputMeter:
        return ThroughputMeter(warmup_steps=BENCHMARK_WARMUP_STEPS)

    def _run_benchmark(self, loop: TrainingLoop) -> bool:
        from colossalai.accelerator import get_accelerator

        completed = loop.run()
        assert loop.meter is not None
        log(
            loop.meter.report(
                self.inputs.config,
                self.plugin.compute_dtype,
                self.plugin.layout.world_size,
                torch.cuda.get_device_name() if self.plugin.on_gpu else "cpu",
                get_accelerator().max_memory_allocated(),
            )
        )
        return completed


def _report_template(template: DataTemplate) -> None:
    """Says which chat template the saved model has."""
    carried = template.carried
    if carried is None or carried.text is None:
        log(f"Chat template: that of --pretrained, if it has one ({template.explain_kept()})")
        return
    log(f"Chat template: {carried.name}, as in the data; written into the model's tokenizer_config.json")
    if template.unnamed is not None:
        warn(
            f"--dataset {template.unnamed}: names no template (prepared by an earlier version?); the model "
            f"gets {carried.name}, of {template.part}"
        )


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())


def _find_adapter(saved: SavedRun | None) -> Path | None:
    """The adapters of a checkpoint: beside merged weights, or in their place."""
    if saved is None:
        return None
    merged = (saved.checkpoint / ADAPTER_DIRECTORY).is_dir()
    return saved.checkpoint / (ADAPTER_DIRECTORY if merged else MODELING_DIRECTORY)


def _save_final_modeling(writer: CheckpointWriter) -> Path:
    """`<save_dir>/modeling`; the last checkpoint has the same weights should this fail."""
    try:
        return writer.save_final_modeling()
    except OSError as error:
        last = list_checkpoints(writer.save_dir)[-1:]
        where = f"; the same weights are in {last[0] / MODELING_DIRECTORY}" if last else ""
        raise UserError(f"{error}{where}", exit_code=1) from None

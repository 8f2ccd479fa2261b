"""What `train.py` does before and after the loop: processes, inputs, model, records of the run."""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama.dataset.answer_ends import find_answer_ends
from colossal_llama.dataset.dummy_dataset import RandomRows
from colossal_llama.dataset.loader import PreparedDataset, RowSource, find_part_directories
from colossal_llama.tokenizer.fingerprint import tokenizer_fingerprint
from colossal_llama.tokenizer.tokenizer_files import REPORT_FILE
from colossal_llama.training.arguments import GEMINI_PLUGINS, new_rows_problems
from colossal_llama.training.checkpoint import SCHEDULE_FILE, changed_layout
from colossal_llama.training.checkpoint_directories import (
    STATE_FILE,
    checkpoint_step,
    find_damage,
    list_checkpoints,
    remove_leftovers,
    resolve_checkpoint,
)
from colossal_llama.training.interruption import StopRequest
from colossal_llama.training.model import (
    add_lora,
    check_weights,
    freeze_all_but_embeddings,
    is_embedding,
    is_weights_directory,
    load_causal_lm,
    load_config,
    load_tokenizer,
    random_causal_lm,
)
from colossal_llama.training.model_files import ModelFiles, prepare_model_files
from colossal_llama.training.modeling_files import ADAPTER_DIRECTORY
from colossal_llama.training.neftune import EmbeddingNoise
from colossal_llama.training.strategy import parameter_dtype
from colossal_llama.training.throughput import ThroughputMeter
from colossal_llama.utils import quiet
from colossal_llama.utils.console import log, warn
from colossal_llama.utils.errors import UserError, is_main_process
from colossal_llama.utils.files import (
    in_use_message,
    lock_holder,
    locked_directory,
    read_json,
    why_not_writable,
    write_json,
)
from colossal_llama.utils.lean_imports import lean_imports

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from transformers import LlamaConfig, PreTrainedTokenizerBase

    from colossal_llama.training.checkpoint import CheckpointWriter
    from colossal_llama.training.plan import TrainingPlan
    from colossal_llama.training.state import TrainState
    from colossal_llama.training.strategy import Strategy

BENCHMARK_WARMUP_STEPS = 3
_LOCK_PURPOSE = "a training run"
# Arguments that may differ between a run and its resumption; any other change is an error that names it.
_FREE_ARGUMENTS = {
    "load_checkpoint",
    "save_interval",
    "save_total_limit",
    "skip_save_each_epoch",
    "tensorboard_dir",
    "save_dir",
    "config_file",
    "num_workers",
    "max_steps",
    "eval_dataset",
    "eval_interval",
    "dataset",
    "pretrained",
    "dry_run",
    "benchmark",
    "num_samples",
    "trust_remote_code",
    "merge_lora",
    "deterministic",
    "async_save",
}
# Another layout is no error, and with it these may change too.
_LAYOUT_ARGUMENTS = ("plugin", "tp", "pp", "sp", "sp_mode", "enable_sequence_parallelism", "zero_stage")
_CHANGE_WITH_LAYOUT = (
    *_LAYOUT_ARGUMENTS,
    "batch_size",
    "accumulation_steps",
    "microbatch_size",
    "zero_cpu_offload",
    "use_grad_checkpoint",
    "use_flash_attn",
)
# What an argument means that was not given, or that the checkpoint's version did not have.
_UNSET_MEANS = {"lora_embeddings": "freeze"}
# What of the configuration in --pretrained the forward pass depends on.
_MODEL_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "attention_bias",
    "mlp_bias",
    "tie_word_embeddings",
)


def quieten_libraries() -> None:
    """Before the libraries are imported: silences known messages of healthy runs."""
    quiet.quieten_libraries()
    # colossalai's optional quantisation asks for kernels that are for GPUs.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def start_process(args: argparse.Namespace) -> StopRequest:
    """Joins the process group (of one, when no launcher started this process) and seeds every generator."""
    import torch

    if os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" not in os.environ:
        raise UserError(
            f"WORLD_SIZE {os.environ['WORLD_SIZE']} is set, but no RANK: this process would wait for "
            "others that nobody starts; use torchrun or `colossalai run`, or unset WORLD_SIZE"
        )
    stop = StopRequest()
    stop.install()
    for name, value in (
        ("RANK", "0"),
        ("LOCAL_RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
    ):
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "0" if os.environ["WORLD_SIZE"] == "1" else "29500")
    if os.environ["MASTER_PORT"] == "0":
        os.environ["MASTER_PORT"] = str(_free_port())
    # colossalai reads Gemini's optimizer with torch.load, which would run what a stranger pickled.
    os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    with lean_imports():
        if not torch.cuda.is_available():
            from colossal_llama.training.cpu_backend import enable_cpu_training

            enable_cpu_training()
        import colossalai
        import colossalai.booster.plugin

    colossalai.launch_from_torch(seed=args.seed, verbose=False)
    # Ranks draw different dropout masks; what has to agree between ranks is drawn from generators of its own.
    torch.manual_seed(args.seed * 100_003 + int(os.environ["RANK"]))
    return stop


def _free_port() -> int:
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@dataclass
class Inputs:
    """What a run reads: model configuration, tokenizer, padding, training rows, evaluation sets by name."""

    config: LlamaConfig
    tokenizer: PreTrainedTokenizerBase | None
    pad_token_id: int
    source: RowSource
    evaluation_sets: dict[str, PreparedDataset]


def open_inputs(args: argparse.Namespace) -> Inputs:
    """Opens configuration, tokenizer and data; all problems with the data are reported together."""
    config = load_config(args.pretrained, args.trust_remote_code)
    _refuse_forgotten_rows(args)
    if args.benchmark:
        rows = RandomRows(args.num_samples, args.max_length, config.vocab_size, args.seed)
        return Inputs(config, None, 0, rows, {})
    tokenizer = load_tokenizer(args.pretrained, args.trust_remote_code)
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"--pretrained {args.pretrained}: the tokenizer has {len(tokenizer)} tokens, the model only "
            f"{config.vocab_size} embeddings; run colossal_llama/model/init_model.py first"
        )
    pad_token_id = tokenizer.eos_token_id if args.pad_token == "eos" else tokenizer.unk_token_id
    if pad_token_id is None:
        raise UserError(f"--pad_token {args.pad_token}: the tokenizer has no such token; use the other one")
    fingerprint = tokenizer_fingerprint(tokenizer)

    evaluation_paths = args.eval_dataset or []
    wanted = [("--dataset", args.dataset), *(("--eval_dataset", [path]) for path in evaluation_paths)]
    opened, problems = [], []
    for flag, paths in wanted:
        try:
            parts = find_part_directories(paths, flag)
            opened.append(PreparedDataset(parts, args.max_length, args.isolate_documents, fingerprint, flag))
        except UserError as error:
            problems.extend(error.problems)
    if problems:
        raise UserError(problems)
    source, *evaluated = opened
    evaluation_sets = dict(zip(map(str, evaluation_paths), evaluated, strict=True))
    return Inputs(config, tokenizer, pad_token_id, source, evaluation_sets)


def _refuse_forgotten_rows(args: argparse.Namespace) -> None:
    """What the arguments' own check can't see: a model of the hub with an extended vocabulary."""
    from transformers.utils import cached_file

    problems = new_rows_problems(args, f"--pretrained {args.pretrained}")
    if not problems or Path(args.pretrained).is_dir():
        return
    reasons = ("missing_entries", "connection_errors", "gated_repo")
    quietly = {f"_raise_exceptions_for_{reason}": False for reason in reasons}
    if cached_file(args.pretrained, REPORT_FILE, **quietly) is not None:
        raise UserError(problems)


def lock_save_dir(args: argparse.Namespace, cleanup: contextlib.ExitStack) -> None:
    """Rank 0 locks `save_dir` for the length of the run; the others hear whether that went well."""
    import torch.distributed as dist

    told: list[list[str]] = [[]]
    if is_main_process() and not args.benchmark:
        told[0] = find_unwritable(args)
        try:
            if not told[0]:
                cleanup.enter_context(locked_directory(args.save_dir, _LOCK_PURPOSE))
                remove_leftovers(args.save_dir)
        except UserError as error:
            told[0] = [f"--save_dir {error}"]
        except OSError as error:
            told[0] = [f"--save_dir {args.save_dir}: cannot be written ({error.strerror})"]
    dist.broadcast_object_list(told, src=0)
    if told[0]:
        raise UserError(told[0])


def find_unwritable(args: argparse.Namespace) -> list[str]:
    """A message for each output that can't be written, before hours are spent on it."""
    directories = {
        f"--save_dir {args.save_dir}": args.save_dir,
        f"--tensorboard_dir {args.tensorboard_dir}": args.tensorboard_dir,
        f"--config_file {args.config_file}": args.config_file.parent,
    }
    return [
        f"{where}: cannot be written ({reason})"
        for where, directory in directories.items()
        if (reason := why_not_writable(directory)) is not None
    ]


def find_checkpoint(args: argparse.Namespace) -> tuple[Path | None, Path | None]:
    """`resolve_checkpoint` for all ranks: rank 0 decides, every rank reads a share of the files for it."""
    import torch.distributed as dist

    def find_damage_together(checkpoint: Path) -> str | None:
        found: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(found, find_damage(checkpoint, dist.get_rank(), dist.get_world_size()))
        return next((damage for damage in found if damage is not None), None)

    def tell_all(message: Any) -> Any:
        told = [message]
        dist.broadcast_object_list(told, src=0)
        return told[0]

    answer: Any = None
    if is_main_process():
        try:
            answer = resolve_checkpoint(
                args.load_checkpoint,
                args.save_dir,
                lambda checkpoint: find_damage_together(tell_all(checkpoint)),
            )
        except UserError as error:
            answer = error
        tell_all(answer)
    else:
        while isinstance(answer := tell_all(None), Path):
            find_damage_together(answer)
    if isinstance(answer, UserError):
        raise answer
    return answer


def refuse_used_save_dir(args: argparse.Namespace) -> None:
    """A run that starts from the beginning must not mix its checkpoints with another run's."""
    found = [] if args.benchmark else list_checkpoints(args.save_dir)
    if found and args.load_checkpoint != "latest":
        raise UserError(
            f"--save_dir {args.save_dir}: holds {len(found)} checkpoints of an earlier run; continue it with "
            "--load_checkpoint latest, or give another directory"
        )


def describe_run(args: argparse.Namespace, inputs: Inputs, plan: TrainingPlan) -> dict[str, Any]:
    """Everything that tells one run from another: arguments, layout, data, versions."""
    import importlib.metadata

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    versions = {"python": platform.python_version()}
    for package in ("torch", "colossalai", "transformers", "datasets", "peft", "colossal_llama"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "arguments": {name: plain(value) for name, value in sorted(vars(args).items())},
        "layout": {
            "world_size": plan.world_size,
            **{name: getattr(args, name) for name in _LAYOUT_ARGUMENTS},
        },
        "data": {
            "fingerprint": inputs.source.fingerprint,
            "rows": len(inputs.source),
            "tokens": inputs.source.num_tokens,
        },
        "rows_per_step": plan.rows_per_step,
        "total_steps": plan.total_steps,
        "model": {name: getattr(inputs.config, name, None) for name in _MODEL_FIELDS},
        "versions": versions,
    }


def check_resumable(checkpoint: Path, settings: dict[str, Any]) -> None:
    """Compares a checkpoint's run with this one.

    Raises:
        UserError: data or arguments that shape the training differ; each change is named.
    """
    saved = read_json(checkpoint / STATE_FILE)
    problems = []
    free = _FREE_ARGUMENTS.union(_CHANGE_WITH_LAYOUT if changed_layout(saved, settings) else ())
    for key, value in settings["data"].items():
        if saved["data"].get(key) != value:
            problems.append(f"--dataset: {key} {saved['data'].get(key)} when saved, {value} now")
    for key, value in settings["model"].items():
        if (old := saved.get("model", {}).get(key, value)) != value:
            problems.append(f"--pretrained: {key} {old} when saved, {value} now")
    for name, value in settings["arguments"].items():
        old, now = (
            _UNSET_MEANS.get(name) if given is None else given
            for given in (saved["arguments"].get(name), value)
        )
        if name not in free and old != now:
            problems.append(f"--{name}: {old} when saved, {now} now")
    if problems:
        where = f"--load_checkpoint {checkpoint}: "
        problems = [where + problem for problem in problems]
        problems.append(
            f"resume with what the run was started with, or start a new stage from {checkpoint / 'modeling'}"
        )
        raise UserError(problems)


def warn_of_later_checkpoints(args: argparse.Namespace, state: TrainState) -> None:
    """A run that was taken back to an earlier step may take another course than the checkpoints after it."""
    later = [path.name for path in list_checkpoints(args.save_dir) if checkpoint_step(path) > state.step]
    if later and args.load_checkpoint != "latest":  # that has passed over damaged ones
        warn(
            f"--save_dir {args.save_dir}: holds later checkpoints ({', '.join(later)}), and `latest` means "
            "them until this run has passed them; move them away if it is to take another course"
        )


def continue_at_same_row(
    checkpoint: Path, state: TrainState, plan: TrainingPlan, num_rows: int, num_epochs: int
) -> None:
    """Adapts the position when a step now has another number of rows than when it was saved."""
    before = read_json(checkpoint / STATE_FILE)["rows_per_step"]
    if before == plan.rows_per_step:
        return
    state.change_rows_per_step(plan.rows_per_step, num_rows, num_epochs, plan.total_steps)
    log(
        f"A step has {plan.rows_per_step} rows instead of {before}: "
        f"{plan.total_steps - state.schedule_offset} steps in all; warm-up and learning rate follow the rows"
    )


def keep_warm_up(args: argparse.Namespace, checkpoint: Path, plan: TrainingPlan) -> None:
    """Warm-up steps that were given count rows once the run has begun: steps of another size scale them."""
    if args.warmup_steps is None:
        return  # a share of all steps
    warmup_steps = read_json(checkpoint / SCHEDULE_FILE)["warmup_steps"]
    before = read_json(checkpoint / STATE_FILE)["rows_per_step"]
    plan.schedule = replace(plan.schedule, warmup_steps=round(warmup_steps * before / plan.rows_per_step))


def prepare_files(
    args: argparse.Namespace, inputs: Inputs, checkpoint: Path | None, stage_weights: Path | None
) -> ModelFiles | None:
    """What saves write beside the weights, made and tried out by this process.

    Raises:
        UserError: something of it could not be saved.
    """
    if args.benchmark:
        return None
    weights, flag = find_weights(args, checkpoint, stage_weights)
    ends = find_answer_ends(inputs.source, inputs.tokenizer)
    if ends == []:
        warn(
            "--dataset: no token of the tokenizer's own ends its answers, so nothing will end those of the "
            "model; let the chat template write its end of turn inside what has loss"
        )
    files = prepare_model_files(
        args.pretrained,
        weights or args.pretrained,
        flag,
        inputs.config,
        parameter_dtype(args),
        inputs.tokenizer,
        ends,
        args.lora_rank,
        args.trust_remote_code,
    )
    for note in files.notes:
        warn(note)
    return files


def prepare_files_together(
    args: argparse.Namespace, inputs: Inputs, checkpoint: Path | None, stage_weights: Path | None
) -> ModelFiles | None:
    """`prepare_files` on rank 0, the only one that returns any; the others hear whether that went well."""
    import torch.distributed as dist

    files, problems = None, [None]
    if is_main_process():
        try:
            files = prepare_files(args, inputs, checkpoint, stage_weights)
        except UserError as error:
            problems = [error.problems]
        except Exception as error:  # the others wait
            reason = f"{type(error).__name__}: {error}"
            problems = [[f"--pretrained {args.pretrained}: saving it was tried out, and failed ({reason})"]]
    dist.broadcast_object_list(problems, src=0)
    if problems[0]:
        raise UserError(problems[0])
    return files


def find_weights(
    args: argparse.Namespace, checkpoint: Path | None, stage_weights: Path | None
) -> tuple[str | None, str]:
    """(the weights that training starts with, the flag that named them); None for random ones."""
    if checkpoint is not None and not args.lora_rank:
        return str(checkpoint / "modeling"), "--load_checkpoint"
    if stage_weights is not None:
        return str(stage_weights), "--load_checkpoint"
    has_weights = not args.benchmark or is_weights_directory(Path(args.pretrained))
    return args.pretrained if has_weights else None, "--pretrained"


def check_run(args: argparse.Namespace, inputs: Inputs, plan: TrainingPlan) -> None:
    """What a run checks between its plan and its first step, for `--dry_run`: in one process, from the files'
    headers where loading would take long, and without making or changing a file.

    Raises:
        UserError: the run would end with one too.
    """
    for dataset in (inputs.source, *inputs.evaluation_sets.values()):
        if isinstance(dataset, PreparedDataset):
            problem = dataset.find_bad_row(inputs.config.vocab_size, args.isolate_documents)
            if problem is not None:
                raise UserError(problem)
    checkpoint = stage_weights = None
    settings = describe_run(args, inputs, plan)
    if not args.benchmark:
        problems = find_unwritable(args)
        if (holder := lock_holder(args.save_dir)) is not None:
            problems.append(f"--save_dir {in_use_message(args.save_dir, holder, _LOCK_PURPOSE)}")
        if problems:
            raise UserError(problems)
        checkpoint, stage_weights = resolve_checkpoint(args.load_checkpoint, args.save_dir)
    if checkpoint is None:
        refuse_used_save_dir(args)
    else:
        check_resumable(checkpoint, settings)
        keep_warm_up(args, checkpoint, plan)
        stage_weights = find_adapter_base(args, checkpoint)
    prepare_files(args, inputs, checkpoint, stage_weights)
    weights, flag = find_weights(args, checkpoint, stage_weights)
    if weights is None:
        return
    dtype = parameter_dtype(args)
    sums = check_weights(weights, inputs.config, flag, dtype if args.lora_rank and checkpoint else None)
    if sums is not None:
        check_adapter_base(args, dtype, sums, checkpoint, settings)


def boost_model(
    args: argparse.Namespace,
    strategy: Strategy,
    inputs: Inputs,
    checkpoint: Path | None,
    stage_weights: Path | None,
    files: ModelFiles | None = None,
) -> None:
    """Loads the weights, decides what trains, and hands the model to the plugin.

    Args:
        files: the model gets their generation configuration, which Gemini saves by itself.
    """
    weights, flag = find_weights(args, checkpoint, stage_weights)
    if weights is not None:
        causal_lm = load_causal_lm(weights, inputs.config, strategy.parameter_dtype, flag)
    else:
        log(f"--benchmark: {args.pretrained} has no weights; training random ones of its shape")
        causal_lm = random_causal_lm(inputs.config, strategy.parameter_dtype, args.seed)
    if files is not None:
        causal_lm.generation_config = files.generation_config
    model = causal_lm
    if args.freeze_non_embeds_params:
        freeze_all_but_embeddings(causal_lm)
    if args.lora_rank:
        adapter = None
        if checkpoint is not None:
            merged = (checkpoint / ADAPTER_DIRECTORY).is_dir()
            adapter = checkpoint / (ADAPTER_DIRECTORY if merged else "modeling")
        train_embeddings = args.lora_embeddings == "train"
        model = add_lora(causal_lm, args.lora_rank, adapter, args.seed, train_embeddings)
    noise = EmbeddingNoise(args.neft_alpha, args.seed) if args.use_neft else None
    strategy.boost(model, causal_lm, noise)


def find_adapter_base(args: argparse.Namespace, checkpoint: Path) -> Path | None:
    """The weights under a resumed run's adapters when its `--load_checkpoint` gave them, not `--pretrained`.

    Raises:
        UserError: they are no longer there.
    """
    saved = read_json(checkpoint / STATE_FILE).get("stage_weights")
    if saved is None or not args.lora_rank:
        return None
    if not is_weights_directory(Path(saved)):
        raise UserError(
            f"--load_checkpoint {checkpoint}: its adapters belong to the weights in {saved}, which are not "
            "there; put them back"
        )
    return Path(saved)


def check_adapter_base(
    args: argparse.Namespace,
    dtype: torch.dtype,
    sums: Mapping[str, float],
    checkpoint: Path | None,
    settings: dict[str, Any],
) -> None:
    """Notes in `settings` which weights the adapters are trained on; a resumed run must have the same.

    Args:
        sums: of the values of each weight, by name, in `dtype`.

    Raises:
        UserError: they are others than those that the checkpoint's adapters were trained on.
    """
    if not args.lora_rank or args.benchmark:
        return
    # Embeddings that train come from the checkpoint, not from the base.
    embeddings_train = args.lora_embeddings == "train"
    total = math.fsum(
        value
        for name, value in sums.items()
        if "lora_" not in name and not (embeddings_train and is_embedding(name))
    )
    settings["adapter_base"] = {"dtype": str(dtype), "sum": total}
    saved = {} if checkpoint is None else read_json(checkpoint / STATE_FILE).get("adapter_base", {})
    if saved.get("dtype") != str(dtype):
        return  # rounded to another type, the same weights have another sum
    if not math.isclose(saved["sum"], total, rel_tol=1e-6, abs_tol=1e-6):
        raise UserError(
            f"--pretrained {args.pretrained}: holds other weights than those that the adapters in "
            f"{checkpoint} were trained on; give the same model"
        )


def save_final_modeling(writer: CheckpointWriter) -> Path:
    """`<save_dir>/modeling`; the last checkpoint has the same weights should this fail."""
    try:
        return writer.save_final_modeling()
    except OSError as error:
        last = list_checkpoints(writer.save_dir)[-1:]
        where = f"; the same weights are in {last[0] / 'modeling'}" if last else ""
        raise UserError(f"{error}{where}", exit_code=1) from None


def describe_kernels(strategy: Strategy) -> str:
    """One line on what was found and is used."""
    import importlib.util

    from colossal_llama.training.attention import has_flash_attn
    from colossal_llama.training.strategy import has_apex_norm

    on_gpu = strategy.device.type == "cuda"
    attention = "flash-attn" if strategy.use_flash else "torch scaled dot-product"
    liger = importlib.util.find_spec("liger_kernel") is not None
    whole_logits = strategy.args.plugin in GEMINI_PLUGINS
    loss = "whole logits" if whole_logits else "chunked cross entropy"
    if liger and on_gpu and not whole_logits and strategy.tensor_group is None:
        loss += " by liger-kernel"
    found = {"flash-attn": has_flash_attn(), "apex": has_apex_norm(), "liger-kernel": liger}
    optional = ", ".join(f"{name} {'found' if there else 'not found'}" for name, there in found.items())
    return (
        f"Device {strategy.device.type}, {strategy.args.plugin}, {strategy.args.mixed_precision}; "
        f"attention: {attention}; loss: {loss}; {optional}"
    )


def collator_settings(args: argparse.Namespace, strategy: Strategy, inputs: Inputs) -> dict[str, Any]:
    return {
        "pad_token_id": inputs.pad_token_id,
        "pad_to": args.max_length if args.padding_mode == "max_length" else None,
        "isolate_documents": args.isolate_documents,
        "vocab_size": inputs.config.vocab_size,
        "multiple_of": strategy.length_multiple,
    }


def write_configuration(args: argparse.Namespace, settings: dict[str, Any]) -> None:
    write_json(args.config_file, settings)


def make_meter(args: argparse.Namespace) -> ThroughputMeter | None:
    return ThroughputMeter(warmup_steps=BENCHMARK_WARMUP_STEPS) if args.benchmark else None


def report_benchmark(meter: ThroughputMeter, strategy: Strategy, inputs: Inputs) -> str:
    import torch
    import torch.distributed as dist
    from colossalai.accelerator import get_accelerator

    on_gpu = strategy.device.type == "cuda"
    return meter.report(
        inputs.config,
        strategy.compute_dtype,
        dist.get_world_size(),
        torch.cuda.get_device_name() if on_gpu else "cpu",
        get_accelerator().max_memory_allocated(),
    )

"""Every argument of `train.py`, with the checks that need nothing but the arguments themselves."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from colossal_llama.tokenizer.tokenizer_files import REPORT_FILE
from colossal_llama.utils.arguments import (
    ArgumentParser,
    add_max_length,
    add_seed,
    add_trust_remote_code,
    existing_directory,
    non_negative_int,
    number,
    positive_int,
)
from colossal_llama.utils.files import objection_to_replacing

PLUGINS = ("ddp", "gemini", "gemini_auto", "zero2", "zero2_cpu", "3d")
GEMINI_PLUGINS = ("gemini", "gemini_auto")
SEQUENCE_PARALLEL_MODES = ("split_gather", "ring", "all_to_all", "ring_attn")
LORA_EMBEDDINGS = ("train", "freeze")
WARMUP_RATIO = 0.025


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="train.py",
        description="Continual pre-training or supervised fine-tuning of LLaMA with ColossalAI's plugins. "
        "Start it with `colossalai run`, `torchrun`, or plain `python` for one process.",
    )
    model = parser.add_argument_group("model and data")
    model.add_argument(
        "--pretrained", type=_model_path, required=True, help="Hugging Face model, its tokenizer included"
    )
    model.add_argument(
        "--dataset",
        nargs="+",
        type=existing_directory,
        default=None,
        help="prepared part directories, or arrow/ directories",
    )
    model.add_argument(
        "--eval_dataset",
        nargs="+",
        type=existing_directory,
        default=None,
        help="prepared data to evaluate on; off when not given",
    )
    model.add_argument(
        "--eval_interval",
        type=non_negative_int,
        default=0,
        help="optimizer steps between evaluations; 0 = epoch ends",
    )
    add_max_length(parser, model)
    parser.add_flag(
        "--isolate_documents",
        default=True,
        help="documents packed into a row do not see each other; switch it off for the original's bins",
        group=model,
    )
    parser.add_flag(
        "--bucketed", default=False, help="visit buckets (part-N of all data sets) in order", group=model
    )
    model.add_argument(
        "--padding_mode",
        choices=("max_length", "longest"),
        default="max_length",
        help="length rows are padded to",
    )
    model.add_argument(
        "--pad_token",
        choices=("eos", "unk"),
        default="eos",
        help="token that fills rows; never seen, never learned",
    )
    model.add_argument(
        "--num_workers",
        type=non_negative_int,
        default=2,
        help="data loading processes per rank; 0 = in the trainer",
    )
    add_trust_remote_code(parser, model)

    parallel = parser.add_argument_group("plugin and layout")
    parallel.add_argument("--plugin", choices=PLUGINS, default="gemini", help="booster plugin")
    parallel.add_argument("--tp", type=positive_int, default=1, help="tensor parallel size (3d)")
    parallel.add_argument("--pp", type=positive_int, default=1, help="pipeline parallel size (3d)")
    parallel.add_argument(
        "--sp", type=positive_int, default=1, help="sequence parallel size (3d, all_to_all)"
    )
    parallel.add_argument(
        "--zero_stage", "--zero", type=int, choices=(0, 1, 2), default=1, help="ZeRO stage (3d)"
    )
    parallel.add_argument(
        "--sp_mode", choices=SEQUENCE_PARALLEL_MODES, default="split_gather", help="sequence parallelism (3d)"
    )
    parser.add_flag(
        "--enable_sequence_parallelism",
        default=False,
        help="switch sequence parallelism on (3d)",
        group=parallel,
    )
    parser.add_flag(
        "--zero_cpu_offload", default=False, help="optimizer state in CPU memory (3d)", group=parallel
    )
    parallel.add_argument(
        "--microbatch_size",
        type=positive_int,
        default=1,
        help="rows per pipeline microbatch (3d with --pp > 1)",
    )
    parallel.add_argument(
        "--mixed_precision",
        choices=("fp16", "bf16", "fp32"),
        default="fp16",
        help="arithmetic; fp32 not with Gemini",
    )
    parser.add_flag(
        "--use_grad_checkpoint",
        default=False,
        help="recompute activations in the backward pass: less memory, about a third more work",
        group=parallel,
    )
    parser.add_flag(
        "--use_flash_attn",
        default=False,
        help="flash-attn's kernels (torch's attention on a CPU)",
        group=parallel,
    )

    optimizer = parser.add_argument_group("optimization")
    optimizer.add_argument("--num_epochs", type=positive_int, default=1, help="passes over the data")
    optimizer.add_argument(
        "--max_steps",
        type=number(int, minimum=-1),
        default=-1,
        help="stop after this many optimizer steps of the run; -1 = all. The schedule keeps its full length",
    )
    optimizer.add_argument(
        "--batch_size",
        "--micro_batch_size",
        type=positive_int,
        default=1,
        help="rows per process and pass; with --pp > 1, rows per pipeline pass",
    )
    optimizer.add_argument(
        "--accumulation_steps", type=positive_int, default=8, help="passes per optimizer step"
    )
    optimizer.add_argument("--lr", type=number(float, minimum=0), default=3e-4, help="peak learning rate")
    optimizer.add_argument(
        "--weight_decay", type=number(float, minimum=0), default=0.1, help="AdamW weight decay"
    )
    optimizer.add_argument(
        "--grad_clip",
        "--gradient_clipping",
        type=number(float, minimum=0),
        default=1.0,
        help="largest gradient norm; 0 = no clipping",
    )
    optimizer.add_argument(
        "--warmup_steps",
        type=non_negative_int,
        default=None,
        help="linear warm-up (default: 2.5 %% of the steps)",
    )
    parser.add_flag(
        "--freeze_non_embeds_params",
        default=False,
        help="train the input and output embeddings only (aligns a new vocabulary)",
        group=optimizer,
    )
    optimizer.add_argument(
        "--lora_rank", type=non_negative_int, default=0, help="rank of LoRA adapters; 0 = off"
    )
    optimizer.add_argument(
        "--lora_embeddings",
        choices=LORA_EMBEDDINGS,
        default=None,
        help="with LoRA: train the whole input and output embeddings too, or freeze them (default: freeze; "
        "to be given for a model with an extended vocabulary)",
    )
    parser.add_flag(
        "--merge_lora",
        default=False,
        help="save LoRA merged into the weights, not as an adapter",
        group=optimizer,
    )
    parser.add_flag("--use_neft", default=False, help="NEFTune noise on the embeddings", group=optimizer)
    optimizer.add_argument(
        "--neft_alpha",
        type=number(float, minimum=0),
        default=5.0,
        help="NEFTune noise: alpha / sqrt(tokens * width)",
    )
    add_seed(parser, optimizer)
    parser.add_flag(
        "--deterministic",
        default=False,
        help="deterministic CUDA kernels: exact resume there too",
        group=optimizer,
    )

    output = parser.add_argument_group("output")
    output.add_argument(
        "--load_checkpoint",
        type=_checkpoint,
        default=None,
        help="a step directory, `latest`, or a directory of weights alone, which starts a new stage",
    )
    output.add_argument(
        "--save_dir", type=Path, default=Path("checkpoint_dir"), help="directory of checkpoints"
    )
    output.add_argument(
        "--save_interval", type=non_negative_int, default=1000, help="optimizer steps between saves; 0 = none"
    )
    output.add_argument(
        "--save_total_limit", type=non_negative_int, default=0, help="newest checkpoints to keep; 0 = all"
    )
    parser.add_flag(
        "--async_save",
        default=True,
        help="write checkpoints while training goes on, where the memory for a copy is there",
        group=output,
    )
    parser.add_flag("--skip_save_each_epoch", default=False, help="no checkpoint at epoch ends", group=output)
    output.add_argument(
        "--tensorboard_dir", type=Path, default=Path("logs_dir"), help="directory of the metrics"
    )
    output.add_argument(
        "--config_file",
        type=Path,
        default=Path("config_file"),
        help="JSON file that records the configuration; replaces no other kind of file",
    )
    parser.add_flag(
        "--dry_run",
        default=False,
        help="check what a run checks before its first step, print the plan, train nothing; one process",
        group=output,
    )
    parser.add_flag(
        "--benchmark", default=False, help="train on random rows, print speed, save nothing", group=output
    )
    output.add_argument("--num_samples", type=positive_int, default=500, help="random rows of --benchmark")
    parser.add_check(check_arguments)
    return parser


def _model_path(text: str) -> str:
    """A local model directory, or a name on the hub."""
    path = Path(text)
    if (text.startswith(("/", ".", "~")) or path.exists()) and not (path / "config.json").is_file():
        raise ValueError("no config.json there; give a Hugging Face model directory")
    return text


def _checkpoint(text: str) -> str:
    if text != "latest" and not Path(text).is_dir():
        raise ValueError("no such directory; give a checkpoint, weights, or `latest`")
    return text


def data_parallel_size(args: argparse.Namespace, world_size: int) -> int:
    """Ranks that see different rows."""
    if args.plugin != "3d":
        return world_size
    return world_size // (args.tp * args.pp * args.sp)


def check_arguments(args: argparse.Namespace) -> list[str]:
    """Contradictions between arguments, each with its remedy; all of them at once."""
    problems = []
    if not args.benchmark and not args.dataset:
        problems.append("--dataset: required, but not given (only --benchmark makes its own rows)")
    if args.plugin in GEMINI_PLUGINS:
        if args.mixed_precision == "fp32":
            problems.append(
                f"--mixed_precision fp32: {args.plugin} knows fp16 and bf16 only; use zero2, ddp or 3d"
            )
        if args.lora_rank:
            problems.append(f"--lora_rank {args.lora_rank}: {args.plugin} can't train LoRA; use zero2 or ddp")
    if args.benchmark and args.load_checkpoint:
        problems.append(
            f"--load_checkpoint {args.load_checkpoint}: --benchmark trains on random rows and continues "
            "no run; leave it out"
        )
    problems.extend(_check_3d(args))
    problems.extend(_check_lora(args))
    if args.eval_interval and not args.eval_dataset:
        problems.append(f"--eval_interval {args.eval_interval}: needs --eval_dataset")
    if args.use_neft and args.neft_alpha == 0:
        problems.append("--neft_alpha 0: gives no noise; leave --use_neft out")
    if not args.benchmark:
        problems.extend(_check_outputs(args))
    return problems


def _check_lora(args: argparse.Namespace) -> list[str]:
    if not args.lora_rank:
        given = {
            "--merge_lora": args.merge_lora,
            f"--lora_embeddings {args.lora_embeddings}": args.lora_embeddings,
        }
        return [f"{flag}: needs --lora_rank above 0" for flag, is_given in given.items() if is_given]
    problems = []
    if args.freeze_non_embeds_params:
        problems.append(
            "--lora_rank and --freeze_non_embeds_params: choose one; LoRA trains adapters, and with "
            "--lora_embeddings train the embeddings beside them"
        )
    for flag in ("pretrained", "load_checkpoint"):
        path = getattr(args, flag)
        if path is not None and (Path(path) / REPORT_FILE).is_file():
            problems.extend(new_rows_problems(args, f"--{flag} {path}"))
            break
    return problems


def new_rows_problems(args: argparse.Namespace, extended: str) -> list[str]:
    """LoRA alone would leave the rows of new pieces as they were initialised: the user decides.

    Args:
        extended: flag and value that name a model with an extended vocabulary.
    """
    if not args.lora_rank or args.lora_embeddings is not None:
        return []
    return [
        f"--lora_embeddings: has to be given with --lora_rank {args.lora_rank}, since {extended} has an "
        f"extended vocabulary ({REPORT_FILE}); `train` trains the whole embeddings beside the adapters, "
        "`freeze` leaves them, and the rows of the new pieces, as they are"
    ]


def _check_outputs(args: argparse.Namespace) -> list[str]:
    """Outputs that could not be written, found before a model is loaded for them."""
    problems = []
    for flag in ("save_dir", "tensorboard_dir", "config_file"):
        path = getattr(args, flag)
        is_file = flag == "config_file"
        if is_file and path.is_dir():
            problems.append(f"--{flag} {path}: is a directory; give the name of a file")
        if is_file and (objection := objection_to_replacing(path, _is_configuration)):
            problems.append(f"--{flag} {path}: {objection}")
        start = path.parent if is_file else path
        nearest = next(place for place in (start, *start.parents) if place.exists())
        if not nearest.is_dir():
            problems.append(f"--{flag} {path}: {nearest} is no directory; give another path")
    return problems


def _is_configuration(content: Any) -> bool:
    """Whether a run of this suite, or of the original, whose file has the bare arguments, wrote this."""
    return isinstance(content, dict) and "pretrained" in content.get("arguments", content)


def _check_3d(args: argparse.Namespace) -> list[str]:
    problems = []
    if args.plugin != "3d":
        for flag in ("tp", "pp", "sp"):
            if getattr(args, flag) > 1:
                problems.append(
                    f"--{flag} {getattr(args, flag)}: only the 3d plugin splits models; add --plugin 3d"
                )
        for flag in ("enable_sequence_parallelism", "zero_cpu_offload"):
            if getattr(args, flag):
                problems.append(
                    f"--{flag}: only for --plugin 3d" + (" (or use zero2_cpu)" if "cpu" in flag else "")
                )
        return problems
    if args.pp > 1:
        if args.batch_size % args.microbatch_size:
            problems.append(
                f"--batch_size {args.batch_size}: with --pp {args.pp} it is cut into microbatches of "
                f"--microbatch_size {args.microbatch_size} and must be a multiple of it"
            )
        elif args.batch_size // args.microbatch_size < args.pp:
            problems.append(
                f"--batch_size {args.batch_size}: {args.batch_size // args.microbatch_size} microbatches "
                f"of {args.microbatch_size}, but {args.pp} stages need at least {args.pp}; "
                f"use --batch_size {args.pp * args.microbatch_size} or more"
            )
        if args.zero_stage == 2:
            problems.append(f"--zero_stage 2: can't be combined with --pp {args.pp}; use --zero_stage 1")
    if args.zero_cpu_offload and args.zero_stage == 0:
        problems.append("--zero_cpu_offload: needs --zero_stage 1 or 2")
    if args.lora_rank and (args.tp > 1 or args.pp > 1 or args.enable_sequence_parallelism):
        problems.append(
            "--lora_rank: LoRA is for data parallel layouts; use --tp 1 --pp 1 without sequence parallelism"
        )
    if not args.enable_sequence_parallelism:
        if args.sp > 1:
            problems.append(f"--sp {args.sp}: needs --enable_sequence_parallelism and --sp_mode all_to_all")
        return problems
    if args.sp_mode in ("split_gather", "ring"):
        if args.tp == 1:
            problems.append(
                f"--sp_mode {args.sp_mode}: splits the sequence over the tensor parallel ranks; needs --tp 2+"
            )
        if args.sp > 1:
            problems.append(f"--sp {args.sp}: {args.sp_mode} uses the tensor parallel group; leave --sp at 1")
    elif args.sp_mode == "ring_attn":
        problems.append(
            "--sp_mode ring_attn: needs flash-attn's kernels and can't isolate documents; "
            "use all_to_all or split_gather"
        )
    elif args.sp == 1:
        problems.append(f"--sp 1: {args.sp_mode} splits the sequence over --sp ranks; use --sp 2 or more")
    return problems

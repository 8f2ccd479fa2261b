"""Training steps on one GPU: tokens/s, MFU and peak memory for plugins, recomputation, flash attention and
liger, against a bare loop with the same kernels and `transformers.Trainer`.

Random rows of full length in bf16, as `train.py --benchmark` trains on, each variant in a process of its own.
A peer is compared with zero2 and the same kernels. What does not fit into memory is told so. Without a GPU
nothing is measured; `--toy` runs what a CPU can, to show that the script works.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from figures import installed_versions, report, report_median, this_machine

from colossal_llama.utils.arguments import ArgumentParser, number, positive_int
from colossal_llama.utils.console import log
from colossal_llama.utils.errors import run_command

ROOT = Path(__file__).resolve().parents[1]
# Widths of LLaMA-3.2-1B and -3B and of LLaMA-3-8B, embeddings not tied.
SHAPES = {
    "1b": {"hidden_size": 2048, "num_layers": 16, "num_heads": 32, "intermediate_size": 8192},
    "3b": {"hidden_size": 3072, "num_layers": 28, "num_heads": 24, "intermediate_size": 8192},
    "8b": {"hidden_size": 4096, "num_layers": 32, "num_heads": 32, "intermediate_size": 14336},
    "toy": {"hidden_size": 64, "num_layers": 2, "num_heads": 8, "intermediate_size": 128},
}
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Variant:
    """What one process trains.

    Attributes:
        side: "ours", "bare" or "transformers".
        flash: flash attention, by flash-attn or by torch; off, torch's scaled dot-product attention.
        liger: liger's kernels; off, as if it were not installed.
    """

    side: str = "ours"
    plugin: str = "zero2"
    recompute: bool = False
    flash: bool = True
    liger: bool = True

    @property
    def name(self) -> str:
        side = {"ours": self.plugin, "bare": "bare loop", "transformers": "transformers.Trainer"}[self.side]
        return ", ".join(
            [
                side,
                *(["recomputation"] if self.recompute else []),
                *([] if self.flash else ["no flash attention"]),
                *([] if self.liger else ["no liger"]),
            ]
        )


@dataclass
class Speed:
    """Seconds of each counted step, and what belongs to all."""

    seconds: list[float]
    tokens_per_step: int
    flops_per_token: float
    peak_flops: float | None
    peak_memory_gb: float


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="gpu_step.py", description=__doc__)
    parser.add_argument(
        "--shapes", nargs="+", choices=tuple(SHAPES), default=["1b", "8b"], help="models to train"
    )
    parser.add_argument("--max_length", type=number(int, 2), default=4096, help="tokens of a row")
    parser.add_argument("--batch_size", type=positive_int, default=2, help="rows of a micro-batch")
    parser.add_argument("--accumulation_steps", type=positive_int, default=4, help="micro-batches of a step")
    parser.add_argument("--steps", type=positive_int, default=10, help="counted steps of each variant")
    parser.add_argument("--warmup", type=positive_int, default=3, help="steps before that are not counted")
    parser.add_argument("--vocab_size", type=positive_int, default=128256, help="vocabulary of the models")
    parser.add_flag("--toy", default=False, help="a toy shape, on the CPU if there is no GPU")
    parser.add_argument("--run_variant", help="used by the script itself: a variant to run, as JSON")
    return parser


def variants(on_gpu: bool) -> list[Variant]:
    """The reference first."""
    reference = Variant(flash=on_gpu, liger=on_gpu)
    bare, peer = replace(reference, side="bare"), replace(reference, side="transformers")
    if not on_gpu:
        return [reference, replace(reference, plugin="3d", recompute=True), bare, peer]
    plugins = [replace(reference, plugin=plugin) for plugin in ("gemini", "3d")]
    return [
        reference,
        *plugins,
        *(replace(each, recompute=True) for each in (reference, *plugins)),
        replace(reference, flash=False),
        replace(reference, liger=False),
        bare,
        replace(bare, recompute=True),
        peer,
        replace(peer, recompute=True),
    ]


def run_variant(args: Namespace, variant: Variant, shape: str) -> Speed:
    """Trains a variant in this process."""
    if not variant.liger:
        sys.modules["liger_kernel"] = None
    from in_process import write_config

    with tempfile.TemporaryDirectory() as directory:
        write_config(
            Path(directory),
            vocab_size=args.vocab_size,
            max_length=args.max_length,
            num_key_value_heads=min(8, SHAPES[shape]["num_heads"]),
            **SHAPES[shape],
        )
        return _SIDES[variant.side](args, variant, Path(directory))


def _flags(args: Namespace, variant: Variant, model_dir: Path) -> list[str]:
    num_rows = (args.warmup + args.steps) * args.batch_size * args.accumulation_steps
    return [
        *("--pretrained", str(model_dir), "--plugin", variant.plugin, "--mixed_precision", "bf16"),
        *("--max_length", str(args.max_length), "--batch_size", str(args.batch_size)),
        *("--accumulation_steps", str(args.accumulation_steps), "--num_samples", str(num_rows)),
        *("--use_grad_checkpoint", str(variant.recompute), "--use_flash_attn", str(variant.flash)),
        *("--num_workers", "0"),
    ]


def _time_steps(args: Namespace, config, step: Callable[[], object]) -> Speed:
    """Times `step()` after the warm-up."""
    seconds = []
    for number_of_step in range(args.warmup + args.steps):
        _wait_for_device()
        started = time.perf_counter()
        step()
        _wait_for_device()
        if number_of_step >= args.warmup:
            seconds.append(time.perf_counter() - started)
    return _speed(args, config, seconds)


def _speed(args: Namespace, config, seconds: list[float]) -> Speed:
    import torch

    from colossal_llama.utils.devices import peak_flops
    from colossal_llama.utils.llama_size import flops_per_token

    on_gpu = torch.cuda.is_available()
    return Speed(
        seconds,
        args.batch_size * args.accumulation_steps * args.max_length,
        flops_per_token(config, args.max_length, args.max_length**2),
        peak_flops(torch.cuda.get_device_name(), "bf16") if on_gpu else None,
        torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0,
    )


def _wait_for_device() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _run_ours(args: Namespace, variant: Variant, model_dir: Path) -> Speed:
    from in_process import start_loop

    loop = start_loop(_flags(args, variant, model_dir))
    batches = loop.batches()
    return _time_steps(args, loop.inputs.config, lambda: loop.step(batches))


def _peer_model(args: Namespace, variant: Variant, model_dir: Path, dtype):
    """(model on the device, rows [rows, length], the optimizer's settings), with the same kernels as ours."""
    import torch
    from transformers import AutoConfig, LlamaForCausalLM

    from colossal_llama.training.arguments import parse_settings
    from colossal_llama.training.data.random_rows import RandomRows

    settings = parse_settings([*_flags(args, variant, model_dir), "--benchmark"])
    config = AutoConfig.from_pretrained(model_dir)
    if variant.liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        # The loss alone, which is what ours takes from liger.
        apply_liger_kernel_to_llama(
            rope=False, rms_norm=False, swiglu=False, cross_entropy=False, fused_linear_cross_entropy=True
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    # Without the package, torch's attention: rows are one document each, for which it has a flash kernel.
    has_package = importlib.util.find_spec("flash_attn") is not None
    attention = "flash_attention_2" if variant.flash and has_package else "sdpa"
    with device:
        model = LlamaForCausalLM._from_config(config, torch_dtype=dtype, attn_implementation=attention)
    model.config.use_cache = False
    if variant.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    num_rows, seed = settings.output.num_samples, settings.optimizer.seed
    dataset = RandomRows(num_rows, args.max_length, config.vocab_size, seed)
    rows = torch.stack([torch.from_numpy(dataset[i].input_ids) for i in range(len(dataset))])
    return model, rows, settings.optimizer


def _run_bare(args: Namespace, variant: Variant, model_dir: Path) -> Speed:
    import torch
    from in_process import BareLoop

    model, rows, wanted = _peer_model(args, variant, model_dir, torch.bfloat16)
    bare = BareLoop(model, wanted.lr)
    device = next(model.parameters()).device
    batches = (batch.to(device) for batch in rows.split(args.batch_size))
    return _time_steps(args, model.config, lambda: bare.step(batches, args.accumulation_steps))


def _run_transformers(args: Namespace, variant: Variant, model_dir: Path) -> Speed:
    """bf16 by autocast over fp32 weights: what `TrainingArguments(bf16=True)` gives."""
    import torch
    from in_process import transformers_trainer
    from transformers import TrainerCallback

    model, rows, wanted = _peer_model(args, variant, model_dir, torch.float32)
    seconds: list[float] = []

    class Timer(TrainerCallback):
        """From step end to step end: the Trainer's data and bookkeeping count."""

        def on_train_begin(self, *_: object, **__: object) -> None:
            self.since = time.perf_counter()

        def on_step_end(self, *_: object, **__: object) -> None:
            _wait_for_device()
            now = time.perf_counter()
            seconds.append(now - self.since)
            self.since = now

    options = {"bf16": True, "use_cpu": not torch.cuda.is_available()}
    peer = transformers_trainer(
        model,
        rows,
        args.batch_size,
        args.accumulation_steps,
        wanted.lr,
        model_dir,
        Timer(),
        **options,
    )
    peer.train()
    return _speed(args, model.config, seconds[args.warmup :])


_SIDES = {"ours": _run_ours, "bare": _run_bare, "transformers": _run_transformers}


def measure(arguments: list[str], variant: Variant, shape: str) -> Speed | str:
    """Runs a variant in a process of its own; a string says why there is no figure."""
    task = json.dumps({"variant": asdict(variant), "shape": shape})
    command = [sys.executable, str(Path(__file__).resolve()), *arguments, "--run_variant", task]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        if "out of memory" in result.stderr.lower():
            return OUT_OF_MEMORY
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        log(result.stderr)
        return f"failed: {last}"
    return Speed(**json.loads(result.stdout.splitlines()[-1]))


def main() -> None:
    args = build_parser().parse_args()
    if args.toy:
        args.shapes, args.vocab_size, args.max_length = ["toy"], 512, 32
        args.batch_size, args.accumulation_steps, args.steps, args.warmup = 1, 2, 2, 1
    if args.run_variant:
        task = json.loads(args.run_variant)
        speed = run_variant(args, Variant(**task["variant"]), task["shape"])
        print(json.dumps(asdict(speed)), flush=True)
        return
    machine = this_machine()
    if machine.gpu is None and not args.toy:
        report("training steps on a GPU", None, "", promise="gpu.mfu", note="no GPU figure exists")
        return
    packages = ("torch", "colossalai", "transformers", "accelerate", "flash-attn", "liger-kernel", "apex")
    versions = installed_versions(*packages)
    log(", ".join(f"{name} {version}" for name, version in versions.items()))
    log(f"{machine.gpu or 'CPU'}; {json.dumps(vars(args))}")
    failures = []
    for shape in args.shapes:
        ours: dict[Variant, Speed] = {}
        for variant in variants(on_gpu=machine.gpu is not None):
            variant = with_what_is_there(variant, versions)
            speed = measure(sys.argv[1:], variant, shape)
            name = f"{shape}, {args.max_length} tokens, bf16: {variant.name}"
            if isinstance(speed, str):
                report(f"{name}: tokens/s", None, "", note=speed)
                failures += [] if speed == OUT_OF_MEMORY else [name]
                continue
            report_speed(name, speed, is_reference=not ours)
            if variant.side == "ours":
                compared = next(iter(ours), None)
                ours[variant] = speed
            else:
                compared = replace(variant, side="ours", plugin="zero2")
            if compared in ours:
                ratio = statistics.median(ours[compared].seconds) / statistics.median(speed.seconds)
                report(f"{shape}: step of ours ({compared.name}) against {variant.name}", ratio, "×")
    if failures:
        raise RuntimeError(f"failed: {'; '.join(failures)}")


def with_what_is_there(variant: Variant, versions: dict[str, str]) -> Variant:
    """Without liger where it is not installed, on both sides of a comparison."""
    return replace(variant, liger=variant.liger and versions["liger-kernel"] != "not installed")


def report_speed(name: str, speed: Speed, is_reference: bool) -> None:
    tokens = [speed.tokens_per_step / seconds for seconds in speed.seconds]
    memory = f"peak {speed.peak_memory_gb:.1f} GB" if speed.peak_memory_gb else ""
    report_median(f"{name}: tokens/s", tokens, "tokens/s", note=memory)
    if speed.peak_flops is not None:
        mfu = [100 * each * speed.flops_per_token / speed.peak_flops for each in tokens]
        report_median(f"{name}: MFU", mfu, "%", promise="gpu.mfu" if is_reference else None)


if __name__ == "__main__":
    run_command(main, exit_at_once="--run_variant" in sys.argv)

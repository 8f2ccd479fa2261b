"""What is looked at on a GPU, in the order of what would hurt most."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from bench import ROOT, Bench, Case, Failed, Part, Skipped, last_words

PLUGINS = ("ddp", "zero2", "zero2_cpu", "3d", "gemini", "gemini_auto")
ROWS_PER_STEP = 8
STEPS = 10
# Relative, of a step's loss against the CPU's; half precision rounds differently on another device.
CURVE_TOLERANCE = 2e-2
# What must be importable to train; `colossalai run` needs more.
IMPORTS = (
    *(
        "torch",
        "colossalai",
        "transformers",
        "tokenizers",
        "peft",
        "datasets",
        "sentencepiece",
        "safetensors",
    ),
    *("orjson", "numpy", "pyarrow", "tensorboard", "tqdm", "matplotlib", "psutil", "xxhash"),
)


def parts() -> list[Part]:
    return [
        Part("install", "training starts with the driver and wheels alone", 180, install),
        Part("bf16", "each plugin trains what the CPU trains", 240, partial(curves, precision="bf16")),
        Part("fp16", "the default precision", 240, partial(curves, precision="fp16")),
        Part("overflow", "a step that overflows is left out, and training goes on", 150, overflow),
        Part("resume", "bit for bit under --deterministic", 300, resume),
        Part("flash", "flash attention gives the same curve, with every plugin", 240, flash),
        Part("kernels", "tests of kernels and of Gemini, by pytest", 240, kernels),
        Part("gemini_large", "several chunks: a model above 100 M parameters", 240, gemini_large),
        Part("benchmarks", "tokens/s, MFU, memory, peers", 900, benchmarks),
    ]


# ---------------------------------------------------------------------- what the parts share


def make_inputs(bench: Bench, large: bool = False) -> tuple[Path, Path]:
    """(model, prepared data), made once."""
    directory = bench.work / ("large_inputs" if large else "inputs")
    model, data = directory / "model", directory / "data"
    if (data / "stats.json").is_file():
        return model, data / "arrow"
    shutil.rmtree(directory, ignore_errors=True)
    corpus = ROOT / "examples" / "data" / "pretrain"
    width, layers, heads = (64, 2, 4) if bench.toy or not large else (1024, 10, 16)
    maker = ["examples/make_base_model.py", "--data_input_dirs", corpus, "--output_dir", model]
    shape = ["--hidden_size", width, "--num_layers", layers, "--num_heads", heads]
    bench.command([sys.executable, *maker, *shape, "--vocab_size", 500], cpu=True)
    preparation = ["prepare_pretrain_dataset.py", "--data_input_dirs", corpus, "--tokenizer_dir", model]
    output = ["--data_output_dirs", data, "--num_spliced_dataset_bins", 2, "--max_length", max_length(bench)]
    bench.command([sys.executable, *preparation, *output, "--num_workers", 1], cpu=True)
    return model, data / "arrow"


def max_length(bench: Bench) -> int:
    return 96 if bench.toy else 256


def train(
    bench: Bench,
    name: str,
    flags: list[object],
    *,
    processes: int = 1,
    steps: int = STEPS,
    cpu: bool = False,
    large: bool = False,
    script: str = "train.py",
) -> tuple[list[dict[str, Any]], str]:
    """Trains `steps` steps of 8 rows; returns the metrics and what it said.

    Raises:
        Skipped: a plugin that refuses this machine.
    """
    model, data = make_inputs(bench, large)
    directory = bench.work / name.replace(" ", "_").replace(",", "")
    shutil.rmtree(directory, ignore_errors=True)
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    splits = [flags[i + 1] for i, flag in enumerate(flags) if flag in ("--tp", "--pp", "--sp")]
    data_parallel = processes // math.prod(splits)
    rows = 4 if "--pp" in flags else 2
    words = [
        *launcher,
        ROOT / script,
        *("--pretrained", model, "--dataset", data, "--max_length", max_length(bench)),
        *("--batch_size", rows, "--accumulation_steps", ROWS_PER_STEP // rows // data_parallel),
        *("--lr", 1e-3, "--warmup_steps", 2, "--max_steps", steps, "--num_workers", 0, "--seed", 7),
        *("--save_dir", directory / "saves", "--tensorboard_dir", directory / "logs"),
        *("--config_file", directory / "config.json", "--save_interval", 0, "--skip_save_each_epoch"),
        *flags,
    ]
    try:
        said = bench.command(words, cpu=cpu or bench.toy, PYTHONPATH=python_path())
    except Failed as error:
        if "runs on GPUs only" in error.output:
            raise Skipped(last_words(error.output)) from None
        raise
    lines = (directory / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines], said


def python_path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def losses(metrics: list[dict[str, Any]]) -> list[float]:
    return [record["loss"] for record in metrics]


def reference(bench: Bench, precision: str, large: bool = False) -> list[float]:
    """The CPU's curve: ddp, one process."""
    kept = bench.work / f"reference_{precision}{'_large' if large else ''}.json"
    if not kept.is_file():
        flags = ["--plugin", "ddp", "--mixed_precision", precision]
        metrics, _ = train(bench, f"reference {precision}", flags, cpu=True, large=large)
        kept.write_text(json.dumps(losses(metrics)), encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8"))


def compare(found: list[float], expected: list[float], what: str = "the CPU's") -> str:
    """Raises `Failed` where curves differ by more than rounding."""
    if len(found) != len(expected):
        raise Failed(f"{len(found)} steps instead of {len(expected)}")
    errors = [abs(ours - wanted) / wanted for ours, wanted in zip(found, expected, strict=True)]
    worst = next(filter(math.isnan, errors), max(errors))
    message = f"losses within {worst:.1e} of {what}: {found[0]:.4f} to {found[-1]:.4f}"
    if not worst < CURVE_TOLERANCE:
        raise Failed(f"{message}; expected {[round(loss, 4) for loss in expected]}, found {found}")
    return message


def layouts(bench: Bench) -> Iterator[tuple[str, list[object], int]]:
    """(name, flags, processes) for the GPUs that are there."""
    processes = 1 if bench.toy else min(2, bench.num_gpus)
    for plugin in PLUGINS:
        yield f"{plugin} x{processes}", ["--plugin", plugin], processes
    if processes == 2:
        sequence = ["--plugin", "3d", "--enable_sequence_parallelism", "--sp_mode"]
        yield "3d tp 2", ["--plugin", "3d", "--tp", 2], 2
        yield "3d pp 2", ["--plugin", "3d", "--pp", 2], 2
        yield "split_gather", [*sequence, "split_gather", "--tp", 2], 2
        yield "all_to_all", [*sequence, "all_to_all", "--sp", 2], 2


# ---------------------------------------------------------------------- the parts


def install(bench: Bench) -> Iterator[Case]:
    """What is there, and that nothing is compiled by nvcc; `Bench.command` fails for that in every part."""

    def packages() -> str:
        missing = [name for name in IMPORTS if importlib.util.find_spec(name) is None]
        if missing:
            raise Failed(f"cannot be imported: {', '.join(missing)}")
        return f"{len(IMPORTS)} packages are there"

    def inputs() -> str:
        model, data = make_inputs(bench)
        return f"{model.name} and {data.parent.name} are made"

    def two_steps(plugin: str) -> str:
        metrics, said = train(bench, f"install {plugin}", ["--plugin", plugin], steps=2)
        kernels = next((line for line in said.splitlines() if line.startswith("Device ")), "")
        return f"loss {losses(metrics)[-1]:.4f}; {kernels}"

    yield "packages", packages
    yield "inputs", inputs
    for plugin in ("zero2", "zero2_cpu", "gemini_auto"):
        yield f"{plugin} without nvcc", partial(two_steps, plugin)


def curves(bench: Bench, precision: str) -> Iterator[Case]:
    def case(name: str, flags: list[object], processes: int) -> str:
        metrics, _ = train(
            bench, f"{name} {precision}", [*flags, "--mixed_precision", precision], processes=processes
        )
        return compare(losses(metrics), reference(bench, precision))

    for name, flags, processes in layouts(bench):
        yield name, partial(case, name, flags, processes)


def overflow(bench: Bench) -> Iterator[Case]:
    """A loss scale far too large at the start: steps are skipped until it fits, and then it learns."""
    steps = 30

    def case(plugin: str) -> str:
        flags = ["--plugin", plugin, "--mixed_precision", "fp16"]
        metrics, said = train(
            bench, f"overflow {plugin}", flags, steps=steps, script="tests/gpu/overflow_train.py"
        )
        skipped, curve = said.count("fp16 gradients overflowed"), losses(metrics)
        message = f"{skipped} steps left out, loss {curve[0]:.3f} to {curve[-1]:.3f}"
        if not 1 <= skipped <= steps - 10:
            raise Failed(message, said[-2000:])
        if not curve[-1] < curve[0] - 0.1:
            raise Failed(f"{message}: it does not learn afterwards")
        return message

    for plugin in ("ddp", "zero2", "3d", "gemini"):
        yield plugin, partial(case, plugin)


def resume(bench: Bench) -> Iterator[Case]:
    def case(plugin: str) -> str:
        flags = ["--plugin", plugin, "--mixed_precision", "bf16", "--deterministic"]
        saving = [*flags, "--save_interval", 3]
        straight, _ = train(bench, f"straight {plugin}", saving, steps=6)
        checkpoint = bench.work / f"straight_{plugin}" / "saves" / "epoch-0_step-3"
        resumed, _ = train(bench, f"resumed {plugin}", [*flags, "--load_checkpoint", checkpoint], steps=6)
        for before, after in zip(straight[3:], resumed, strict=True):
            for key in ("step", "loss", "grad_norm"):
                if before[key] != after[key]:
                    raise Failed(f"step {before['step']}: {key} {before[key]!r}, resumed {after[key]!r}")
        return f"losses and norms of {len(resumed)} steps are equal"

    for plugin in PLUGINS:
        yield plugin, partial(case, plugin)


def flash(bench: Bench) -> Iterator[Case]:
    def case(name: str, flags: list[object], processes: int) -> str:
        flags = [*flags, "--mixed_precision", "bf16", "--use_flash_attn"]
        metrics, said = train(bench, f"{name} flash", flags, processes=processes)
        kernel = said.partition("attention: ")[2].partition(";")[0]
        message = f"{kernel}; {compare(losses(metrics), reference(bench, 'bf16'))}"
        if "scaled dot-product" in kernel and not bench.toy:
            reason = [line for line in said.splitlines() if "--use_flash_attn" in line]
            raise Failed(f"no flash attention: {' '.join(reason)}")
        return message

    for name, flags, processes in layouts(bench):
        yield name, partial(case, name, flags, processes)


def kernels(bench: Bench) -> Iterator[Case]:
    def case() -> str:
        if importlib.util.find_spec("pytest") is None or importlib.util.find_spec("hypothesis") is None:
            raise Skipped("pytest and hypothesis are not installed")
        words = [sys.executable, "-m", "pytest", "-q", "tests/gpu", "-p", "no:cacheprovider"]
        return last_words(bench.command(words, cpu=bench.toy, PYTHONPATH=python_path()))

    yield "pytest tests/gpu", case


def gemini_large(bench: Bench) -> Iterator[Case]:
    def curve(plugin: str) -> tuple[list[float], str]:
        flags = ["--plugin", plugin, "--mixed_precision", "bf16"]
        metrics, said = train(bench, f"large {plugin}", flags, steps=5, large=True)
        return losses(metrics), said

    def case(plugin: str) -> str:
        found, _ = curve(plugin)
        kept = bench.work / "large.json"
        if not kept.is_file():
            kept.write_text(json.dumps(curve("zero2")[0]), encoding="utf-8")
        return compare(found, json.loads(kept.read_text(encoding="utf-8")), "zero2's")

    for plugin in ("gemini", "gemini_auto"):
        yield plugin, partial(case, plugin)


def benchmarks(bench: Bench) -> Iterator[Case]:
    def case() -> str:
        output = bench.output.with_name(f"{bench.output.stem}_benchmarks.md")
        toy = ["--toy"] if bench.toy else []
        bench.command(
            ["bash", "benchmarks/gpu.sh", *toy, "--output", output.resolve()],
            cpu=bench.toy,
            PYTHONPATH=python_path(),
        )
        return f"see {output.name}"

    yield "benchmarks/gpu.sh", case

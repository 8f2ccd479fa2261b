"""Saving a checkpoint against writing the same bytes plainly, on one disk in one run.

One process, zero2 in bf16: weights, fp32 master weights and both Adam moments. The plain side writes as many
bytes from memory into as many files and makes them durable, nothing else. What training feels is the pause;
it goes on with real steps while the background save is written.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from figures import report_median

from colossal_llama.utils.arguments import ArgumentParser, positive_int
from colossal_llama.utils.console import format_table
from colossal_llama.utils.errors import run_command

ROOT = Path(__file__).resolve().parents[1]


def parse() -> ArgumentParser:
    parser = ArgumentParser(prog="checkpoint.py", description=__doc__)
    parser.add_argument(
        "--repeats", type=positive_int, default=3, help="saves of each kind; the median counts"
    )
    parser.add_argument("--hidden_size", type=positive_int, default=768, help="width of the model")
    parser.add_argument("--num_layers", type=positive_int, default=12, help="layers of the model")
    parser.add_argument(
        "--work_dir", type=Path, default=None, help="disk to measure; default: the temporary one"
    )
    return parser


def main() -> None:
    args = parse().parse_args()
    directory = Path(tempfile.mkdtemp(prefix="checkpoint-benchmark-", dir=args.work_dir))
    try:
        measure(args, directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def make_model_directory(args, directory: Path) -> Path:
    """A configuration and a real tokenizer; `--benchmark` makes random weights of the shape."""
    from transformers import LlamaConfig

    subprocess.run(
        [
            *(sys.executable, str(ROOT / "examples" / "make_base_model.py"), "--num_layers", "1"),
            *("--data_input_dirs", str(ROOT / "examples" / "data" / "pretrain")),
            *("--output_dir", str(directory)),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    for weights in directory.glob("*.safetensors"):
        weights.unlink()
    LlamaConfig(
        vocab_size=32000,
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 11 // 4,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.hidden_size // 64,
    ).save_pretrained(directory)
    return directory


def measure(args, directory: Path) -> None:
    import torch
    from in_process import start_run

    from colossal_llama.training.llama.loading import load_tokenizer
    from colossal_llama.training.loop import TrainingLoop
    from colossal_llama.training.state import TrainState

    model_dir = make_model_directory(args, directory / "model")
    flags = [
        *("--pretrained", str(model_dir), "--plugin", "zero2", "--mixed_precision", "bf16"),
        *("--max_length", "128", "--accumulation_steps", "1", "--num_workers", "0", "--num_samples", "2000"),
        *("--save_dir", str(directory / "saves"), "--save_total_limit", "1"),
    ]
    run, stop = start_run(flags)
    run.inputs = dataclasses.replace(run.inputs, tokenizer=load_tokenizer(str(model_dir), False))
    state = TrainState()
    writer = run.make_writer(run.make_record(), run.prepare_files())
    loop = TrainingLoop(run, state, None, None, stop)
    batches = loop.batches()

    def timed_step() -> float:
        started = time.perf_counter()
        loop.step(batches)
        return time.perf_counter() - started

    for _ in range(2):
        timed_step()
    alone = [timed_step() for _ in range(5)]
    background, inline, plain, during = [], [], [], []
    for _ in range(args.repeats):
        writer.in_background = True
        timed_step()
        os.sync()
        writer.begin(state)
        while not writer.is_written:
            during.append(timed_step())
        background.append(writer.finish())
        writer.in_background = False
        timed_step()
        os.sync()
        inline.append(writer.save(state))
        os.sync()
        plain.append(write_plainly(inline[-1].path, directory / "plain"))
    num_bytes = inline[-1].num_bytes
    plain_seconds = statistics.median(plain)

    def row(name: str, seconds: float, pause: float) -> tuple[str, ...]:
        return (
            name,
            f"{seconds:.2f}",
            f"{num_bytes / 1e9 / seconds:.2f}",
            f"{seconds / plain_seconds:.2f}",
            f"{pause:.2f}",
            f"{pause / plain_seconds:.2f}",
        )

    print(f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} CPUs")
    print(f"{num_bytes / 1e9:.2f} GB a checkpoint, median of {args.repeats}\n")
    table = [
        row("plain write and fsync", plain_seconds, plain_seconds),
        *(
            row(
                name,
                statistics.median(r.seconds for r in saves),
                statistics.median(r.pause_seconds for r in saves),
            )
            for name, saves in (("save, training waits", inline), ("save in the background", background))
        ),
    ]
    print(format_table(("", "s", "GB/s", "of plain", "pause s", "pause of plain"), table))
    print()
    name = f"checkpoint, zero2 × 1, bf16, {num_bytes / 1e9:.2f} GB"
    plain_of = [saved / plain_seconds for saved in (r.seconds for r in inline)]
    report_median(f"{name}: save, training waits, against plain write and fsync", plain_of, "×")
    pauses = [r.pause_seconds / plain_seconds for r in background]
    report_median(f"{name}: pause of a background save, against plain write and fsync", pauses, "×")
    report_median("training step, no save", alone, "s")
    report_median("training step, while a save is written", during, "s")


def write_plainly(checkpoint: Path, target: Path) -> float:
    """Seconds to write as many bytes into as many files, made durable."""
    sizes = [path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()]
    contents = [os.urandom(min(size, 1 << 20)) for size in sizes]
    target.mkdir()
    started = time.perf_counter()
    for number, (size, content) in enumerate(zip(sizes, contents, strict=True)):
        with open(target / str(number), "wb", buffering=0) as file:
            left = size
            while left > 0:
                left -= file.write(content[:left])
            os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


if __name__ == "__main__":
    run_command(main, exit_at_once=True)

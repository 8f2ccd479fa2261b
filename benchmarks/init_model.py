"""Measures init_model.py against copying the same bytes on the same disk: LLaMA-2-7B widths, 37,104 pieces.

It makes a model of random weights (hidden size 4096, 32,000 rows, bf16, shards of 5 GB) with as many layers
as asked for, and extends it to a made-up tokenizer. Both sides end with their bytes on the disk (fsync), and
both sources are in the disk cache as far as it has room for them.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from importlib.metadata import version
from pathlib import Path

from figures import report, report_median

from colossal_llama.utils.arguments import ArgumentParser, positive_int
from colossal_llama.utils.console import log
from colossal_llama.utils.errors import run_command

ROOT = Path(__file__).resolve().parents[1]


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="init_model.py", description=__doc__)
    parser.add_argument(
        "--num_layers", type=positive_int, default=32, help="layers; 32 is LLaMA-2-7B, 13.5 GB"
    )
    parser.add_argument(
        "--repeats", type=positive_int, default=3, help="runs of each side; the median counts"
    )
    parser.add_argument("--hidden_size", type=positive_int, default=4096, help="width of the model")
    parser.add_argument("--source_rows", type=positive_int, default=32000, help="pieces of the source")
    parser.add_argument("--new_rows", type=positive_int, default=37104, help="pieces that are added")
    parser.add_argument("--shard_mb", type=positive_int, default=5000, help="largest file of the source, MB")
    parser.add_argument(
        "--num_texts", type=positive_int, default=60_000, help="sentences that the tokenizer is trained on"
    )
    parser.add_argument(
        "--work_dir", type=Path, help="where the models go (default: the temporary directory)"
    )
    return parser


def tensor_shapes(hidden: int, source_rows: int, num_layers: int) -> dict[str, tuple[int, ...]]:
    """LLaMA-2-7B's tensors, in the order of its files."""
    intermediate = 11008 * hidden // 4096
    shapes = {"model.embed_tokens.weight": (source_rows, hidden)}
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}"
        for name in "qkvo":
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (hidden, hidden)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (intermediate, hidden)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (intermediate, hidden)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, intermediate)
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (source_rows, hidden)}


def make_model(directory: Path, args: Namespace) -> int:
    """Writes random bf16 weights in shards, with index and config; returns the number of shards."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    noise = torch.randn(max(args.source_rows, 3 * args.hidden_size) * args.hidden_size).bfloat16()
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in tensor_shapes(args.hidden_size, args.source_rows, args.num_layers).items():
        num_bytes = 2 * torch.Size(shape).numel()
        if size + num_bytes > args.shard_mb * 10**6 and size:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += num_bytes
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {key: noise[: torch.Size(s).numel()].view(s).clone() for key, s in shard.items()}
        save_file(tensors, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config = {"model_type": "llama", "vocab_size": args.source_rows, "tie_word_embeddings": False}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return len(shards)


def make_inputs(source: Path, tokenizer: Path, args: Namespace) -> None:
    """Makes the source model with its tokenizer, and the extended tokenizer."""
    from init_tokenizer import train_source, write_pieces

    train_source(source, args.source_rows, args.num_texts)
    pieces = source / "pieces.jsonl"
    write_pieces(pieces, args.new_rows)
    script = ROOT / "colossal_llama" / "tokenizer" / "init_tokenizer.py"
    command = [
        sys.executable,
        str(script),
        f"--source_tokenizer_dir={source}",
        f"--expand_tokens_file={pieces}",
    ]
    run([*command, f"--target_tokenizer_dir={tokenizer}"])
    make_model(source, args)


def run(command: list[str]) -> tuple[float, int]:
    """Wall-clock seconds and peak memory (bytes) of one process."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            errors.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{errors.read()}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def copy(source: Path, target: Path) -> float:
    """Seconds to copy a directory's weights and to have them on the disk."""
    start = time.perf_counter()
    target.mkdir()
    for path in sorted(source.glob("*.safetensors")):
        shutil.copyfile(path, target / path.name)
        with open(target / path.name, "rb") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - start


def weight_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def main() -> None:
    args = build_parser().parse_args()
    log(
        f"Python {platform.python_version()}, torch {version('torch')}, "
        f"{len(os.sched_getaffinity(0))} cores, {platform.platform()}"
    )
    with tempfile.TemporaryDirectory(dir=args.work_dir) as name:
        work = Path(name)
        source, target, copied = work / "source", work / "target", work / "copy"
        source.mkdir()
        tokenizer = work / "tokenizer"
        # In a process of its own: the peak memory of a child counts from its parent's.
        maker = multiprocessing.get_context("spawn").Process(
            target=make_inputs, args=(source, tokenizer, args)
        )
        maker.start()
        maker.join()
        if maker.exitcode:
            raise RuntimeError("the source model could not be made; see above")
        script = ROOT / "colossal_llama" / "model" / "init_model.py"
        command = [sys.executable, str(script), f"--source_model_and_tokenizer_path={source}"]
        command += [f"--target_tokenizer_path={tokenizer}", f"--target_model_path={target}"]
        run(command)  # warms the disk cache
        extensions, copies = [], []
        for _ in range(args.repeats):
            shutil.rmtree(target)
            os.sync()
            extensions.append(run(command))
            os.sync()
            copies.append(copy(target, copied))
            shutil.rmtree(copied)
        rows = json.loads((target / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        output = weight_bytes(target)
    copy_seconds = statistics.median(copies)
    peak = max(run[1] for run in extensions)
    matrices = 2 * rows * args.hidden_size * 2
    log(
        f"{args.num_layers} layers, {rows:,} rows, output {output / 1e9:.2f} GB, two matrices "
        f"{matrices / 1e9:.2f} GB"
    )
    name = f"init_model.py, width {args.hidden_size}, {args.num_layers} layers, {output / 1e9:.2f} GB"
    seconds = [run[0] for run in extensions]
    report_median(f"{name}: time", seconds, "s", promise="init_model.seconds", copy_seconds=copy_seconds)
    report_median(f"{name}: copying the output's bytes", copies, "s")
    ratios = [own / copied for own, copied in zip(seconds, copies, strict=True)]
    report_median(f"{name}: against copying", ratios, "×")
    report(f"{name}: peak memory", peak / 1e9, "GB", promise="init_model.memory", matrices_gb=matrices / 1e9)


if __name__ == "__main__":
    run_command(main)

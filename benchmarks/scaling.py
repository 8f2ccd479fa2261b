"""Cost as the work grows, with the curves as a picture: training's row order, resume position and index of
parts, data preparation by text and by bins, model initialisation by shards.

Each point is a process of its own (its peak memory is told), and the next is ten times the work, mostly. The
row order is measured on sources of the given size without content; the index on one real part that is listed
again and again. A figure says by how much time grew over the last two points, beside what n log n would give.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from figures import RECORDS_VARIABLE, installed_versions, report

from colossal_llama.utils.arguments import ArgumentParser
from colossal_llama.utils.console import format_table, log
from colossal_llama.utils.errors import run_command

if TYPE_CHECKING:
    from colossal_llama.training.data.prepared_rows import PreparedDataset

ROOT = Path(__file__).resolve().parents[1]
# Growth is judged between points that take at least this long; below, fixed costs are all there is to see.
SHORTEST_SECONDS = 0.05


@dataclass
class Point:
    size: float
    seconds: float
    peak_mb: float


@dataclass
class Curve:
    title: str
    unit: str
    points: list[Point]


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="scaling.py", description=__doc__)
    # Beside the figures of benchmarks/run.sh, else where its results go.
    figures = os.environ.get(RECORDS_VARIABLE) or ROOT / "benchmarks" / "results" / "figures"
    picture = Path(figures).with_name("scaling.png")
    parser.add_argument("--picture", type=Path, default=picture, help="PNG of the curves")
    parser.add_flag("--large", default=False, help="also 1 GB of text and 10,000 and 99,999 bins: an hour")
    parser.add_flag("--toy", default=False, help="toy sizes: shows that the script runs")
    return parser


def measure_in_process(function: str, *arguments: object) -> tuple[float, float]:
    """(seconds, peak MB above what the imports took, mapped files aside) of one of `IN_PROCESS`, in a fresh
    process.
    """
    command = [sys.executable, str(Path(__file__).resolve()), "--point", function, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")
    seconds, peak = json.loads(result.stdout.splitlines()[-1])
    return seconds, peak


def measure_command(command: list[str]) -> tuple[float, float]:
    """(seconds, peak MB of the largest process) of a whole command."""
    code = (
        "import json, resource, subprocess, sys, time\n"
        "started = time.perf_counter()\n"
        "result = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)\n"
        "sys.stderr.buffer.write(result.stderr)\n"
        "peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024\n"
        "print(json.dumps([time.perf_counter() - started, peak]))\n"
        "sys.exit(result.returncode)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")
    return tuple(json.loads(result.stdout))


class EmptyRows:
    """A source of so many rows, without content."""

    def __init__(self, num_rows: int, num_buckets: int = 1) -> None:
        self.num_rows = num_rows
        edges = [num_rows * i // num_buckets for i in range(num_buckets + 1)]
        self.bucket_ranges = [[pair] for pair in itertools.pairwise(edges)]
        self.sets = []

    def __len__(self) -> int:
        return self.num_rows


def make_order(num_rows: str, num_buckets: str) -> None:
    """The order of one epoch, whole (1 bucket) or bucket by bucket."""
    from colossal_llama.training.data.order import RowOrder

    source = EmptyRows(int(num_rows), int(num_buckets))
    RowOrder(source, 42, bucketed=int(num_buckets) > 1).permutation(0)


def mix_sets(num_rows: str) -> None:
    """The order of one epoch of three sets that are mixed, from nothing to its last step."""
    import numpy as np

    from colossal_llama.training.data.mixing import MixedOrder
    from colossal_llama.training.data.sets import RowSet

    edges = [int(num_rows) * share // 10 for share in (0, 6, 9, 10)]
    sets = [
        RowSet(str(number), end - start, 4090 * (end - start), [[(start, end)]])
        for number, (start, end) in enumerate(itertools.pairwise(edges))
    ]
    lengths = np.full(int(num_rows), 4090, dtype=np.uint16)
    for start in range(7):
        lengths[start::7] -= 2 * start
    for _ in MixedOrder(sets, lengths, 42, False, [70, 25, 5]).steps(0, 0, 512):
        pass


def resume_at(position: str) -> None:
    """From nothing to the first batch of a run that goes on at this row of a data set a little longer."""
    from colossal_llama.training.data.order import BatchShape, RowOrder, StepSampler

    plan = BatchShape(batch_size=1, accumulation_steps=8, dp_size=64, dp_rank=3)
    source = EmptyRows(int(position) + 10 * plan.rows_per_step)
    next(iter(StepSampler(RowOrder(source, 42, bucketed=False), plan, 0, int(position), 1)))


def make_index(part: str, count: str) -> PreparedDataset:
    """`PreparedDataset` over a part that is listed so many times."""
    from colossal_llama.training.data.prepared_rows import PreparedDataset

    return PreparedDataset([Path(part)] * int(count), 4096, need_documents=True)


IN_PROCESS: dict[str, Callable[..., object]] = {
    "order": make_order,
    "mix": mix_sets,
    "resume": resume_at,
    "index": make_index,
}


def run_point(function: str, arguments: list[str]) -> None:
    """The other side of `measure_in_process`."""
    import resource

    import colossal_llama.training.data.prepared_rows  # noqa: F401 - counted before, not as the point's

    def peak_mb() -> float:
        """Without mapped files: the kernel may take their pages back, and counts them once a map."""
        mapped_kb = re.search(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text())[1]
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - int(mapped_kb)) / 1024

    before, started = peak_mb(), time.perf_counter()
    result = IN_PROCESS[function](*arguments)
    print(json.dumps([time.perf_counter() - started, peak_mb() - before]))
    del result  # its maps had to be there to be told apart


def write_part(directory: Path, num_rows: int) -> Path:
    """A part of rows of one token, written as preparation writes it."""
    import numpy as np

    from colossal_llama.dataset.bins import RowWriter

    part = directory / "part-00000"
    part.mkdir()
    with RowWriter(part, directory / "part-00000.jsonl") as writer:
        for first in range(0, num_rows, 1000):
            ones = np.ones(min(1000, num_rows - first), dtype=np.int32)
            writer.write(ones, ones, ones, ones)
    (directory / "part-00000.jsonl").unlink()
    state = {"_data_files": [{"filename": next(part.glob("*.arrow")).name}]}
    (part / "state.json").write_text(json.dumps(state), encoding="utf-8")
    return part


def curves(args: Namespace, work: Path) -> Iterator[Curve]:
    """Measures one curve after the other."""
    rows = [10**4, 10**5] if args.toy else [10**6, 10**7, 10**8]
    yield curve("order of an epoch", "rows", rows, lambda n: measure_in_process("order", n, 1))
    yield curve("order of an epoch, 100 buckets", "rows", rows, lambda n: measure_in_process("order", n, 100))
    yield curve("order of an epoch, 3 sets mixed", "rows", rows, lambda n: measure_in_process("mix", n))
    positions = [10**4, 10**5] if args.toy else [10**5, 10**6, 10**7]
    resume = "first batch after a resume, at"
    yield curve(resume, "rows", positions, lambda n: measure_in_process("resume", n))
    rows_of_part = 1000 if args.toy else 10**6
    part = write_part(work, rows_of_part)
    yield curve(
        f"index of a data set, parts of {rows_of_part:,} rows",
        "rows",
        [rows_of_part * n for n in ((1, 10) if args.toy else (1, 10, 100))],
        lambda n: measure_in_process("index", part, n // rows_of_part),
    )
    small = write_part(Path(tempfile.mkdtemp(dir=work)), 10)
    yield curve(
        "index of a data set, parts of 10 rows",
        "parts",
        [10, 100] if args.toy else [100, 1000, 10_000, 99_999],
        lambda n: measure_in_process("index", small, n),
    )
    yield from preparation_curves(args, work)
    yield initialisation_curve(args, work)


def preparation_curves(args: Namespace, work: Path) -> Iterator[Curve]:
    from prepare_dataset import make_corpus, make_tokenizer

    tokenizer = work / "tokenizer"
    make_tokenizer(tokenizer, 8000 if args.toy else 32000, byte_level=False)

    def prepare(megabytes: int, num_bins: int) -> tuple[float, float]:
        corpus, output = work / f"corpus-{megabytes}", work / "prepared"
        if not corpus.exists():
            make_corpus(corpus, "pretrain", megabytes, 0.2)
        shutil.rmtree(output, ignore_errors=True)
        flags = ["--data_input_dirs", str(corpus), "--tokenizer_dir", str(tokenizer), "--max_length", "4096"]
        flags += ["--data_output_dirs", str(output), "--num_spliced_dataset_bins", str(num_bins)]
        return measure_command([sys.executable, str(ROOT / "prepare_pretrain_dataset.py"), *flags])

    sizes = [1, 2] if args.toy else [10, 30, 100, *([1000] if args.large else [])]
    yield curve("prepare_pretrain_dataset.py", "MB of text", sizes, lambda n: prepare(n, 10))
    bins = [10, 100] if args.toy else [10, 100, 1000, *([10_000, 99_999] if args.large else [])]
    # As many documents as the most bins.
    megabytes = 1 if args.toy else 200 if args.large else 10
    yield curve(
        f"prepare_pretrain_dataset.py, {megabytes} MB of text", "bins", bins, lambda n: prepare(megabytes, n)
    )


def initialisation_curve(args: Namespace, work: Path) -> Curve:
    from init_model import build_parser as model_parser
    from init_model import make_inputs, make_model

    shapes = ["--hidden_size", "64", "--source_rows", "1000", "--new_rows", "500", "--num_texts", "500"]
    shapes = [*shapes, "--shard_mb", "1"] if args.toy else ["--hidden_size", "2048", "--shard_mb", "500"]
    layers_of_shard = 8 if args.toy else 5
    source, tokenizer, target = work / "source", work / "source-tokenizer", work / "target"

    def initialise(num_shards: int) -> tuple[float, float]:
        layers = str(layers_of_shard * num_shards)
        model_args = model_parser().parse_args([*shapes, "--num_layers", layers])
        if not tokenizer.exists():
            source.mkdir()
            make_inputs(source, tokenizer, model_args)
        for path in source.glob("*.safetensors"):
            path.unlink()
        make_model(source, model_args)
        shutil.rmtree(target, ignore_errors=True)
        script = ROOT / "colossal_llama" / "model" / "init_model.py"
        command = [sys.executable, str(script), f"--source_model_and_tokenizer_path={source}"]
        command += [f"--target_tokenizer_path={tokenizer}", f"--target_model_path={target}"]
        return measure_command(command)

    return curve("init_model.py", "shards", [1, 2] if args.toy else [1, 2, 4, 8], initialise)


def curve(title: str, unit: str, sizes: list[int], measure: Callable[[int], tuple[float, float]]) -> Curve:
    """Measures the points, and hands in each of them and the growth at the end."""
    points = [Point(size, *measure(size)) for size in sizes]
    for point in points:
        note = f"peak memory {point.peak_mb:,.0f} MB"
        report(f"{title}, {point.size:,} {unit}", point.seconds, "s", note=note)
    before, last = points[-2:]
    expected = last.size * math.log(last.size) / (before.size * math.log(max(2, before.size)))
    grown = last.seconds / before.seconds
    note = f"{last.size / before.size:.3g} × the {unit}; n log n would be {expected:.3g} ×"
    judged = before.seconds >= SHORTEST_SECONDS
    report(
        f"{title}: growth of time over the last two points",
        grown,
        "×",
        note=note if judged else f"{note}; too short to judge",
        **({"promise": "scaling.growth", "n_log_n_growth": expected} if judged else {}),
    )
    return Curve(title, unit, points)


def draw(measured: list[Curve], path: Path) -> None:
    """Time (left axis) and memory (right axis) of each curve, logarithmic, with n log n dotted."""
    from matplotlib.figure import Figure

    columns = 2
    lines = -(-len(measured) // columns)
    figure = Figure(figsize=(6 * columns, 3.6 * lines), layout="constrained")
    for number, one in enumerate(measured):
        axes = figure.add_subplot(lines, columns, number + 1)
        sizes = [point.size for point in one.points]
        axes.loglog(sizes, [point.seconds for point in one.points], "o-", label="seconds")
        last = one.points[-1]
        scale = last.seconds / (last.size * math.log(max(2, last.size)))
        axes.loglog(sizes, [scale * n * math.log(max(2, n)) for n in sizes], "k:", label="n log n")
        axes.set(title=one.title, xlabel=one.unit, ylabel="seconds")
        memory = axes.twinx()
        peaks = [max(point.peak_mb, 0.1) for point in one.points]
        memory.loglog(sizes, peaks, "s--", color="tab:orange", label="peak MB")
        memory.set_ylabel("MB")
        memory.set_ylim(min(peaks) / 3, 3 * max(peaks))  # memory that stays the same shall look so
        handles = [handle for each in (axes, memory) for handle in each.get_legend_handles_labels()[0]]
        axes.legend(handles=handles, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    args = build_parser().parse_args()
    versions = installed_versions("numpy", "pyarrow", "tokenizers", "safetensors")
    log(", ".join(f"{name} {version}" for name, version in versions.items()))
    with tempfile.TemporaryDirectory() as directory:
        measured = list(curves(args, Path(directory)))
    rows = [
        (one.title, f"{point.size:,} {one.unit}", point.seconds, point.peak_mb)
        for one in measured
        for point in one.points
    ]
    log(format_table(("what", "work", "seconds", "peak MB"), rows))
    draw(measured, args.picture)
    log(f"Picture: {args.picture.name}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--point"]:
        run_point(sys.argv[2], sys.argv[3:])
    else:
        run_command(main)

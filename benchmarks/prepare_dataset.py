"""Measures data preparation end to end against the bare batched tokenizer: speed, fill of the rows, peak
memory.

Without `--data_dir` and `--tokenizer_dir` it makes a bilingual corpus (made-up words with a natural
distribution of frequencies and lengths) and trains a tokenizer on it. All figures come from one run on one
machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from figures import report

from colossal_llama.dataset.engines import ENGINES, REFERENCE, installed_version
from colossal_llama.utils.arguments import ArgumentParser, existing_directory, number, positive_int
from colossal_llama.utils.console import format_table, log
from colossal_llama.utils.errors import run_command

ROOT = Path(__file__).resolve().parents[1]
SYLLABLES = [consonant + vowel for consonant in "bdfghklmnprst" for vowel in "aeio"]
ENDINGS = ["", "", "n", "s", "t", "r", "ing", "ed", "ly", "tion"]
MEGABYTE = 1 << 20
CHAT_TEMPLATE = "--chat_template"  # beside the engines: `tokenizers` writes and encodes what Jinja makes


@dataclass
class Run:
    seconds: float
    cpu_seconds: float  # user and system, all processes
    peak_main: int  # bytes, resident
    peak_worker: int  # bytes, resident, the largest worker
    peak_all: int  # bytes, proportional set size of all processes together


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="prepare_dataset.py", description=__doc__)
    parser.add_argument("--size_mb", type=positive_int, default=100, help="size of the corpus, in MB")
    parser.add_argument("--tokenizer_dir", type=existing_directory, help="tokenizer (default: trains one)")
    parser.add_argument("--vocab_size", type=number(int, 1000), default=32000, help="pieces of a trained one")
    parser.add_flag(
        "--byte_level",
        default=False,
        help="train a byte-level one, in LLaMA-3's shape (default: like LLaMA-2's)",
    )
    parser.add_argument(
        "--num_workers", type=positive_int, default=len(os.sched_getaffinity(0)), help="cores for both sides"
    )
    parser.add_argument("--max_length", type=positive_int, default=4096, help="longest row, in tokens")
    parser.add_argument(
        "--source_share", type=number(float, 0, 1), default=0.2, help="share of records with a source, 0 to 1"
    )
    parser.add_argument("--work_dir", type=Path, help="keeps corpus and tokenizer here (default: removed)")
    parser.add_argument("--repeats", type=positive_int, default=1, help="runs of each; the fastest counts")
    parser.add_flag(
        "--ray", default=True, help="also measure a Ray cluster of one node against local workers"
    )
    parser.add_flag("--memory", default=True, help="peak memory at 10 MB too")
    parser.add_flag("--large", default=False, help="peak memory at 1 GB too: minutes, and 12 GB of disk")
    return parser


class TextMaker:
    """Documents of made-up words and of Chinese characters: Zipf-distributed, lengths log-normal."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        words = set()
        for _ in range(40000):
            syllables = self.random.choices(SYLLABLES, k=self.random.randint(1, 4))
            words.add("".join(syllables) + self.random.choice(ENDINGS))
        english = sorted(words)
        self.random.shuffle(english)
        self.english = (english, _zipf_weights(len(english)))
        characters = [chr(c) for c in range(0x4E00, 0x4E00 + 6000)]
        self.random.shuffle(characters)
        sizes = self.random.choices((1, 2, 2, 2, 3), k=20000)
        chinese = ["".join(self.random.choices(characters, k=size)) for size in sizes]
        self.chinese = (chinese, _zipf_weights(len(chinese)))

    def text(self, num_words: int, chinese: bool) -> str:
        words, weights = self.chinese if chinese else self.english
        drawn = self.random.choices(words, cum_weights=weights, k=num_words)
        stop, space = ("。", "") if chinese else (". ", " ")
        size = self.random.randint(6, 20)
        return stop.join(space.join(drawn[i : i + size]) for i in range(0, len(drawn), size)) + stop.strip()

    def documents(self) -> Iterator[tuple[str, str, str]]:
        """Endless (first part, second part, category)."""
        while True:
            chinese = self.random.random() < 0.4
            num_words = max(4, min(20000, int(self.random.lognormvariate(5.3, 1.1))))
            category = self.random.choice(("web", "books", "news")) + ("-zh" if chinese else "-en")
            yield self.text(max(2, num_words // 5), chinese), self.text(num_words, chinese), category


def _zipf_weights(count: int) -> list[float]:
    total, weights = 0.0, []
    for rank in range(count):
        total += 1 / (rank + 2.7)
        weights.append(total)
    return weights


def make_corpus(directory: Path, kind: str, megabytes: int, source_share: float) -> None:
    """Writes `megabytes` of records of one kind, in files of at most 256 MB."""
    directory.mkdir(parents=True)
    maker = TextMaker(seed=1)
    documents = maker.documents()
    # Text is made for 20 MB and then recombined, since making it is slower than preparing it.
    pool = [next(documents) for _ in range(min(20, megabytes) * 700)]
    written, number_of_files = 0, 0
    while written < megabytes * MEGABYTE:
        with open(directory / f"{kind}-{number_of_files:03d}.jsonl", "w", encoding="utf-8") as file:
            size = 0
            while size < 256 * MEGABYTE and written + size < megabytes * MEGABYTE:
                first, second, category = maker.random.choice(pool)
                cut = maker.random.randrange(len(second) // 2)
                if kind == "pretrain":
                    source = first if maker.random.random() < source_share else ""
                    record = {"source": source, "target": second[cut:] + first, "category": category}
                else:
                    turns = [first[:200], second[cut : cut + 600], first[200:400], second[:300]]
                    roles = ("human", "assistant", "human", "assistant")
                    messages = [
                        {"from": role, "content": text}
                        for role, text in zip(roles, turns, strict=True)
                        if text
                    ]
                    record = {"messages": messages, "category": category}
                line = json.dumps(record, ensure_ascii=False) + "\n"
                size += file.write(line) + sum(2 for c in line[::50] if c > "⺀") * 50
        written = sum(path.stat().st_size for path in directory.iterdir())
        number_of_files += 1


def make_tokenizer(directory: Path, vocab_size: int, byte_level: bool) -> None:
    """A tokenizer trained on made-up text: sentencepiece BPE as LLaMA-2's, or byte-level as LLaMA-3's."""
    documents = TextMaker(seed=1).documents()
    if byte_level:
        sys.path.insert(0, str(ROOT / "tests"))
        from support import make_llama3_tokenizer

        texts = [next(documents)[1] for _ in range(max(4000, vocab_size // 5))]
        make_llama3_tokenizer(texts, directory, vocab_size)
        return
    sys.path.insert(0, str(ROOT / "examples"))
    from make_base_model import make_tokenizer as train

    train([next(documents)[1] for _ in range(4000)], directory, vocab_size)


def read_texts(directory: Path, kind: str, megabytes: int) -> list[str]:
    """The texts that preparation encodes, of at most `megabytes` of input."""
    texts, size = [], 0
    for path in sorted(directory.glob("*.jsonl")):
        with open(path, encoding="utf-8") as file:
            for line in file:
                record = json.loads(line)
                if kind == "pretrain":
                    texts.append(record["source"] + record["target"])
                else:
                    texts += [message["content"] for message in record["messages"]]
                size += len(line.encode())
                if size >= megabytes * MEGABYTE:
                    return texts
    return texts


def measure_bare_tokenizer(
    tokenizer_dir: Path, texts: list[str], num_threads: int
) -> tuple[float, float, int]:
    """The Rust tokenizer on texts in memory, in batches of 1,024, ids taken as lists.

    Returns (seconds, CPU seconds of all threads, tokens); starting and loading are not counted.
    """
    code = (
        "import json, sys, time\n"
        "from transformers import AutoTokenizer\n"
        "backend = AutoTokenizer.from_pretrained(sys.argv[1]).backend_tokenizer\n"
        "texts = json.load(open(sys.argv[2]))\n"
        "backend.encode_batch_fast(texts[:1024], add_special_tokens=False)\n"
        "started, cpu, tokens = time.perf_counter(), time.process_time(), 0\n"
        "for i in range(0, len(texts), 1024):\n"
        "    batch = backend.encode_batch_fast(texts[i:i + 1024], add_special_tokens=False)\n"
        "    tokens += sum(len(e.ids) for e in batch)\n"
        "print(time.perf_counter() - started, time.process_time() - cpu, tokens)\n"
    )
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(texts, file)
        file.flush()
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": str(num_threads)}
        output = subprocess.run(
            [sys.executable, "-c", code, str(tokenizer_dir), file.name],
            check=True,
            capture_output=True,
            text=True,
            env=environment,
        ).stdout
    seconds, cpu_seconds, tokens = output.split()
    return float(seconds), float(cpu_seconds), int(tokens)


PLAIN_PROGRAM = """
import json, multiprocessing, sys
import numpy as np, orjson
from tuetoken import Tokenizer

tokenizer_json, paths, number, output = sys.argv[1], sys.argv[4:], int(sys.argv[2]), sys.argv[3]

def texts_of(worker):
    line_number = 0
    for path in paths:
        for line in open(path, "rb"):
            line_number += 1
            if line_number % number == worker:
                record = orjson.loads(line)
                if "target" in record:
                    yield record["source"] + record["target"]
                else:
                    yield from [message["content"] for message in record["messages"]]

def work(worker):
    tokenizer, batch = Tokenizer(tokenizer_json), []
    with open(f"{output}-{worker}", "wb") as file:
        def write():
            ids = tokenizer.encode_ordinary_to_buffer(batch, num_threads=1)["data"].astype(np.int32)
            file.write(ids.data)
            file.write(ids.data)  # as ids and labels
            batch.clear()
        for text in texts_of(worker):
            batch.append(text)
            if len(batch) == 1024:
                write()
        write()

with multiprocessing.Pool(number) as pool:
    pool.map(work, range(number))
"""


def measure_plain_program(tokenizer_dir: Path, data_dir: Path, num_workers: int, work_dir: Path) -> Run:
    """The limit: lines to ids to a file twice, in as many processes, by the fastest engine and nothing else.

    No template, no rows, no checks, no record may be bad. The tokenizer is read in the form that preparation
    found for the engine.
    """
    from transformers import AutoTokenizer

    from colossal_llama.dataset.engines.trial import find_form, write_form

    plain_json = work_dir / "plain.json"
    plain_json.write_text(AutoTokenizer.from_pretrained(tokenizer_dir).backend_tokenizer.to_str())
    number, _ = find_form("tuetoken", str(plain_json), work_dir)
    form = write_form("tuetoken", str(plain_json), number, work_dir)
    paths = [str(path) for path in sorted(data_dir.glob("*.jsonl"))]
    started, cpu_before = time.perf_counter(), _cpu_of_children()
    command = [
        sys.executable,
        "-c",
        PLAIN_PROGRAM,
        str(form),
        str(num_workers),
        str(work_dir / "plain"),
        *paths,
    ]
    subprocess.run(command, check=True)
    return Run(time.perf_counter() - started, _cpu_of_children() - cpu_before, 0, 0, 0)


def run_script(script: str, arguments: list[str]) -> Run:
    """Runs a prepare script to its end, watching time and memory."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / script), *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.getenv("PYTHONPATH")])]),
        },
    )
    run = Run(0.0, 0.0, 0, 0, 0)
    cpu_before = _cpu_of_children()
    watcher = threading.Thread(target=_watch_memory, args=(process, run))
    watcher.start()
    _, errors = process.communicate()
    run.seconds = time.perf_counter() - started
    run.cpu_seconds = _cpu_of_children() - cpu_before
    watcher.join()
    if process.returncode:
        raise RuntimeError(f"{script} failed:\n{errors}")
    return run


def _cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _watch_memory(process: subprocess.Popen, run: Run) -> None:
    while process.poll() is None:
        total = 0
        for process_id in _process_tree(process.pid):
            resident, proportional = _read_memory(process_id)
            total += proportional
            if process_id == process.pid:
                run.peak_main = max(run.peak_main, resident)
            else:
                run.peak_worker = max(run.peak_worker, resident)
        run.peak_all = max(run.peak_all, total)
        time.sleep(0.1)


def _process_tree(process_id: int) -> Iterator[int]:
    """A process and all that it or they started."""
    yield process_id
    for path in Path(f"/proc/{process_id}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for name in path.read_text().split():
                yield from _process_tree(int(name))


def _read_memory(process_id: int) -> tuple[int, int]:
    """(resident, proportional) set size in bytes; zeros when the process has gone."""
    try:
        lines = Path(f"/proc/{process_id}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0, 0
    sizes = {line.split(":")[0]: line.split()[1] for line in lines[1:] if ":" in line}
    return int(sizes.get("Rss", 0)) * 1024, int(sizes.get("Pss", 0)) * 1024


def prepare(
    kind: str,
    data_dir: Path,
    tokenizer_dir: Path,
    args: Namespace,
    output: Path,
    ray_address: str = "none",
    engine: str = "auto",
) -> tuple[Run, dict]:
    """One end-to-end run; returns what was measured, and the run's stats.json."""
    shutil.rmtree(output, ignore_errors=True)
    arguments = ["--data_input_dirs", str(data_dir), "--tokenizer_dir", str(tokenizer_dir)]
    arguments += ["--data_output_dirs", str(output), "--max_length", str(args.max_length)]
    arguments += ["--num_workers", str(args.num_workers), "--ray_address", ray_address]
    if engine == CHAT_TEMPLATE:
        arguments += ["--chat_template"]
    else:
        arguments += ["--tokenizer_engine", engine]
        if kind == "sft":
            arguments += ["--llama_version", _find_version(tokenizer_dir)]
    run = run_script(f"prepare_{kind}_dataset.py", arguments)
    stats = json.loads((output / "stats.json").read_text())
    shutil.rmtree(output)
    return run, stats


def add_chat_template(tokenizer_dir: Path, directory: Path) -> Path:
    """A copy of the tokenizer that has the default template as a Jinja text of its own."""
    from transformers import AutoTokenizer

    from colossal_llama.conversation import find_template

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.chat_template = find_template("colossal").of_tokenizer(tokenizer).chat_template()
    tokenizer.save_pretrained(directory)
    return directory


def _find_version(tokenizer_dir: Path) -> str:
    from transformers import AutoTokenizer

    from colossal_llama.conversation.colossal import find_llama_version

    return str(find_llama_version(AutoTokenizer.from_pretrained(tokenizer_dir)))


def benchmark(args: Namespace, work_dir: Path) -> None:
    import tokenizers

    log(
        f"Python {platform.python_version()}, tokenizers {tokenizers.__version__}, "
        f"{args.num_workers} workers, {args.size_mb} MB, rows of {args.max_length} tokens"
    )
    tokenizer_dir = args.tokenizer_dir or work_dir / "tokenizer"
    if not tokenizer_dir.exists():
        make_tokenizer(tokenizer_dir, args.vocab_size, args.byte_level)
    speed, memory = [], []
    for kind in ("pretrain", "sft"):
        data_dir = work_dir / f"{kind}-{args.size_mb}mb"
        if not data_dir.exists():
            make_corpus(data_dir, kind, args.size_mb, args.source_share)
        texts = read_texts(data_dir, kind, args.size_mb)
        engines = [engine for engine in ENGINES if engine == REFERENCE or installed_version(engine)]
        tokenizers_of = dict.fromkeys(engines, tokenizer_dir)
        if kind == "sft":
            tokenizers_of[CHAT_TEMPLATE] = add_chat_template(
                tokenizer_dir, work_dir / "tokenizer_with_template"
            )
        bare, plain, runs_of = [], [], {engine: [] for engine in tokenizers_of}
        for _ in range(args.repeats):  # in turns, so that a busy machine slows all
            bare.append(measure_bare_tokenizer(tokenizer_dir, texts, args.num_workers))
            if "tuetoken" in engines:
                plain.append(measure_plain_program(tokenizer_dir, data_dir, args.num_workers, work_dir))
            for engine, runs in runs_of.items():
                output = work_dir / "out"
                runs.append(prepare(kind, data_dir, tokenizers_of[engine], args, output, engine=engine))
        seconds, _, num_tokens = min(bare)
        if plain:
            limit = min(plain, key=lambda run: run.seconds)
            figures = ["", f"{num_tokens / limit.seconds:,.0f}", seconds / limit.seconds]
            cpu_ratio = min(cpu for _, cpu, _ in bare) / min(run.cpu_seconds for run in plain)
            speed.append([kind, "(limit)", num_tokens, *figures, cpu_ratio, ""])
        for engine, ours in runs_of.items():
            cpu_ratio = min(cpu for _, cpu, _ in bare) / min(run.cpu_seconds for run, _ in ours)
            run, stats = min(ours, key=lambda item: item[0].seconds)
            # Tokens of the texts alone on both sides: what the SFT template adds is not counted as work done.
            bare_speed, our_speed = num_tokens / seconds, num_tokens / run.seconds
            fill = stats["rows"]["fill_without_last_rows"]
            figures = [
                f"{bare_speed:,.0f}",
                f"{our_speed:,.0f}",
                our_speed / bare_speed,
                cpu_ratio,
                f"{100 * fill:.2f} %",
            ]
            speed.append([kind, engine, num_tokens, *figures])
            memory.append(_memory_line(f"{kind} {args.size_mb} MB, {engine}", run))
            report_preparation(kind, engine, args, our_speed, our_speed / bare_speed, 100 * fill)
            report_memory(kind, args.size_mb, args, run, f", {engine}")
        sizes = [10] * args.memory + [1000] * (args.large and kind == "pretrain")
        for size in sizes:
            sized_dir = work_dir / f"{kind}-{size}mb"
            if not sized_dir.exists():
                make_corpus(sized_dir, kind, size, args.source_share)
            run, _ = prepare(kind, sized_dir, tokenizer_dir, args, work_dir / "out")
            memory.append(_memory_line(f"{kind} {size} MB", run))
            report_memory(kind, size, args, run)
    log(
        format_table(
            ["", "engine", "tokens", "bare tokens/s", "ours, end to end", "ratio", "CPU ratio", "fill"], speed
        )
    )
    log("")
    log(format_table(["peak memory, MB", "main", "largest worker", "all together", "seconds"], memory))
    if args.ray:
        benchmark_ray(work_dir / f"pretrain-{args.size_mb}mb", tokenizer_dir, args, work_dir)


@contextlib.contextmanager
def ray_cluster(num_cpus: int) -> Iterator[str]:
    """The address of a cluster of one node that runs already, as users find theirs."""
    os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0")
    os.environ["PYTHONPATH"] = str(ROOT)  # for the cluster's workers
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": num_cpus, "include_dashboard": False})
    try:
        yield cluster.address
    finally:
        cluster.shutdown()


def benchmark_ray(data_dir: Path, tokenizer_dir: Path, args: Namespace, work_dir: Path) -> None:
    """One line: what the way through Ray costs, with the same number of workers."""
    local, ray = [], []
    with ray_cluster(args.num_workers) as address:
        for _ in range(args.repeats):  # in turns, so that a busy machine slows both
            for runs, where in ((local, "none"), (ray, address)):
                runs.append(prepare("pretrain", data_dir, tokenizer_dir, args, work_dir / "out", where))
    seconds = {name: min(run.seconds for run, _ in runs) for name, runs in (("local", local), ("ray", ray))}
    num_tokens = local[0][1]["rows"]["tokens"]
    speeds = {name: num_tokens / value / args.num_workers for name, value in seconds.items()}
    log(
        f"\nRay: {seconds['ray']:.1f} s against {seconds['local']:.1f} s with local workers, "
        f"{seconds['ray'] / seconds['local']:.3f} ×; tokens/s a core, whole command: "
        f"{speeds['ray']:,.0f} against {speeds['local']:,.0f}"
    )


def report_preparation(
    kind: str, engine: str, args: Namespace, speed: float, ratio: float, fill: float
) -> None:
    name = f"{_describe(kind, args, args.size_mb)}, {engine}"
    report(f"{name}: speed", speed / 1e6, "M tokens/s", note=f"fastest of {args.repeats}")
    promise = f"prepare_{kind}.{'speed' if engine == REFERENCE else engine.lstrip('-')}"
    report(f"{name}: against the bare tokenizer", ratio, "×", promise=promise)
    if kind == "pretrain":
        report(f"{name}: rows full", fill, "%", promise="prepare.fill", note="each bin's last row left out")


def report_memory(kind: str, size: int, args: Namespace, run: Run, engine: str = "") -> None:
    report(
        f"{_describe(kind, args, size)}{engine}: peak memory of all processes",
        run.peak_all / 1e9,
        "GB",
        promise="prepare.memory",
        num_workers=args.num_workers,
    )


def _describe(kind: str, args: Namespace, size: int) -> str:
    pieces = f", {args.vocab_size:,} byte-level pieces" if args.byte_level else ""
    return f"prepare_{kind}_dataset.py, {size} MB, {args.num_workers} workers{pieces}"


def _memory_line(name: str, run: Run) -> list:
    sizes = [size // MEGABYTE for size in (run.peak_main, run.peak_worker, run.peak_all)]
    return [name, *sizes, round(run.seconds, 1)]


def main() -> None:
    args = build_parser().parse_args()
    if args.work_dir is not None:
        args.work_dir.mkdir(parents=True, exist_ok=True)
        benchmark(args, args.work_dir)
        return
    with tempfile.TemporaryDirectory() as work_dir:
        benchmark(args, Path(work_dir))


if __name__ == "__main__":
    run_command(main)

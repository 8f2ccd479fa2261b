"""Measures init_tokenizer.py as a whole process: 37,104 pieces for a 32,000-piece LLaMA-2 style tokenizer.

Without `--source_tokenizer_dir` it trains such a tokenizer on made-up words first. The pieces are made up
too: Chinese words of one to four characters with a natural distribution of frequencies.
"""

from __future__ import annotations

import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from figures import report_median

from colossal_llama.utils.arguments import ArgumentParser, existing_directory, existing_file, positive_int
from colossal_llama.utils.console import format_table, log
from colossal_llama.utils.errors import run_command

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "colossal_llama" / "tokenizer" / "init_tokenizer.py"
MODES = ("report", "add", "drop")
FIRST_HAN, NUM_HAN = 0x4E00, 8000
SYLLABLES = [consonant + vowel for consonant in "bcdfghjklmnpqrstvwxz" for vowel in "aeiou"]


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="init_tokenizer.py", description=__doc__)
    parser.add_argument(
        "--source_tokenizer_dir", type=existing_directory, help="tokenizer to extend (default: trains one)"
    )
    parser.add_argument("--expand_tokens_file", type=existing_file, help="pieces (default: makes some up)")
    parser.add_argument("--vocab_size", type=positive_int, default=32000, help="pieces of a trained source")
    parser.add_argument("--num_pieces", type=positive_int, default=37104, help="made-up pieces")
    parser.add_argument(
        "--num_texts", type=positive_int, default=60_000, help="sentences that a source is trained on"
    )
    parser.add_argument(
        "--repeats", type=positive_int, default=5, help="runs of each mode; the median counts"
    )
    return parser


def made_up_texts(count: int, generator: random.Random) -> list[str]:
    """Sentences of made-up Latin words whose frequencies fall as in natural text."""
    words = {"".join(generator.choices(SYLLABLES, k=generator.randint(1, 5))) for _ in range(60_000)}
    ranked = sorted(words, key=lambda word: (len(word), word))
    weights = [1 / rank for rank in range(1, len(ranked) + 1)]
    return [" ".join(generator.choices(ranked, weights, k=40)) + "." for _ in range(count)]


def train_source(directory: Path, vocab_size: int, num_texts: int = 60_000) -> None:
    """Trains a tokenizer with LLaMA-2's settings."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("maker", ROOT / "examples" / "make_base_model.py")
    maker = importlib.util.module_from_spec(spec)
    sys.modules["maker"] = maker  # its dataclasses look themselves up
    spec.loader.exec_module(maker)
    maker.make_tokenizer(made_up_texts(num_texts, random.Random(0)), directory, vocab_size)


def write_pieces(path: Path, count: int) -> None:
    """Single characters and words of two to four, the more frequent characters in more of the words."""
    generator = random.Random(1)
    characters = [chr(FIRST_HAN + i) for i in range(NUM_HAN)]
    weights = [1 / (rank + 20) for rank in range(NUM_HAN)]
    pieces = dict.fromkeys(characters[: count // 6])
    while len(pieces) < count:
        length = generator.choices((2, 3, 4), (60, 25, 15))[0]
        pieces["".join(generator.choices(characters, weights, k=length))] = None
    path.write_text(
        "".join(json.dumps({"piece": p}, ensure_ascii=False) + "\n" for p in pieces), encoding="utf-8"
    )


def measure(command: list[str], environment: dict[str, str]) -> tuple[float, int]:
    """Wall-clock seconds and peak memory (bytes) of one process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise RuntimeError(f"{' '.join(command)} failed: run it by hand to see why")
    return seconds, usage.ru_maxrss * 1024


def main() -> None:
    args = build_parser().parse_args()
    log(
        f"Python {platform.python_version()}, sentencepiece {version('sentencepiece')}, tokenizers "
        f"{version('tokenizers')}, protobuf {version('protobuf')}, {len(os.sched_getaffinity(0))} cores, "
        f"{platform.platform()}"
    )
    with tempfile.TemporaryDirectory() as work:
        source, pieces = Path(work) / "source", Path(work) / "pieces.jsonl"
        if args.source_tokenizer_dir is None:
            train_source(source, args.vocab_size, args.num_texts)
        write_pieces(pieces, args.num_pieces)
        plain = dict(os.environ)
        cases = [(mode, mode, plain) for mode in MODES]
        pure_python = {**plain, "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"}
        cases.append(("report, the seed's protobuf setting", "report", pure_python))
        rows, seconds_of = [], {}
        for name, mode, environment in cases:
            target = Path(work) / f"target_{len(rows)}"
            command = [
                sys.executable,
                str(SCRIPT),
                f"--source_tokenizer_dir={args.source_tokenizer_dir or source}",
                f"--target_tokenizer_dir={target}",
                f"--expand_tokens_file={args.expand_tokens_file or pieces}",
                f"--unreachable={mode}",
            ]
            measure(command, environment)  # warms the disk cache
            runs = []
            for _ in range(args.repeats):
                shutil.rmtree(target)
                runs.append(measure(command, environment))
            seconds = seconds_of[name] = [run[0] for run in runs]
            counts = json.loads((target / "vocabulary_extension.json").read_text(encoding="utf-8"))["counts"]
            rows.append(
                (
                    name,
                    statistics.median(seconds),
                    max(seconds),
                    max(run[1] for run in runs) / 1e6,
                    counts["target_vocabulary_size"],
                    counts["intermediates_added"],
                    counts["of_these_unreachable"] + counts["unreachable_pieces_dropped"],
                )
            )
    header = ["--unreachable", "median s", "worst s", "peak MB", "target ids", "intermediates", "unreachable"]
    log(format_table(header, rows))
    extended = f"init_tokenizer.py, {args.num_pieces:,} pieces on {args.vocab_size:,}"
    for name, seconds in seconds_of.items():
        report_median(f"{extended}: {name}", seconds, "s", promise="init_tokenizer.seconds")


if __name__ == "__main__":
    run_command(main)

"""Pre-training data end to end against LLaMA-Factory's preprocessing: same text, tokenizer and cores.

LLaMA-Factory pins other versions than this suite goes with, so it is taken from a directory of its own
(docs/performance.md says how to fill it) and asked for its `PretrainDatasetProcessor` alone, with packing on:
the JSONL is read, mapped in batches of 1,000 (its default) by as many processes as ours has workers, and
saved, all by the installed `datasets`. Both sides are whole processes. Without the directory the peer is left
out.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

from figures import report, report_median
from prepare_dataset import make_corpus, make_tokenizer, prepare

from colossal_llama.utils.arguments import ArgumentParser, existing_directory, number, positive_int
from colossal_llama.utils.console import log
from colossal_llama.utils.errors import run_command

BATCH_SIZE = 1000


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="prepare_peer.py", description=__doc__)
    parser.add_argument(
        "--llamafactory_dir",
        type=existing_directory,
        default=os.environ.get("LLAMAFACTORY_DIR"),
        help="where LLaMA-Factory was installed with pip --target (default: $LLAMAFACTORY_DIR)",
    )
    parser.add_argument("--size_mb", type=positive_int, default=100, help="size of the corpus, in MB")
    parser.add_argument("--vocab_size", type=number(int, 1000), default=32000, help="pieces of the tokenizer")
    parser.add_argument("--max_length", type=number(int, 2), default=4096, help="longest row, in tokens")
    parser.add_argument(
        "--num_workers", type=positive_int, default=len(os.sched_getaffinity(0)), help="cores for both sides"
    )
    parser.add_argument(
        "--repeats", type=positive_int, default=3, help="runs of each side; the median counts"
    )
    return parser


def preprocess(corpus: str, tokenizer_dir: str, output: str, max_length: str, num_workers: str) -> None:
    """LLaMA-Factory's side, in a process that finds its package; prints version, rows and tokens as JSON."""
    from importlib.metadata import version

    import datasets
    from llamafactory.data.processor.pretrain import PretrainDatasetProcessor
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    settings = Namespace(template="default", packing=True, cutoff_len=int(max_length))
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    processor = PretrainDatasetProcessor(None, tokenizer, None, settings)

    def process(records: dict[str, list]) -> dict[str, list]:
        texts = map(str.__add__, records["source"], records["target"])
        return processor.preprocess_dataset({"_prompt": [[{"content": text}] for text in texts]})

    files = sorted(str(path) for path in Path(corpus).glob("*.jsonl"))
    dataset = datasets.load_dataset("json", data_files=files, split="train", cache_dir=f"{output}/cache")
    rows = dataset.map(
        process,
        batched=True,
        batch_size=BATCH_SIZE,
        num_proc=int(num_workers),
        remove_columns=dataset.column_names,
        load_from_cache_file=False,
    )
    rows.save_to_disk(f"{output}/rows")
    print(json.dumps([version("llamafactory"), len(rows)]))


def run_peer(args: Namespace, corpus: Path, tokenizer_dir: Path, output: Path) -> tuple[float, str, int]:
    """(seconds, version, rows)."""
    shutil.rmtree(output, ignore_errors=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(args.llamafactory_dir)]),
        "DISABLE_VERSION_CHECK": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, str(Path(__file__).resolve()), "--preprocess", str(corpus), str(tokenizer_dir)]
    command += [str(output), str(args.max_length), str(args.num_workers)]
    started = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    seconds = time.perf_counter() - started
    if result.returncode:
        raise RuntimeError(f"LLaMA-Factory's preprocessing failed:\n{result.stderr}")
    version, num_rows = json.loads(result.stdout.splitlines()[-1])
    return seconds, version, num_rows


def main() -> None:
    args = build_parser().parse_args()
    if args.llamafactory_dir is None:
        note = "not measured: no --llamafactory_dir (docs/performance.md)"
        report("pre-training data against LLaMA-Factory's preprocessing", None, "", note=note)
        return
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        corpus, tokenizer_dir = work / "corpus", work / "tokenizer"
        make_tokenizer(tokenizer_dir, args.vocab_size, byte_level=False)
        make_corpus(corpus, "pretrain", args.size_mb, 0.0)
        ours, peer = [], []
        for _ in range(args.repeats):
            ours.append(prepare("pretrain", corpus, tokenizer_dir, args, work / "ours"))
            peer.append(run_peer(args, corpus, tokenizer_dir, work / "peer"))
    version, num_rows = peer[0][1:]
    stats = ours[0][1]
    num_tokens = stats["rows"]["tokens"]
    what = f"LLaMA-Factory {version} (PretrainDatasetProcessor, packing, {args.num_workers} processes)"
    log(f"{num_tokens:,} tokens, {args.size_mb} MB, rows of {args.max_length}")
    seconds = [run.seconds for run, _ in ours]
    report_median(f"pre-training data, {args.size_mb} MB: ours", seconds, "s")
    report_median(f"pre-training data, {args.size_mb} MB: {what}", [each[0] for each in peer], "s")
    ratios = [each[0] / own for each, own in zip(peer, seconds, strict=True)]
    report_median(f"pre-training data: ours is faster than {what} by", ratios, "×")
    # Its rows are full, the first token of each overwritten by BOS; what is left of a batch is dropped.
    total = stats["total"]
    num_text_tokens = total["tokens_in"] - total["kept"]
    lost = num_text_tokens - num_rows * (args.max_length - 1)
    report(f"tokens lost by {what}", lost, f"of {num_text_tokens:,}", note="BOS not counted")
    report("tokens lost by ours", total["tokens_in"] - total["tokens_out"], f"of {total['tokens_in']:,}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--preprocess"]:
        preprocess(*sys.argv[2:])
    else:
        run_command(main)

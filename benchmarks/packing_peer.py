"""Best-fit packing against trl's `pack_dataset` (strategy "ffd") and filling rows in order: same lengths.

trl packs in batches of the `datasets` library's map (1,000 documents each by default) and cuts off what is
longer than a row. Three ways of running it are measured: its default, one batch for all, and one batch of the
very pieces that ours packs, long documents chunked. Ours is timed with chunking and with writing the packed
`input_ids` as one array, since trl writes them too. Without trl the peer is left out:
`pip install -e '.[benchmark]'`.
"""

from __future__ import annotations

import os
import tempfile
import time

import numpy as np
from figures import installed_versions, report, report_median

from colossal_llama.dataset.packing import PackedRows, pack_best_fit
from colossal_llama.utils.arguments import ArgumentParser, number, positive_int
from colossal_llama.utils.console import log
from colossal_llama.utils.errors import run_command


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="packing_peer.py", description=__doc__)
    parser.add_argument("--num_documents", type=positive_int, default=100_000, help="documents to pack")
    parser.add_argument("--max_length", type=number(int, 2), default=4096, help="longest row, in tokens")
    parser.add_argument(
        "--repeats", type=positive_int, default=3, help="runs of each side; the median counts"
    )
    return parser


def make_lengths(count: int, max_length: int) -> np.ndarray:
    """Log-normal lengths around an eighth of a row; a few per cent are longer than a row."""
    lengths = np.random.default_rng(0).lognormal(np.log(max_length / 8), 1.1, count)
    return np.clip(lengths, 2, 20 * max_length).astype(np.int64)


def chunk(lengths: np.ndarray, max_length: int) -> np.ndarray:
    """Lengths of pieces: long documents are cut into rows and a rest."""
    whole, rest = np.divmod(lengths, max_length)
    pieces = np.concatenate([np.full(whole.sum(), max_length), rest[rest > 0]])
    return pieces.astype(np.int64)


def pack_ours(lengths: np.ndarray, tokens: np.ndarray, max_length: int) -> tuple[float, float, PackedRows]:
    """(seconds in all, seconds of packing alone, rows)."""
    started = time.perf_counter()
    pieces = chunk(lengths, max_length)
    rows = pack_best_fit(pieces, max_length)
    packed = time.perf_counter() - started
    starts = np.concatenate([[0], np.cumsum(pieces)[:-1]])[rows.pieces]
    sizes = pieces[rows.pieces]
    within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    gathered = tokens[np.repeat(starts, sizes) + within]
    assert len(gathered) == len(tokens)
    return time.perf_counter() - started, packed, rows


def pack_trl(dataset, max_length: int, one_batch: bool) -> tuple[float, int, int]:
    """(seconds, rows, tokens)."""
    from trl import pack_dataset

    options = {"load_from_cache_file": False}
    if one_batch:
        options["batch_size"] = len(dataset)
    started = time.perf_counter()
    packed = pack_dataset(dataset, max_length, strategy="ffd", map_kwargs=options)
    seconds = time.perf_counter() - started
    num_tokens = sum(len(chunk.values) for chunk in packed.data.column("input_ids").chunks)
    return seconds, len(packed), num_tokens


def main() -> None:
    args = build_parser().parse_args()
    versions = installed_versions("trl", "datasets", "numpy")
    log(", ".join(f"{name} {version}" for name, version in versions.items()))
    lengths = make_lengths(args.num_documents, args.max_length)
    num_tokens = int(lengths.sum())
    tokens = np.arange(num_tokens, dtype=np.int32)
    log(f"{args.num_documents:,} documents, {num_tokens:,} tokens, rows of {args.max_length}")
    peers: dict[str, tuple[np.ndarray, bool]] = {}
    if versions["trl"] != "not installed":
        peers = {
            "its default": (lengths, False),
            "one batch": (lengths, True),
            "one batch of our pieces": (chunk(lengths, args.max_length), True),
        }
    ours, trl = [], {name: [] for name in peers}
    with tempfile.TemporaryDirectory() as directory:
        os.environ["HF_DATASETS_CACHE"] = directory
        if peers:
            import datasets
            import pyarrow as pa

            datasets.disable_progress_bars()
        for _ in range(args.repeats):
            ours.append(pack_ours(lengths, tokens, args.max_length))
            for name, (sizes, one_batch) in peers.items():
                offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
                column = pa.LargeListArray.from_arrays(offsets, tokens)
                dataset = datasets.Dataset(pa.table({"input_ids": column}))
                trl[name].append(pack_trl(dataset, args.max_length, one_batch))
    rows = ours[0][2]
    seconds = [run[0] for run in ours]
    speeds = [len(rows) / s for s in seconds]
    report_median("packing, ours", speeds, "rows/s", note="packing and gathering the tokens")
    report_median("packing alone, ours", [len(rows) / run[1] for run in ours], "rows/s")
    report("fill of the rows, ours", 100 * num_tokens / (len(rows) * args.max_length), "%")
    report("tokens lost, ours", num_tokens - int(rows.lengths.sum()), f"of {num_tokens:,}")
    if not peers:
        log("trl is not installed (pip install -e '.[benchmark]'): the peer was not measured")
        return
    for name, runs in trl.items():
        how = f"trl {versions['trl']} pack_dataset(strategy='ffd'), {name}"
        _, num_rows, kept = runs[0]
        report_median(f"packing, {how}", [num_rows / run[0] for run in runs], "rows/s")
        report(f"fill of the rows, {how}", 100 * kept / (num_rows * args.max_length), "%")
        report(f"tokens lost, {how}", num_tokens - kept, f"of {num_tokens:,}")
        ratios = [run[0] / own for run, own in zip(runs, seconds, strict=True)]
        report_median(f"ours is faster than {how} by", ratios, "×")


if __name__ == "__main__":
    run_command(main)

"""Supervised fine-tuning on packed, isolated conversations against padding: conversations a second.

The same conversations (log-normal lengths) three ways, through the suite's own trainer: packed into rows as
`prepare_sft_dataset.py --splice` does, one a row padded to the longest of its batch, and one a row padded to
`--max_length`. A batch holds `--batch_size` rows each time. One process, zero2, bf16; on the GPU if there is
one.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
from figures import report

from colossal_llama.utils.arguments import ArgumentParser, number, positive_int
from colossal_llama.utils.errors import run_command

WAYS = {
    "packed, documents isolated": ("max_length", True),
    "padded to the longest of the batch": ("longest", False),
    "padded to --max_length": ("max_length", False),
}


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="sft_padding.py", description=__doc__)
    parser.add_argument("--num_samples", type=positive_int, default=256, help="conversations")
    parser.add_argument("--max_length", type=number(int, 16), default=1024, help="longest row, in tokens")
    parser.add_argument("--batch_size", type=positive_int, default=4, help="rows of a batch")
    parser.add_argument("--hidden_size", type=positive_int, default=256, help="width of the model")
    parser.add_argument("--num_layers", type=positive_int, default=4, help="layers of the model")
    parser.add_argument("--vocab_size", type=positive_int, default=8192, help="vocabulary of the model")
    parser.add_argument("--num_heads", type=positive_int, default=8, help="attention heads")
    parser.add_flag("--use_flash_attn", default=False, help="flash-attn's kernels")
    parser.add_flag("--use_grad_checkpoint", default=False, help="recompute activations")
    return parser


def make_lengths(args: Namespace) -> np.ndarray:
    """Tokens of each conversation: log-normal, the median an eighth of a row, none longer than a row."""
    drawn = np.random.default_rng(0).lognormal(np.log(args.max_length / 8), 0.8, args.num_samples)
    return np.clip(drawn, 8, args.max_length).astype(np.int64)


class Conversations:
    """Rows of random tokens, made of conversations; loss on the second half of each."""

    def __init__(self, rows: list[np.ndarray], vocab_size: int) -> None:
        self.rows, self.vocab_size = rows, vocab_size
        self.bucket_ranges = [[(0, len(rows))]]
        self.sets = []
        self.num_tokens = int(sum(lengths.sum() for lengths in rows))
        self.fingerprint = "conversations"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int):
        from colossal_llama.dataset.labels import NO_LOSS_LABEL
        from colossal_llama.training.data.rows import Row

        lengths = self.rows[index]
        tokens = np.random.default_rng(index).integers(0, self.vocab_size, lengths.sum())
        labels = tokens.copy()
        for start, length in zip(np.cumsum(lengths) - lengths, lengths, strict=True):
            labels[start : start + length // 2] = NO_LOSS_LABEL
        return Row(tokens, labels, lengths)

    def describe_row(self, index: int) -> str:
        return f"row {index} of the benchmark"


def measure(args: Namespace, directory: str, way: str, results) -> None:
    """Trains once over all conversations in this process; hands back (samples/s of each step, padding)."""
    import torch
    from in_process import start_loop

    from colossal_llama.dataset.packing import one_piece_per_row, pack_best_fit

    padding_mode, is_packed = WAYS[way]
    lengths = make_lengths(args)
    packed = pack_best_fit(lengths, args.max_length) if is_packed else one_piece_per_row(lengths)
    source = Conversations([lengths[packed.row(i)] for i in range(len(packed))], args.vocab_size)
    flags = [
        *("--pretrained", directory, "--plugin", "zero2", "--mixed_precision", "bf16", "--num_workers", "0"),
        *("--max_length", str(args.max_length), "--padding_mode", padding_mode, "--num_epochs", "2"),
        *("--batch_size", str(args.batch_size), "--accumulation_steps", "1"),
        *("--use_flash_attn", str(args.use_flash_attn)),
        *("--use_grad_checkpoint", str(args.use_grad_checkpoint)),
    ]
    loop = start_loop(flags, source)
    batches, num_steps = loop.batches(), len(source) // args.batch_size
    if not num_steps:
        raise RuntimeError(f"{len(source)} rows are fewer than --batch_size {args.batch_size}")
    loop.step(batches)  # warms up
    samples = [0]
    places = 0
    speeds = []

    def counted():
        nonlocal places
        for batch in batches:
            samples[0] = sum(len(source.rows[row]) for row in batch["row_index"].tolist())
            places += batch["input_ids"].numel()
            yield batch

    counting = counted()
    total_samples, tokens, started = 0, loop.state.tokens, time.perf_counter()
    for _ in range(num_steps):
        step_started = time.perf_counter()
        loop.step(counting)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        speeds.append(samples[0] / (time.perf_counter() - step_started))
        total_samples += samples[0]
    seconds = time.perf_counter() - started
    fill = (loop.state.tokens - tokens) / places
    results.put((total_samples / seconds, speeds, fill))


def main() -> None:
    args = build_parser().parse_args()
    context = multiprocessing.get_context("spawn")
    results: dict[str, tuple[float, list[float], float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        from in_process import write_config

        write_config(
            Path(directory),
            args.vocab_size,
            args.hidden_size,
            args.num_layers,
            args.max_length,
            num_heads=args.num_heads,
        )
        for way in WAYS:
            queue = context.Queue()
            process = context.Process(target=measure, args=(args, directory, way, queue))
            process.start()
            while process.is_alive() and queue.empty():
                process.join(0.1)
            if queue.empty():
                raise RuntimeError(f"{way}: the training process ended with code {process.exitcode}")
            results[way] = queue.get()
            process.join()
    first = next(iter(WAYS))
    for way, (speed, speeds, fill) in results.items():
        note = f"{100 * fill:.1f} % of the places hold tokens; steps: {min(speeds):.3g} to {max(speeds):.3g}"
        report(f"SFT, {way}", speed, "samples/s", note=note)
    for way in list(WAYS)[1:]:
        report(f"SFT, {first}, against {way}", results[first][0] / results[way][0], "×")


if __name__ == "__main__":
    run_command(main)

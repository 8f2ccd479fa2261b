"""A training step of the suite against a bare PyTorch loop and `transformers.Trainer`: same model, batches,
precision and optimizer.

`ddp`, one process, fp32 on a CPU. The bare loop is transformers' model with its own loss, torch's fused AdamW
and gradient clipping, nothing else; the Trainer runs as it comes, logging and saving off. Each side keeps a
model of its own and they take turns, step by step, so that a noisy machine slows all; the figure is the
median of the ratios, turn by turn.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from figures import installed_versions, report_median
from in_process import BareLoop, start_loop, transformers_trainer, write_config

from colossal_llama.utils.arguments import ArgumentParser, non_negative_int, positive_int
from colossal_llama.utils.console import log
from colossal_llama.utils.errors import run_command

if TYPE_CHECKING:
    from colossal_llama.training.loop import TrainingLoop


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="train_step.py", description=__doc__)
    parser.add_argument("--pairs", type=positive_int, default=8, help="measured steps of each side")
    parser.add_argument(
        "--warmup", type=non_negative_int, default=2, help="steps of each side that are not counted"
    )
    parser.add_argument("--max_length", type=positive_int, default=512, help="tokens of a row")
    parser.add_argument("--batch_size", type=positive_int, default=1, help="rows of a micro-batch")
    parser.add_argument("--accumulation_steps", type=positive_int, default=2, help="micro-batches of a step")
    parser.add_argument("--hidden_size", type=positive_int, default=512, help="width of the model")
    parser.add_argument("--num_layers", type=positive_int, default=8, help="layers of the model")
    parser.add_argument("--vocab_size", type=positive_int, default=24576, help="vocabulary of the model")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as directory:
        model_dir = Path(directory)
        write_config(model_dir, args.vocab_size, args.hidden_size, args.num_layers, args.max_length)
        rows_per_step = args.batch_size * args.accumulation_steps
        flags = [
            *("--pretrained", str(model_dir), "--plugin", "ddp", "--mixed_precision", "fp32"),
            *("--max_length", str(args.max_length), "--batch_size", str(args.batch_size)),
            *("--accumulation_steps", str(args.accumulation_steps), "--num_workers", "0"),
            *("--num_samples", str((args.warmup + args.pairs) * rows_per_step)),
        ]
        measure(args, start_loop(flags), model_dir)


def measure(args: Namespace, loop: TrainingLoop, directory: Path) -> None:
    import torch
    from transformers import TrainerCallback

    from colossal_llama.training.llama.loading import random_causal_lm

    wanted = loop.settings.optimizer
    batches = loop.batches()
    bare_batches = (batch["input_ids"] for batch in loop.batches())
    config = loop.inputs.config
    bare = BareLoop(random_causal_lm(config, torch.float32, wanted.seed), wanted.lr)
    peer_model = random_causal_lm(config, torch.float32, wanted.seed)
    seconds: dict[str, list[float]] = {"ours": [], "bare": [], "transformers": []}

    bare_losses: list[float] = []

    class TakingTurns(TrainerCallback):
        """Times the Trainer from step end to step end, its data and bookkeeping included; ours and the bare
        loop have their turns in between.
        """

        turn = 0

        def on_train_begin(self, *_: object, **__: object) -> None:
            self._others()

        def on_step_end(self, *_: object, **__: object) -> None:
            seconds["transformers"].append(time.perf_counter() - self.started)
            self.turn += 1
            if self.turn < args.warmup + args.pairs:
                self._others()

        def _others(self) -> None:
            started = time.perf_counter()
            record = loop.step(batches).record
            middle = time.perf_counter()
            bare_loss = bare.step(bare_batches, args.accumulation_steps)
            ended = time.perf_counter()
            seconds["ours"].append(middle - started)
            seconds["bare"].append(ended - middle)
            if self.turn == 0 and abs(record["loss"] - bare_loss) > 1e-4 * bare_loss:
                raise RuntimeError(f"the sides compute different losses: {record['loss']} and {bare_loss}")
            bare_losses.append(bare_loss)
            self.started = time.perf_counter()

    turns = TakingTurns()
    rows = torch.cat([batch["input_ids"] for batch in loop.batches()])
    peer = transformers_trainer(
        peer_model,
        rows,
        args.batch_size,
        args.accumulation_steps,
        wanted.lr,
        directory,
        turns,
        use_cpu=True,
    )
    peer_loss, bare_loss = peer.train().training_loss, sum(bare_losses) / len(bare_losses)
    if abs(peer_loss - bare_loss) > 1e-2 * bare_loss:
        raise RuntimeError(f"transformers.Trainer computes another loss: {peer_loss}, the loop {bare_loss}")
    versions = installed_versions("torch", "transformers", "accelerate")
    log(", ".join(f"{name} {version}" for name, version in versions.items()))
    log(f"{torch.get_num_threads()} threads, CPU, {peer_model.num_parameters() / 1e6:.1f}M parameters")
    log(json.dumps(vars(args)))
    counted = {name: times[args.warmup :] for name, times in seconds.items()}
    for name, times in counted.items():
        report_median(f"training step, ddp × 1, fp32: {name}", times, "s")
    for name, promise in (("bare", "train_step.ratio"), ("transformers", None)):
        ratios = [a / b for a, b in zip(counted["ours"], counted[name], strict=True)]
        what = "a bare PyTorch loop" if name == "bare" else f"transformers.Trainer {versions['transformers']}"
        report_median(f"training step, ddp × 1, fp32: ours against {what}", ratios, "×", promise=promise)


if __name__ == "__main__":
    run_command(main, exit_at_once=True)

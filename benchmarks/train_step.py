"""A training step of the suite against a bare PyTorch loop: same model, batches, precision and optimizer.

`ddp`, one process, fp32 on a CPU. The bare loop is transformers' model with its own loss, torch's fused AdamW
and gradient clipping, nothing else. Both sides keep a model of their own and take turns, so that a noisy
machine slows both; the figure is the median of the ratios, pair by pair.
"""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

from colossal_llama.training.arguments import build_parser
from colossal_llama.utils.arguments import ArgumentParser, positive_int
from colossal_llama.utils.errors import run_command

PROMISE = 1.03


def parse() -> ArgumentParser:
    parser = ArgumentParser(prog="train_step.py", description=__doc__)
    parser.add_argument("--pairs", type=positive_int, default=8, help="measured steps of each side")
    parser.add_argument(
        "--warmup", type=positive_int, default=2, help="steps of each side that are not counted"
    )
    parser.add_argument("--max_length", type=positive_int, default=512, help="tokens of a row")
    parser.add_argument("--batch_size", type=positive_int, default=1, help="rows of a micro-batch")
    parser.add_argument("--accumulation_steps", type=positive_int, default=2, help="micro-batches of a step")
    parser.add_argument("--hidden_size", type=positive_int, default=512, help="width of the model")
    parser.add_argument("--num_layers", type=positive_int, default=8, help="layers of the model")
    parser.add_argument("--vocab_size", type=positive_int, default=24576, help="vocabulary of the model")
    return parser


def make_config(args):
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 11 // 4,
        num_hidden_layers=args.num_layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=args.max_length,
    )


def main() -> None:
    args = parse().parse_args()
    with tempfile.TemporaryDirectory() as directory:
        make_config(args).save_pretrained(directory)
        measure(args, Path(directory))


def measure(args, model_dir: Path) -> None:
    import torch

    from colossal_llama.training import setup
    from colossal_llama.training.schedule import LearningRateSchedule
    from colossal_llama.training.state import TrainState
    from colossal_llama.training.strategy import ADAM_BETAS, ADAM_EPS, Strategy
    from colossal_llama.training.trainer import Trainer

    num_steps = args.warmup + args.pairs
    flags = [
        *("--pretrained", str(model_dir), "--benchmark", "--plugin", "ddp", "--mixed_precision", "fp32"),
        *("--max_length", str(args.max_length), "--batch_size", str(args.batch_size), "--num_workers", "0"),
        *("--accumulation_steps", str(args.accumulation_steps)),
        *("--num_samples", str(num_steps * args.batch_size * args.accumulation_steps)),
    ]
    train_args = build_parser().parse_args(flags)
    setup.quieten_libraries()
    stop = setup.start_process(train_args)
    inputs = setup.open_inputs(train_args)
    strategy = Strategy(train_args)
    setup.boost_model(train_args, strategy, inputs, None, None)
    schedule = LearningRateSchedule(train_args.lr, 1, num_steps)
    settings = setup.collator_settings(train_args, strategy, inputs)
    trainer = Trainer(
        train_args, strategy, inputs.source, {}, settings, schedule, TrainState(), None, None, stop
    )
    batches = trainer.batches()

    bare = setup.random_causal_lm(inputs.config, torch.float32, train_args.seed).train()
    optimizer = torch.optim.AdamW(
        bare.parameters(), lr=train_args.lr, betas=ADAM_BETAS, eps=ADAM_EPS, weight_decay=0.1, fused=True
    )
    bare_batches = trainer.batches()

    def bare_step() -> float:
        total = 0.0
        for _ in range(args.accumulation_steps):
            ids = next(bare_batches)["input_ids"]
            loss = bare(input_ids=ids, labels=ids).loss / args.accumulation_steps
            loss.backward()
            total += float(loss)
        torch.nn.utils.clip_grad_norm_(bare.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    ours_seconds, bare_seconds = [], []
    for step in range(num_steps):
        started = time.perf_counter()
        record = trainer.step(batches).record
        middle = time.perf_counter()
        bare_loss = bare_step()
        ended = time.perf_counter()
        if step == 0 and abs(record["loss"] - bare_loss) > 1e-4 * bare_loss:
            raise RuntimeError(f"the two sides compute different losses: {record['loss']} and {bare_loss}")
        if step >= args.warmup:
            ours_seconds.append(middle - started)
            bare_seconds.append(ended - middle)
    ratios = [a / b for a, b in zip(ours_seconds, bare_seconds, strict=True)]
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    print(f"{versions}, {torch.get_num_threads()} threads, CPU")
    print(f"{bare.num_parameters() / 1e6:.1f}M parameters, {json.dumps(vars(args))}")
    print(f"ours  {statistics.median(ours_seconds):.3f} s a step (median of {args.pairs})")
    print(f"bare  {statistics.median(bare_seconds):.3f} s a step")
    print(
        f"ratio {statistics.median(ratios):.3f} (min {min(ratios):.3f}, max {max(ratios):.3f}); "
        f"promised: at most {PROMISE}"
    )


if __name__ == "__main__":
    run_command(main, exit_at_once=True)

"""Start-up: seconds from the command to the first optimizer step of `train.py`, split by what they go to, and
the whole-process time of the other scripts at their smallest.

The split counts imports by themselves, wherever they happen; every other part is without them. With more than
one process `torchrun` starts them, and rank 0 is told. A tiny model and tiny data: what is measured is what
any run pays once.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STARTED_VARIABLE = "START_UP_BEGAN_AT"
OUTPUT_VARIABLE = "START_UP_OUTPUT"
BEFORE, IMPORTS, OTHER = "launcher and interpreter", "imports", "other"
PARTS = (BEFORE, IMPORTS, "process group", "data", "model", "booster", "first step", OTHER)


class Clock:
    """Seconds by part. Parts nest: an inner part's time is taken from the outer one's."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.current = OTHER
        self.since = time.monotonic()

    def switch(self, part: str) -> str:
        """Charges the time so far to the current part; returns that part."""
        now = time.monotonic()
        self.seconds[self.current] += now - self.since
        self.since, previous, self.current = now, self.current, part
        return previous

    def timed(self, function, part: str):
        def wrapper(*args, **kwargs):
            previous = self.switch(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.switch(previous)

        return wrapper


def run_train(arguments: list[str]) -> None:
    """Runs `train.py` in this process up to the end of its first step, and hands in the parts."""
    import builtins
    import importlib

    clock = Clock()
    # Processes of one machine share this clock.
    clock.seconds[BEFORE] = clock.since - float(os.environ[STARTED_VARIABLE])
    builtins.__import__ = clock.timed(builtins.__import__, IMPORTS)
    importlib.import_module = clock.timed(importlib.import_module, IMPORTS)
    sys.argv = [str(ROOT / "train.py"), *arguments]
    sys.path.insert(0, str(ROOT))
    from colossal_llama.training import process

    process.start_process = clock.timed(process.start_process, "process group")
    wrap_after_start(clock, process)
    import train

    train.main()
    raise RuntimeError("train.py came to its end without a step")


def wrap_after_start(clock: Clock, process) -> None:
    """Wraps what a run is made of once `start_process` has installed what their imports need."""
    start_process = process.start_process

    def start_then_wrap(optimizer):
        stop = start_process(optimizer)
        from colossal_llama.training import run
        from colossal_llama.training.loop import TrainingLoop
        from colossal_llama.training.plugins.base import Plugin

        run.open_inputs = clock.timed(run.open_inputs, "data")
        run.load_causal_lm = clock.timed(run.load_causal_lm, "model")
        Plugin.start = clock.timed(Plugin.start, "booster")
        Plugin.boost = clock.timed(Plugin.boost, "booster")
        TrainingLoop.batches = clock.timed(TrainingLoop.batches, "data")
        step = clock.timed(TrainingLoop.step, "first step")

        def step_and_leave(self, batches):
            step(self, batches)
            clock.switch(OTHER)
            if os.environ.get("RANK", "0") == "0":
                Path(os.environ[OUTPUT_VARIABLE]).write_text(json.dumps(clock.seconds), encoding="utf-8")
            os._exit(0)

        TrainingLoop.step = step_and_leave
        return stop

    process.start_process = start_then_wrap


def build_parser():
    from colossal_llama.utils.arguments import ArgumentParser, positive_int

    parser = ArgumentParser(prog="start_up.py", description=__doc__)
    parser.add_argument("--repeats", type=positive_int, default=5, help="starts of each; the median counts")
    parser.add_argument(
        "--processes", type=positive_int, nargs="+", default=[1, 2], help="numbers of processes to train with"
    )
    parser.add_argument(
        "--plugins", nargs="+", choices=("ddp", "zero2"), default=["ddp", "zero2"], help="plugins of train.py"
    )
    parser.add_flag("--only_training", default=False, help="leave the other scripts out")
    return parser


def prepare_inputs(directory: Path) -> None:
    """A tiny model with its tokenizer and the bundled sample, prepared."""
    examples = ROOT / "examples"
    run(
        "examples/make_base_model.py",
        *("--data_input_dirs", str(examples / "data" / "pretrain"), "--output_dir", str(directory / "model")),
        *("--hidden_size", "64", "--num_layers", "2"),
    )
    run("prepare_pretrain_dataset.py", *preparation_flags(directory, "pretrain", "data"))


def preparation_flags(directory: Path, kind: str, output: str) -> list[str]:
    return [
        *("--data_input_dirs", str(ROOT / "examples" / "data" / kind)),
        *("--tokenizer_dir", str(directory / "model"), "--data_output_dirs", str(directory / output)),
        *("--max_length", "512", "--num_workers", "1", "--num_spliced_dataset_bins", "2", "--overwrite"),
    ]


def run(script: str, *arguments: str) -> float:
    """Seconds of a whole process."""
    started = time.monotonic()
    result = subprocess.run([sys.executable, str(ROOT / script), *arguments], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{script} failed:\n{result.stderr}")
    return time.monotonic() - started


def start_training(directory: Path, plugin: str, num_processes: int) -> dict[str, float]:
    """One start; seconds by part."""
    flags = [
        *("--pretrained", str(directory / "model"), "--dataset", str(directory / "data" / "arrow")),
        *("--plugin", plugin, "--mixed_precision", "fp32" if plugin == "ddp" else "bf16"),
        *("--max_length", "512", "--accumulation_steps", "1", "--save_interval", "0"),
        *("--skip_save_each_epoch", "--save_dir", str(directory / "saves")),
        *("--tensorboard_dir", str(directory / "logs"), "--config_file", str(directory / "config.json")),
    ]
    command = [sys.executable]
    if num_processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    output = directory / "parts.json"
    output.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        OUTPUT_VARIABLE: str(output),
        STARTED_VARIABLE: str(time.monotonic()),
    }
    command += [str(Path(__file__).resolve()), "--run_train", *flags]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode or not output.is_file():
        raise RuntimeError(f"train.py did not reach its first step:\n{result.stderr}")
    return json.loads(output.read_text(encoding="utf-8"))


def main() -> None:
    from figures import installed_versions, report, report_median

    from colossal_llama.utils.console import format_table, log

    args: Namespace = build_parser().parse_args()
    versions = installed_versions("torch", "colossalai", "transformers")
    log(", ".join(f"{name} {version}" for name, version in versions.items()))
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        prepare_inputs(directory)
        layouts = [(plugin, count) for count in args.processes for plugin in args.plugins]
        columns = {}
        for plugin, count in layouts:
            start_training(directory, plugin, count)  # warms the disk cache
            starts = [start_training(directory, plugin, count) for _ in range(args.repeats)]
            title = f"{plugin} × {count}"
            columns[title] = {part: statistics.median(start[part] for start in starts) for part in PARTS}
            totals = [sum(start.values()) for start in starts]
            report_median(f"start-up of train.py, {title}: command to first step", totals, "s")
            report(f"start-up of train.py, {title}: imports", columns[title][IMPORTS], "s")
        table = [(part, *(column[part] for column in columns.values())) for part in PARTS]
        log(format_table(("seconds, median of each part", *columns), table))
        if args.only_training:
            return
        for what, script, arguments in other_scripts(directory):
            seconds = [run(script, *arguments) for _ in range(args.repeats)]
            report_median(f"{what}: whole process", seconds, "s")


def other_scripts(directory: Path) -> list[tuple[str, str, list[str]]]:
    """(name, script, arguments) of what else starts."""
    model, tokenizer = str(directory / "model"), "colossal_llama/tokenizer/init_tokenizer.py"
    pieces = directory / "pieces.jsonl"
    pieces.write_text('{"piece": "人工"}\n{"piece": "智能"}\n', encoding="utf-8")
    scripts = ["train.py", "prepare_pretrain_dataset.py", "inference_example.py", tokenizer]
    helps = [(f"{Path(script).name} --help", script, ["--help"]) for script in scripts]
    question = ["--model_path", model, "--do_sample", "False", "--max_new_tokens", "1", "--input_txt", "a"]
    extension = ["--source_tokenizer_dir", model, "--expand_tokens_file", str(pieces)]
    return [
        *helps,
        (
            "init_tokenizer.py, two pieces",
            tokenizer,
            [*extension, "--target_tokenizer_dir", str(directory / "extended")],
        ),
        (
            "prepare_pretrain_dataset.py, bundled sample",
            "prepare_pretrain_dataset.py",
            preparation_flags(directory, "pretrain", "again"),
        ),
        (
            "prepare_sft_dataset.py, bundled sample",
            "prepare_sft_dataset.py",
            [*preparation_flags(directory, "sft", "sft"), "--llama_version", "2"],
        ),
        ("inference_example.py, one token", "inference_example.py", question),
    ]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run_train"]:
        run_train(sys.argv[2:])
    else:
        from colossal_llama.utils.errors import run_command

        run_command(main)

"""From the command line of `train.py` to `RunSettings`: the one place of training that sees argparse."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from colossal_llama.training.plugins import find_plugin
from colossal_llama.training.settings import TITLES, OutputSettings, RunSettings
from colossal_llama.utils.arguments import ArgumentParser
from colossal_llama.utils.output_checks import why_not_replaceable
from colossal_llama.utils.settings import add_settings, read_settings


def build_parser() -> ArgumentParser:
    """The parser of `train.py`."""
    parser = ArgumentParser(
        prog="train.py",
        description="Continual pre-training or supervised fine-tuning of LLaMA with ColossalAI's plugins. "
        "Start it with `colossalai run`, `torchrun`, or plain `python` for one process.",
    )
    for settings, title in TITLES.values():
        add_settings(parser, settings, title)
    parser.add_check(lambda parsed: find_conflicts(_read(parsed)))
    return parser


def parse_settings(arguments: Sequence[str] | None = None) -> RunSettings:
    """What the command line asks for; exits with code 2 and every problem at once where it is wrong."""
    return _read(build_parser().parse_args(arguments))


def _read(parsed: argparse.Namespace) -> RunSettings:
    return RunSettings(**{name: read_settings(settings, parsed) for name, (settings, _) in TITLES.items()})


def find_conflicts(settings: RunSettings) -> list[str]:
    """Contradictions between arguments, each with its remedy; all of them at once."""
    data, output = settings.data, settings.output
    problems = []
    if not output.benchmark and not data.dataset:
        problems.append("--dataset: required, but not given (only --benchmark makes its own rows)")
    if output.benchmark and output.load_checkpoint:
        problems.append(
            f"--load_checkpoint {output.load_checkpoint}: --benchmark trains on random rows and continues "
            "no run; leave it out"
        )
    problems.extend(find_plugin(settings.layout.plugin)(settings, world_size=1).conflicts())
    models = {"pretrained": data.pretrained, "load_checkpoint": output.load_checkpoint}
    problems.extend(settings.adaptation.conflicts(models))
    if data.eval_interval and not data.eval_dataset:
        problems.append(f"--eval_interval {data.eval_interval}: needs --eval_dataset")
    if data.eval_at_start and not data.eval_dataset:
        problems.append("--eval_at_start: needs --eval_dataset")
    if not output.benchmark:
        problems.extend(_find_unwritable(output))
    return problems


def _find_unwritable(output: OutputSettings) -> list[str]:
    """Outputs that could not be written, found before a model is loaded for them."""
    problems = []
    for flag in ("save_dir", "tensorboard_dir", "config_file"):
        path = getattr(output, flag)
        is_file = flag == "config_file"
        if is_file and path.is_dir():
            problems.append(f"--{flag} {path}: is a directory; give the name of a file")
        if is_file and (reason := why_not_replaceable(path, _is_configuration)):
            problems.append(f"--{flag} {path}: {reason}")
        start = path.parent if is_file else path
        nearest = next(place for place in (start, *start.parents) if place.exists())
        if not nearest.is_dir():
            problems.append(f"--{flag} {path}: {nearest} is no directory; give another path")
    return problems


def _is_configuration(content: Any) -> bool:
    """Whether a run of this suite, or of the original, whose file has the bare arguments, wrote this."""
    return isinstance(content, dict) and "pretrained" in content.get("arguments", content)

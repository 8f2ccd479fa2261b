"""From the command line of `inference_example.py` to `InferenceSettings`; nothing else sees argparse."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from colossal_llama.inference.settings import TITLES, InferenceSettings
from colossal_llama.utils.arguments import ArgumentParser
from colossal_llama.utils.settings import add_settings, read_settings

MIN_TEMPERATURE = 1e-6  # divided by much less, logits overflow


def build_parser() -> ArgumentParser:
    """The parser of `inference_example.py`."""
    parser = ArgumentParser(
        prog="inference_example.py",
        description="Answers prompts with a LLaMA model, or holds a conversation. Answers go to standard "
        "output as they are generated, everything else to standard error.",
    )
    for settings, title in TITLES.values():
        add_settings(parser, settings, title)
    parser.add_check(lambda parsed: find_conflicts(_read(parsed)))
    return parser


def parse_settings(arguments: Sequence[str] | None = None) -> InferenceSettings:
    """What the command line asks for; exits with code 2 and every problem at once where it is wrong."""
    return _read(build_parser().parse_args(arguments))


def _read(parsed: argparse.Namespace) -> InferenceSettings:
    parts = {name: read_settings(settings, parsed) for name, (settings, _) in TITLES.items()}
    return InferenceSettings(**parts)


def find_conflicts(settings: InferenceSettings) -> list[str]:
    """Contradictions between arguments, each with its remedy; all of them at once."""
    prompts, answer = settings.prompts, settings.answer
    version, template = f"--llama_version {prompts.llama_version}", f"--template {prompts.template}"
    problems = []
    given = _given(
        ("--input_txt", prompts.input_txt is not None),
        ("--input_file", prompts.input_file is not None),
        ("--chat", prompts.chat),
    )
    if not given:
        problems.append("nothing to answer: give --input_txt, --input_file or --chat")
    elif len(given) > 1:
        problems.append(f"{' and '.join(given)} do not go together; give one of them")
    if prompts.input_format != "auto" and prompts.input_file is None:
        problems.append(f"--input_format {prompts.input_format}: has no effect without --input_file")
    if prompts.prompt_style == "pretrained":
        problems += [
            f"{flag}: --prompt_style pretrained knows no turns; use --prompt_style sft"
            for flag in _given(
                ("--chat", prompts.chat),
                ("--chat_template", prompts.chat_template),
                (version, prompts.llama_version is not None),
                (template, prompts.template is not None),
            )
        ]
    if prompts.chat_template:
        problems += [
            f"{flag}: has no effect with --chat_template; leave it out"
            for flag in _given(
                (version, prompts.llama_version is not None), (template, prompts.template is not None)
            )
        ]
    if prompts.template not in (None, "colossal") and prompts.llama_version is not None:
        problems.append(f"{version}: has no effect with {template}; leave it out")
    if answer.do_sample and answer.temperature < MIN_TEMPERATURE:
        problems.append(
            f"--temperature {answer.temperature:g}: sampling needs {MIN_TEMPERATURE:g} or more; "
            "use --do_sample False"
        )
    return problems


def _given(*flags: tuple[str, bool]) -> list[str]:
    return [flag for flag, is_given in flags if is_given]

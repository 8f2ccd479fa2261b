"""Checks hosts before training is launched on them: all problems at once, in seconds, before GPUs wait.

    python colossal_llama/launch/preflight.py --hostfile hostfile --nproc_per_node 8 train.py --pretrained …

takes the options of `colossalai run`. `probe.py` runs on all hosts at the same time, over ssh.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from colossal_llama.launch.diagnosis import find_problems, find_warnings, format_answers
from colossal_llama.launch.hostfile import read_hostfile
from colossal_llama.launch.settings import HostSettings
from colossal_llama.launch.ssh_probe import Directories, SshProbe, token_file
from colossal_llama.training.settings import OutputSettings
from colossal_llama.utils.arguments import ArgumentParser
from colossal_llama.utils.console import warn
from colossal_llama.utils.errors import UserError, run_command
from colossal_llama.utils.settings import add_settings, read_settings

INPUT_FLAGS = ("--pretrained", "--dataset", "--eval_dataset", "--load_checkpoint")


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="preflight.py", description=__doc__.split("\n")[0])
    add_settings(parser, HostSettings, "hosts")
    parser.add_argument(
        "training",
        nargs=argparse.REMAINDER,
        metavar="train.py ARGUMENT …",
        help="the training command, for the directories that it reads and writes",
    )
    return parser


def directories_of(training: list[str]) -> Directories:
    """Reads `train.py …` for its directories alone; what else is wrong with it `train.py --dry_run` says."""
    if not training:
        return Directories()
    words = training[1:] if training[0].endswith(".py") else training
    # Unlike the full parser's, these values may be missing here: a login node has no data.
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in INPUT_FLAGS:
        reader.add_argument(flag, nargs="*", default=[])
    reader.add_argument("--save_dir", default=str(OutputSettings.save_dir))
    values = vars(reader.parse_known_args(words)[0])
    inputs = [(flag, path) for flag in INPUT_FLAGS for path in values[flag.removeprefix("--")]]
    return Directories([pair for pair in inputs if _is_local(*pair)], values["save_dir"])


def _is_local(flag: str, path: str) -> bool:
    """Not `latest`, and not a model's name on the hub."""
    if flag == "--load_checkpoint":
        return path != "latest"
    return flag != "--pretrained" or path.startswith(("/", ".", "~")) or Path(path).exists()


def main() -> int:
    parsed = build_parser().parse_args()
    settings, directories = read_settings(HostSettings, parsed), directories_of(parsed.training)
    hosts, problems = (["localhost"], []) if settings.hostfile is None else read_hostfile(settings.hostfile)
    with token_file(directories.save_dir, is_needed=len(hosts) > 1) as token:
        answers = SshProbe(settings, hosts, directories).probe_all(token)
    print(format_answers(answers, directories), flush=True)
    for warning in find_warnings(answers):
        warn(warning)
    problems += find_problems(answers, settings, directories)
    if problems:
        raise UserError(problems)
    return 0


if __name__ == "__main__":
    run_command(main)

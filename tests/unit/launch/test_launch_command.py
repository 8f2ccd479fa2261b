"""The command of a launch script: empty options are chosen, words survive the shells of the hosts."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colossal_llama.launch.launch_command import LaunchCommand, choose_processes, read_launch_command
from colossal_llama.utils.errors import UserError

NO_ENVIRONMENT: dict[str, str] = {}


@pytest.fixture(autouse=True)
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """PATH is this directory alone, so there is no nvidia-smi unless a test has one."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def with_gpus(commands: Path, output: str, code: int = 0) -> None:
    """An nvidia-smi that lists `index, used` as GPUs."""
    script = commands / "nvidia-smi"
    script.write_text(f"#!/bin/bash\nprintf %s {shlex.quote(output)}\nexit {code}\n")
    script.chmod(0o755)


def read(*words: str, environ: dict[str, str] = NO_ENVIRONMENT) -> LaunchCommand:
    return read_launch_command(["colossalai", "run", *words], environ)[0]


def test_empty_options_are_chosen() -> None:
    alone = read(
        "--nproc_per_node", "", "--hostfile", "", "--master_port", "", "--ssh-port", "", "train.py", "--x"
    )
    assert (alone.num_processes, alone.hostfile, alone.ssh_port) == (2, None, None)
    assert int(alone.master_port) > 1023
    assert alone.training == ("train.py", "--x")
    assert read("--hostfile", "hosts", "train.py").master_port == "29500"


def test_options_as_they_are_written() -> None:
    words = ("--nproc_per_node", "8", "--master_port", "1234", "--hostfile", "my hosts")
    command = read(*words, "--ssh-port", "22", "train.py", "--lr", "1", "--save_dir", "a b")
    arguments = ("--ssh-port", "22", "train.py", "--lr", "1", "--save_dir", "'a b'")
    assert command.launcher_words(["host-a", "host-b"]) == [
        *("colossalai", "run", *words[:4], "--host", "host-a,host-b", *arguments),
    ]
    assert command.launcher_words(None) == ["colossalai", "run", *words[:4], *arguments]
    assert command.preflight_words() == [
        *(*words, "--ssh_port", "22", "train.py", "--lr", "1", "--save_dir", "a b"),
    ]


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"))))
def test_a_shell_reads_the_arguments_back(arguments: list[str]) -> None:
    command = LaunchCommand(1, "29500", None, None, ("train.py", *arguments))
    words = command.launcher_words(None)
    assert shlex.split(" ".join(words[words.index("train.py") + 1 :])) == arguments


@pytest.mark.parametrize(
    ("words", "save_dir"),
    [
        ((), "checkpoint_dir"),
        (("--save_dir", "a b"), "a b"),
        (("--save_dir=a", "--lr", "1"), "a"),
        (("--save_dir", "a", "--save_dir=b"), "b"),
        (("--save_directory", "a"), "checkpoint_dir"),
    ],
)
def test_save_dir(words: tuple[str, ...], save_dir: str) -> None:
    assert read("train.py", *words).save_dir() == save_dir


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["torchrun", "train.py"], "torchrun train.py: expected `colossalai run"),
        (["colossalai", "run"], "expected train.py and its arguments after the options"),
        (["colossalai", "run", "--hostfile", "h", "other.py"], "expected train.py and its arguments"),
        (["colossalai", "run", "--nproc_per_node", "0", "train.py"], "NPROC_PER_NODE 0: is not a number of"),
        (["colossalai", "run", "--nproc_per_node", "two", "train.py"], "NPROC_PER_NODE two: is not a number"),
    ],
)
def test_commands_that_cannot_be_run(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_launch_command(words, NO_ENVIRONMENT)


def test_unknown_options_are_reported(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_:
        read("--include", "host-a", "train.py")
    assert exit_.value.code == 2
    assert "unknown arguments: --include" in capsys.readouterr().err


def test_processes_on_a_cpu(capfd: pytest.CaptureFixture) -> None:
    assert choose_processes("", False, NO_ENVIRONMENT) == (2, {"OMP_NUM_THREADS": "1"})
    assert choose_processes("3", True, {"OMP_NUM_THREADS": "8"}) == (3, {"OMP_NUM_THREADS": "8"})
    assert capfd.readouterr().out == (
        "No GPU: 2 processes on the CPU of each host\nNo GPU: 3 processes on the CPU of each host\n"
    )


def test_the_least_used_gpus_are_chosen(commands: Path, capfd: pytest.CaptureFixture) -> None:
    with_gpus(commands, "0, 900\n1, 4\n2, [N/A]\n10, 4\n")
    assert choose_processes("", False, NO_ENVIRONMENT) == (4, {"CUDA_VISIBLE_DEVICES": "2,1,10,0"})
    assert choose_processes("2", False, NO_ENVIRONMENT) == (2, {"CUDA_VISIBLE_DEVICES": "2,1"})
    assert capfd.readouterr().out.splitlines()[1] == "GPUs: 2,1 (the least used)"
    assert choose_processes("2", True, NO_ENVIRONMENT) == (2, {}), "other hosts have loads of their own"
    with pytest.raises(UserError, match="NPROC_PER_NODE 5: there are 4 GPUs here"):
        choose_processes("5", False, NO_ENVIRONMENT)
    assert choose_processes("5", True, NO_ENVIRONMENT) == (5, {})


def test_gpus_that_are_visible(commands: Path) -> None:
    with_gpus(commands, "0, 0\n1, 0\n2, 0\n")
    assert choose_processes("", False, {"CUDA_VISIBLE_DEVICES": "2,0"}) == (2, {})
    with pytest.raises(UserError, match="NPROC_PER_NODE 3: there are 2 GPUs here"):
        choose_processes("3", False, {"CUDA_VISIBLE_DEVICES": "2,0"})


def test_a_driver_that_fails_has_no_gpus(commands: Path) -> None:
    with_gpus(commands, "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", 9)
    assert choose_processes("", False, NO_ENVIRONMENT)[0] == 2

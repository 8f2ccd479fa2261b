"""The allow-list of what every host gets from the launching shell."""

from __future__ import annotations

import pytest

from colossal_llama.launch.environment import environment_to_pass_on
from colossal_llama.utils.errors import UserError


def test_only_what_belongs_to_the_run_is_passed_on() -> None:
    wanted = {
        "PATH": "/bin",
        "PYTHONPATH": "/a dir",
        "LD_LIBRARY_PATH": "/lib",
        "NCCL_DEBUG": "INFO",
        "GLOO_SOCKET_IFNAME": "eth0",
        "CUDA_VISIBLE_DEVICES": "0,1",
        "OMP_NUM_THREADS": "8",
        "HF_HOME": "/hub",
        "COLOSSAL_LLAMA_HOST_TIMEOUT": "60",
    }
    others = {"HOME": "/root", "HOSTNAME": "head", "SECRET_TOKEN": "x", "XPATH": "y", "TMPDIR": "/tmp/me"}
    assert environment_to_pass_on({**wanted, **others}) == wanted


@pytest.mark.parametrize("value", ['a"b', "a$b", "a`b`", "a\\b", "a\nb"])
def test_values_that_a_shell_would_change_are_refused_all_at_once(value: str) -> None:
    with pytest.raises(UserError) as caught:
        environment_to_pass_on({"NCCL_X": value, "HF_Y": value, "OTHER": value})
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["NCCL_X", "HF_Y"]

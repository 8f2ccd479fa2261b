"""The process itself: GPUs for all, what makes runs repeat themselves, how long groups wait."""

from __future__ import annotations

import pytest

from colossal_llama.training.process import check_gpus, make_deterministic
from colossal_llama.utils.errors import UserError


@pytest.mark.parametrize(
    ("num_gpus", "environ"),
    [
        (0, {"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}),  # on the CPU
        (4, {"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}),
        (8, {"LOCAL_RANK": "0"}),
    ],
)
def test_processes_that_have_their_gpu(num_gpus, environ):
    check_gpus(num_gpus, environ)


@pytest.mark.parametrize("local_rank", [0, 1, 3])
def test_more_processes_than_gpus(local_rank):
    """Every process of the host ends; one says why."""
    environ = {"LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": "4", "CUDA_VISIBLE_DEVICES": "0,1"}
    with pytest.raises(UserError) as error:
        check_gpus(2, environ)
    (problem,) = error.value.problems
    assert problem.startswith("--nproc_per_node 4: ")
    assert "shows 2 GPUs (CUDA_VISIBLE_DEVICES=0,1)" in problem
    assert "start --nproc_per_node 2" in problem
    assert error.value.this_rank_only == (local_rank == 0)


def test_launchers_that_do_not_say_how_many_there_are():
    with pytest.raises(UserError, match=r"--nproc_per_node 3: .* shows 1 GPU, and"):
        check_gpus(1, {"LOCAL_RANK": "2"})


def test_deterministic_reaches_cublas_and_nccl():
    environ = {"NCCL_NVLS_ENABLE": "1"}
    make_deterministic(environ)
    assert environ == {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "NCCL_NVLS_ENABLE": "1",
        "NCCL_COLLNET_ENABLE": "0",
    }

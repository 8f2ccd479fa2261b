from __future__ import annotations

import os
import pickle
import random

import numpy as np
import pytest
import torch

from colossal_llama.training.checkpoint.random_state import random_state, restore_random_state
from colossal_llama.utils.errors import UserError


def draw() -> tuple:
    return random.random(), random.gauss(0, 1), np.random.normal(size=3).tolist(), torch.rand(3).tolist()


def test_generators_go_on_where_they_were(tmp_path):
    random.gauss(0, 1), np.random.normal()  # each keeps the second of a pair of normal numbers
    path = tmp_path / "rank-00000.pt"
    path.write_bytes(random_state())
    expected = [draw(), draw()]
    restore_random_state(path)
    assert [draw(), draw()] == expected


class Malicious:
    def __init__(self, target) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_nothing_in_a_stranger_s_file_is_executed(tmp_path, save):
    path = tmp_path / "rank-00000.pt"
    save({"python": Malicious(tmp_path / "executed")}, path)
    with pytest.raises(UserError, match="modeling directory"):
        restore_random_state(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"text", None])
def test_files_of_another_kind_are_refused(tmp_path, content):
    path = tmp_path / "rank-00000.pt"
    if content is None:
        torch.save({"numpy": 3}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match="rank-00000"):
        restore_random_state(path)

"""The Gemini plugins and flash attention against the plain loop; they need CUDA."""

from __future__ import annotations

import pytest
import torch
from parity import BF16, check_parity, rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="Gemini runs on CUDA only, none here")


@pytest.mark.parametrize("plugin", ["gemini", "gemini_auto"])
@pytest.mark.parametrize("batch", [rows(8, 1), rows(2, 4)])
def test_gemini_stays_close_to_the_plain_loop(plugin, batch, tmp_path, training_inputs, reference):
    print(check_parity(tmp_path, training_inputs, reference, 1, ["--plugin", plugin, *batch], BF16))


def test_bf16_on_cuda_stays_close_to_the_plain_loop(tmp_path, training_inputs, reference):
    print(check_parity(tmp_path, training_inputs, reference, 1, ["--plugin", "ddp", *rows(8, 1)], BF16))

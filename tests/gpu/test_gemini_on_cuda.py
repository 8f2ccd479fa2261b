"""The Gemini plugins and flash attention against the plain loop; they need CUDA."""

from __future__ import annotations

import pytest
import torch
from parity import BF16, check_parity, rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.mark.parametrize("plugin", ["gemini", "gemini_auto"])
@pytest.mark.parametrize("batch", [rows(8, 1), rows(2, 4)])
def test_gemini_stays_close_to_the_plain_loop(plugin, batch, tmp_path, training_inputs, reference):
    print(check_parity(tmp_path, training_inputs, reference, 1, ["--plugin", plugin, *batch], BF16))


def test_bf16_on_cuda_stays_close_to_the_plain_loop(tmp_path, training_inputs, reference):
    print(check_parity(tmp_path, training_inputs, reference, 1, ["--plugin", "ddp", *rows(8, 1)], BF16))


def test_ligers_kernel_gives_the_loss_of_torch():
    from colossal_llama.training.llama import loss

    assert loss.liger_kernel() is not None
    torch.manual_seed(0)
    head = torch.nn.Linear(256, 32_001, bias=False, device="cuda", dtype=torch.bfloat16)
    hidden = torch.randn(2, 700, 256, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(0, 32_001, (2, 700), device="cuda")
    labels[:, ::4] = -100
    results = []
    for device in ("cuda", "none"):
        loss.USE_LIGER_ON = device
        head.weight.grad, x = None, hidden.clone().requires_grad_()
        value = loss.next_token_loss_sum(head, x, labels)
        value.backward()
        results.append((value.detach(), x.grad, head.weight.grad))
    loss.USE_LIGER_ON = "cuda"
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-2, atol=2e-2)

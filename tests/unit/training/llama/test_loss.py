import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from colossal_llama.training.llama import loss as loss_module
from colossal_llama.training.llama.loss import next_token_loss_sum, plain_next_token_loss_sum


def reference(head, hidden, labels):
    return F.cross_entropy(
        head(hidden).flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum"
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 17), st.integers(2, 40), st.integers(1, 200), st.integers(0, 1000))
def test_equals_plain_cross_entropy_for_any_chunk(batch, sequence, vocab, chunk_values, seed):
    torch.manual_seed(seed)
    head = torch.nn.Linear(8, vocab, bias=False)
    hidden = torch.randn(batch, sequence, 8)
    labels = torch.randint(0, vocab, (batch, sequence))
    labels[torch.rand(batch, sequence) < 0.3] = -100
    results = []
    old = loss_module.MAX_CHUNK_VALUES
    loss_module.MAX_CHUNK_VALUES = chunk_values
    try:
        for function in (next_token_loss_sum, reference):
            head.weight.grad = None
            x = hidden.clone().requires_grad_()
            value = function(head, x, labels)
            (value * 0.37).backward()
            results.append((value.detach(), x.grad, head.weight.grad.clone()))
    finally:
        loss_module.MAX_CHUNK_VALUES = old
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_head_reports_an_fp32_loss(dtype):
    torch.manual_seed(0)
    head = torch.nn.Linear(32, 100, bias=False).to(dtype)
    hidden = torch.randn(2, 50, 32).to(dtype).requires_grad_()
    labels = torch.randint(0, 100, (2, 50))
    value = next_token_loss_sum(head, hidden, labels)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, reference(head, hidden, labels), rtol=1e-2, atol=0)
    value.backward()
    assert hidden.grad.dtype == dtype
    assert head.weight.grad.dtype == dtype


@pytest.mark.parametrize("chunk_values", [1 << 26, 60])
def test_rows_have_losses_of_their_own_that_change_nothing(chunk_values, monkeypatch):
    monkeypatch.setattr(loss_module, "MAX_CHUNK_VALUES", chunk_values)
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 20, bias=False)
    hidden, labels = torch.randn(3, 7, 8), torch.randint(0, 20, (3, 7))
    labels[torch.rand(3, 7) < 0.3] = -100
    results = []
    for function in (next_token_loss_sum, plain_next_token_loss_sum):
        for row_losses in (None, []):
            head.weight.grad, x = None, hidden.clone().requires_grad_()
            value = function(head, x, labels, row_losses=row_losses)
            value.backward()
            results.append((value.detach(), x.grad, head.weight.grad))
            if row_losses is not None:
                alone = [reference(head, hidden[i : i + 1], labels[i : i + 1]) for i in range(3)]
                torch.testing.assert_close(row_losses[0], torch.stack(alone).detach())
                assert not row_losses[0].requires_grad
    assert all(torch.equal(with_rows, without) for with_rows, without in zip(*results[:2], strict=True))
    for with_rows, without in zip(*results[2:], strict=True):
        torch.testing.assert_close(with_rows, without)


def test_nothing_is_kept_without_gradients():
    head = torch.nn.Linear(8, 20, bias=False)
    with torch.no_grad():
        value = next_token_loss_sum(head, torch.randn(1, 5, 8), torch.randint(0, 20, (1, 5)))
    assert not value.requires_grad


def test_frozen_head_gets_no_gradient():
    head = torch.nn.Linear(8, 20, bias=False).requires_grad_(False)
    hidden = torch.randn(1, 5, 8, requires_grad=True)
    next_token_loss_sum(head, hidden, torch.randint(0, 20, (1, 5))).backward()
    assert head.weight.grad is None
    assert hidden.grad is not None


LIGER_AGAINST_TORCH = """
import ctypes
import numpy as np
import torch
from triton.runtime import interpreter
from colossal_llama.training.llama import loss

# What Triton 3.1's interpreter reads and writes memory with was compiled for numpy 1; this is for any numpy.
def load(pointers, mask, other, dtype):
    values = np.array(np.broadcast_to(other, pointers.shape), dtype=dtype)
    for i in np.flatnonzero(mask):
        ctypes.memmove(values[i:].ctypes.data, int(pointers.flat[i]), values.itemsize)
    return values

def store(pointers, values, mask):
    values = np.ascontiguousarray(np.broadcast_to(values, pointers.shape))
    for i in np.flatnonzero(mask):
        ctypes.memmove(int(pointers.flat[i]), values[i:].ctypes.data, values.itemsize)

interpreter._interpreter.load, interpreter._interpreter.store = load, store
patch = interpreter._patch_lang_tensor

def patch_for_numpy(tensor):
    patch(tensor)
    tensor.__index__ = lambda self: self.handle.data.item()

interpreter._patch_lang_tensor = patch_for_numpy

torch.manual_seed(0)
loss.MAX_CHUNK_VALUES = 7 * 203
for dtype, rtol in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
    head = torch.nn.Linear(16, 203, bias=False).to(dtype)
    hidden = torch.randn(2, 9, 16).to(dtype)
    labels = torch.randint(0, 203, (2, 9))
    labels[:, ::4] = -100
    results = {}
    for device in ("cuda", "any"):
        loss.USE_LIGER_ON = device
        head.weight.grad, x = None, hidden.clone().requires_grad_()
        value = loss.next_token_loss_sum(head, x, labels)
        (value * 0.37).backward()
        results[device] = (value.detach(), x.grad, head.weight.grad)
    assert results["any"][0].dtype == torch.float32
    for torch_result, liger_result in zip(*results.values()):
        torch.testing.assert_close(liger_result, torch_result, rtol=rtol, atol=rtol * 0.1)
assert loss.liger_kernel() is not None
print("equal")
"""


def test_ligers_kernel_gives_the_same():
    """The kernel itself, in Triton's interpreter, since there need not be a GPU."""
    finished = subprocess.run(
        [sys.executable, "-c", LIGER_AGAINST_TORCH],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.stdout == "equal\n", finished.stderr

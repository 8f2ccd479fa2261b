"""Flash attention over packed documents, with stand-ins for the kernels that make the kernels' own checks."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_ins.flash import flash_attn_stand_in, torch_flash_stand_in
from torch.utils.checkpoint import checkpoint

from colossal_llama.training.llama import flash
from colossal_llama.training.llama.attention import AttentionLayout, attend, make_attention_layout
from colossal_llama.upstream.packed_attention import find_packed_attention, varlen_options

CPU = torch.device("cpu")
STAND_INS = {"flash-attn": flash_attn_stand_in, "torch's own": torch_flash_stand_in}


@pytest.fixture(params=STAND_INS)
def kernel(request, monkeypatch):
    """Each kernel by its stand-in, as training finds it."""
    # Another test's answer, of a machine without them.
    flash.find_flash_kernel.cache_clear()
    with STAND_INS[request.param]() as calls:
        found, _ = flash.find_flash_kernel(4, 2, 16, torch.bfloat16, CPU, False)
        assert found is not None
        found_name = "flash-attn" if found.name.startswith("flash-attn") else "torch's own"
        assert found_name == request.param
        yield found, calls
    flash.find_flash_kernel.cache_clear()


def make_rows(seed: int, lengths: list[int], heads: int, key_heads: int, dtype: torch.dtype) -> list:
    """Query, key and value [2 rows, heads, sequence, head size] that need gradients, and `document_index`."""
    generator = torch.Generator().manual_seed(seed)
    size = sum(lengths)
    tensors = [
        torch.randn(2, count, size, 16, generator=generator).to(dtype).requires_grad_()
        for count in (heads, key_heads, key_heads)
    ]
    index = torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)])
    # The second row is one document.
    return [*tensors, torch.stack([index, torch.zeros_like(index)])]


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    st.sampled_from([torch.float16, torch.bfloat16]),
    st.booleans(),
    st.sampled_from(list(STAND_INS)),
)
def test_packed_documents_equal_the_mask_in_both_directions(lengths, heads, dtype, recompute, name):
    with STAND_INS[name]():
        kernel = flash.FLASH_KERNELS[name](False)
        query, key, value, index = make_rows(len(lengths), lengths, *heads, dtype)
        layout = make_attention_layout(index, kernel)

        def run(query, key, value):
            # As under autocast: the rotary embedding leaves queries and keys in fp32.
            return attend(query.float(), key.float(), value * 1, layout, 0.25)

        output = (
            checkpoint(run, query, key, value, use_reentrant=False) if recompute else run(query, key, value)
        )
        weight = torch.linspace(-1, 1, output.numel()).view_as(output)
        found = [output, *torch.autograd.grad((output.float() * weight).sum(), (query, key, value))]
    plain = [tensor.detach().float().requires_grad_() for tensor in (query, key, value)]
    expected = attend(*plain, make_attention_layout(index, None), 0.25)
    expected = [expected, *torch.autograd.grad((expected * weight).sum(), plain)]
    for ours, wanted in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.float(), wanted, rtol=3e-2, atol=3e-2)


def test_what_the_kernel_is_called_with(kernel):
    found, calls = kernel
    query, key, value, index = make_rows(0, [3, 4], 4, 2, torch.bfloat16)
    before = calls.forwards
    attend(query, key, value, make_attention_layout(index, found), 0.25)
    assert calls.forwards == before + 1
    assert calls.num_documents[-1] == 3
    assert calls.causal == {True}
    assert calls.dtypes == {torch.bfloat16}
    # flash-attn takes fewer key/value heads as they are; torch 2.5 does not train with them.
    assert calls.heads == {(4, 4) if found.repeats_keys else (4, 2)}


def test_the_stand_in_refuses_what_the_kernel_refuses(kernel):
    """Without the cast of queries and keys, `ddp` under autocast ends like this."""
    found, _ = kernel
    query, key, value = (torch.ones(7, 4, 16, dtype=torch.bfloat16) for _ in range(3))
    offsets = torch.tensor([0, 7], dtype=torch.int32)
    with pytest.raises((RuntimeError, ValueError), match=r"dtype|data type"):
        found(query.float(), key.float(), value, offsets, 7, 0.25)
    with pytest.raises(RuntimeError, match="fp16 and bf16"):
        found(query.float(), key.float(), value.float(), offsets, 7, 0.25)


def test_packages_own_refusals():
    with flash_attn_stand_in():
        kernel = flash.flash_attn_package(False)
        tensors = [torch.ones(7, 4, 12, dtype=torch.bfloat16) for _ in range(3)]
        with pytest.raises(RuntimeError, match="multiple of 8"):
            kernel(*tensors, torch.tensor([0, 7], dtype=torch.int32), 7, 0.25)
        tensors = [torch.ones(7, 4, 16, dtype=torch.bfloat16) for _ in range(3)]
        with pytest.raises(RuntimeError, match="int32"):
            kernel(*tensors, torch.tensor([0, 7]), 7, 0.25)
        strided = [tensor.transpose(0, 2).contiguous().transpose(0, 2) for tensor in tensors]
        with pytest.raises(RuntimeError, match="contiguous last dimension"):
            kernel(*strided, torch.tensor([0, 7], dtype=torch.int32), 7, 0.25)


@pytest.mark.parametrize("name", STAND_INS)
def test_deterministic_reaches_the_backward_pass(name):
    torch.use_deterministic_algorithms(True)
    try:
        with STAND_INS[name]() as calls:
            kernel = flash.FLASH_KERNELS[name](True)
            query, key, value, index = make_rows(0, [3, 4], 4, 4, torch.bfloat16)
            attend(query, key, value, make_attention_layout(index, kernel), 0.25).sum().backward()
            assert calls.deterministic == [True]
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_flash_attn_without_a_deterministic_backward_is_passed_over():
    flash.find_flash_kernel.cache_clear()
    with flash_attn_stand_in(knows_deterministic=False), torch_flash_stand_in():
        kernel, problems = flash.find_flash_kernel(4, 4, 16, torch.bfloat16, CPU, True)
        assert kernel.name.startswith("flash attention by torch's")
        assert "no deterministic backward pass" in problems[0]
        kernel, problems = flash.find_flash_kernel(4, 4, 16, torch.bfloat16, CPU, False)
        assert kernel.name.startswith("flash-attn")
        assert problems == ()
    flash.find_flash_kernel.cache_clear()


def test_without_any_kernel_there_are_reasons():
    flash.find_flash_kernel.cache_clear()
    kernel, problems = flash.find_flash_kernel(4, 4, 16, torch.bfloat16, CPU, False)
    assert kernel is None
    assert [problem.partition(":")[0] for problem in problems] == ["flash-attn", "torch's own"]


def test_a_kernel_with_wrong_values_is_not_used(monkeypatch):
    """A wheel for another GPU may compute, and compute nonsense."""
    flash.find_flash_kernel.cache_clear()

    def forgets_documents(deterministic: bool) -> flash.FlashKernel:
        def run(query, key, value, offsets, max_length, scale):
            return flash._plain_attention(*(t.float() for t in (query, key, value)), scale).to(query.dtype)

        return flash.FlashKernel("wrong", False, run)

    monkeypatch.setattr(flash, "FLASH_KERNELS", {"wrong": forgets_documents})
    kernel, (problem,) = flash.find_flash_kernel(4, 2, 16, torch.bfloat16, CPU, False)
    assert kernel is None
    assert "differ from plain attention's" in problem
    flash.find_flash_kernel.cache_clear()


def test_looking_for_a_kernel_draws_no_random_numbers():
    flash.find_flash_kernel.cache_clear()
    before = torch.get_rng_state()
    with flash_attn_stand_in():
        flash.find_flash_kernel(4, 2, 16, torch.bfloat16, CPU, False)
    assert torch.equal(before, torch.get_rng_state())
    flash.find_flash_kernel.cache_clear()


@pytest.mark.parametrize(
    ("capability", "head_size", "reason"),
    [
        ((9, 0), 128, None),
        ((8, 0), 64, None),
        ((12, 0), 64, None),
        ((7, 5), 64, "compute capability 7.5, and flash attention needs 8.0"),
        ((9, 0), 100, "head size is 100"),
        ((9, 0), 512, "head size is 512"),
    ],
)
def test_gpus_and_head_sizes_without_flash_attention(capability, head_size, reason):
    found = flash.why_no_flash(capability, head_size)
    assert found is None if reason is None else reason in found


def test_options_of_the_versions_of_varlen_attn():
    """As torch 2.10, 2.11 and 2.13 declare it."""
    first = ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert varlen_options([*first, "is_causal", "return_aux"]) is None  # without a scale
    assert varlen_options([*first, "return_aux", "scale", "window_size"]) == {"window_size": (-1, 0)}
    newest = [*first, "return_aux", "scale", "window_size", "enable_gqa", "seqused_k", "num_splits"]
    assert varlen_options(newest) == {"window_size": (-1, 0), "enable_gqa": True}


def test_the_layout_without_documents_needs_no_kernel():
    assert make_attention_layout(None, None) == AttentionLayout()
    assert list(inspect.signature(find_packed_attention().run).parameters)[3:5] == ["offsets", "max_length"]

"""Flash attention on a GPU against the mask of rows x rows; needs CUDA and compute capability 8.0."""

from __future__ import annotations

import pytest
import torch

from colossal_llama.training.llama import flash
from colossal_llama.training.llama.attention import attend, make_attention_layout

HAS_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= flash.MIN_CAPABILITY
pytestmark = pytest.mark.skipif(not HAS_GPU, reason="flash attention needs a GPU from Ampere on")


def kernel_of(name: str, deterministic: bool) -> flash.FlashKernel:
    try:
        return flash.FLASH_KERNELS[name](deterministic)
    except ImportError as error:
        pytest.skip(f"{name}: {error}")


def make_rows(heads: int, key_heads: int, head_size: int, dtype: torch.dtype) -> tuple[list, torch.Tensor]:
    """Query, key and value [2, heads, 700, head size], and documents of very different lengths."""
    generator = torch.Generator("cuda").manual_seed(0)
    tensors = [
        torch.randn(2, count, 700, head_size, device="cuda", generator=generator).to(dtype).requires_grad_()
        for count in (heads, key_heads, key_heads)
    ]
    lengths = torch.tensor([1, 130, 65, 300, 204])
    index = torch.repeat_interleave(torch.arange(5), lengths).cuda()
    return tensors, torch.stack([index, torch.zeros_like(index)])


def both_directions(tensors: list, layout, scale: float) -> list[torch.Tensor]:
    output = attend(*tensors, layout, scale)
    weight = torch.linspace(-1, 1, output.numel(), device="cuda").view_as(output)
    return [output, *torch.autograd.grad((output.float() * weight).sum(), tensors)]


@pytest.mark.parametrize("name", flash.FLASH_KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "key_heads", "head_size"), [(8, 8, 64), (8, 2, 128), (4, 1, 256), (4, 4, 40)]
)
def test_flash_attention_equals_the_mask(name, dtype, heads, key_heads, head_size):
    kernel, (tensors, index) = kernel_of(name, False), make_rows(heads, key_heads, head_size, dtype)
    found = both_directions(tensors, make_attention_layout(index, kernel), head_size**-0.5)
    plain = [tensor.detach().float().requires_grad_() for tensor in tensors]
    expected = both_directions(plain, make_attention_layout(index, None), head_size**-0.5)
    for ours, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.float(), wanted, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("name", flash.FLASH_KERNELS)
def test_deterministic_gradients_are_the_same_twice(name):
    torch.use_deterministic_algorithms(True)
    try:
        kernel, (tensors, index) = kernel_of(name, True), make_rows(8, 2, 128, torch.bfloat16)
        layout = make_attention_layout(index, kernel)
        first = both_directions(tensors, layout, 0.1)
        for _ in range(5):
            again = both_directions(tensors, layout, 0.1)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_training_would_choose(capsys):
    for deterministic in (False, True):
        kernel, problems = flash.find_flash_kernel(
            8, 2, 128, torch.bfloat16, torch.device("cuda"), deterministic
        )
        with capsys.disabled():
            print(f"deterministic {deterministic}: {kernel and kernel.name} {problems}")
        assert kernel is not None, problems

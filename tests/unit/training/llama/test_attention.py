"""The attention of every layout against transformers' own, document by document."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colossal_llama.training.llama.attention import make_attention_layout
from colossal_llama.training.llama.flash import FlashKernel
from colossal_llama.training.llama.forward import install_forwards

# Makes layouts, and is never called.
KERNEL = FlashKernel("no kernel", False, lambda *_: None)


@pytest.fixture(scope="module")
def models(tiny_model_dir):
    """(transformers' model as it is, the same with our forwards)"""
    from transformers import LlamaForCausalLM

    plain = LlamaForCausalLM.from_pretrained(tiny_model_dir, torch_dtype=torch.float32).eval()
    ours = LlamaForCausalLM.from_pretrained(tiny_model_dir, torch_dtype=torch.float32).eval()
    install_forwards(ours)
    return plain, ours


def packed(lengths: list[int], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`document_index` and `position_ids` of one row, as the collator makes them."""
    index = [i for i, length in enumerate(lengths) for _ in range(length)] + [-1] * padding
    positions = [p for length in [*lengths, padding] for p in range(length)]
    return torch.tensor([index]), torch.tensor([positions])


def hidden(model, ids, index, positions):
    with torch.no_grad():
        return model.model(input_ids=ids, attention_mask=index, position_ids=positions, use_cache=False)[0]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(0, 6), st.integers(0, 10**6))
def test_packed_documents_equal_documents_alone(models, lengths, padding, seed):
    plain, ours = models
    torch.manual_seed(seed)
    index, positions = packed(lengths, padding)
    ids = torch.randint(3, 500, index.shape)
    together = hidden(ours, ids, index, positions)
    start = 0
    for length in lengths:
        with torch.no_grad():
            alone = plain.model(input_ids=ids[:, start : start + length])[0]
        torch.testing.assert_close(together[:, start : start + length], alone, rtol=1e-4, atol=1e-5)
        start += length


@pytest.mark.parametrize("recompute", [False, True])
def test_changing_a_document_leaves_its_neighbours_exactly_as_they_were(models, recompute):
    _, ours = models
    index, positions = packed([5, 7, 4], padding=3)
    ids = torch.randint(3, 500, index.shape, generator=torch.Generator().manual_seed(0))
    if recompute:
        ours.gradient_checkpointing_enable({"use_reentrant": False})
        ours.train()
    try:
        before = hidden(ours, ids, index, positions)
        changed = ids.clone()
        changed[:, 5:12] = (ids[:, 5:12] + 7) % 500
        after = hidden(ours, changed, index, positions)
    finally:
        ours.gradient_checkpointing_disable()
        ours.eval()
    assert torch.equal(before[:, :5], after[:, :5])
    assert torch.equal(before[:, 12:], after[:, 12:])
    assert not torch.allclose(before[:, 5:12], after[:, 5:12])


def test_without_the_mask_neighbours_do_change(models):
    """The test above can fail: with one document for the whole row, later tokens see the change."""
    _, ours = models
    ids = torch.randint(3, 500, (1, 16), generator=torch.Generator().manual_seed(0))
    index, positions = packed([16], padding=0)
    before = hidden(ours, ids, index, positions)
    ids[:, 5] = (ids[:, 5] + 7) % 500
    assert not torch.allclose(before[:, 12:], hidden(ours, ids, index, positions)[:, 12:])


def test_no_token_sees_the_future(models):
    _, ours = models
    ids = torch.randint(3, 500, (1, 16), generator=torch.Generator().manual_seed(0))
    index, positions = packed([16], padding=0)
    before = hidden(ours, ids, index, positions)
    ids[:, 10] = (ids[:, 10] + 7) % 500
    assert torch.equal(before[:, :10], hidden(ours, ids, index, positions)[:, :10])


def test_flash_layout_gives_the_documents_of_the_flattened_batch():
    index = torch.tensor([[0, 0, 1, 1, 1, -1], [0, 1, 1, 1, 1, 1]])
    layout = make_attention_layout(index, KERNEL)
    assert layout.cu_seqlens.tolist() == [0, 2, 5, 6, 7, 12]
    assert layout.cu_seqlens.dtype == torch.int32
    assert layout.max_seqlen == 5


def test_a_leading_document_of_one_token_is_one_document():
    layout = make_attention_layout(torch.tensor([[0, 1, 1, 1]]), KERNEL)
    assert layout.cu_seqlens.tolist() == [0, 1, 4]


def test_one_document_needs_no_mask():
    assert make_attention_layout(torch.zeros(2, 8, dtype=torch.long), None).block_mask is None

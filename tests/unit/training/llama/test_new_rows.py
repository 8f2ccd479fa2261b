"""Only new rows train: their place in split and sliced matrices, the mask, and their decay."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from colossal_llama.training.llama.new_rows import (
    NewRowValues,
    decay_before_steps,
    local_rows,
    local_values,
    mask_gradients,
)

NEW = range(30, 44)
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


def make_model(tied: bool, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(dtype)


def train_backward(model: LlamaForCausalLM) -> None:
    ids = torch.arange(50)[None]
    model(ids, labels=ids).loss.backward()


@given(
    start=st.integers(0, 40),
    length=st.integers(0, 40),
    width=st.integers(1, 3),
    rows=st.integers(1, 20),
    tensor_ranks=st.integers(1, 3),
    cuts=st.lists(st.integers(0, 60), max_size=4),
)
def test_pieces_of_split_matrices_hold_every_new_value_once(start, length, width, rows, tensor_ranks, cuts):
    """By brute force: each value carries the number of its row, the parts padded beyond the vocabulary."""
    new_ids = range(start, start + length)
    whole = torch.arange(rows * tensor_ranks)[:, None].expand(-1, width)
    found = []
    for rank, part in enumerate(whole.chunk(tensor_ranks)):
        assert set(part[local_rows(new_ids, rows, rank)].flatten().tolist()) <= set(new_ids)
        flat = part.flatten()
        bounds = sorted({0, flat.numel(), *(min(cut, flat.numel()) for cut in cuts)})
        for begin, end in pairwise(bounds):
            values = local_values(new_ids, part.shape, rank, begin, end - begin)
            found += flat[begin:end][values].tolist()
    assert found == [row for row in whole.flatten().tolist() if row in new_ids]


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_old_rows_are_zero_and_of_new_ones_as_they_were(tied: bool) -> None:
    whole, masked = make_model(tied), make_model(tied)
    mask_gradients(masked, NEW, tensor_rank=0)
    for model in (whole, masked):
        train_backward(model)
        train_backward(model)  # accumulated
    expected = dict(whole.named_parameters())
    for name, parameter in masked.named_parameters():
        wanted = expected[name].grad.clone()
        if name in EMBEDDINGS:
            wanted[: NEW.start] = 0
            wanted[NEW.stop :] = 0
            assert wanted.any()
        assert torch.equal(parameter.grad, wanted), name


def test_a_matrix_that_is_split_after_the_mask_is_masked_by_its_own_rows() -> None:
    """As the 3d plugin does it: the parameter stays, its data are a part of the rows, in half precision."""
    model = make_model(tied=False)
    mask_gradients(model, NEW, tensor_rank=1)
    weight = model.lm_head.weight
    with torch.no_grad():
        weight.data = torch.nn.functional.pad(weight, (0, 0, 0, 14))[32:].half()
    (weight * torch.full_like(weight, 2)).sum().backward()
    assert weight.grad.dtype == torch.float16
    assert weight.grad[:, 0].tolist() == [2.0 if row in NEW else 0.0 for row in range(32, 64)]


def test_masks_run_before_hooks_that_take_the_gradient_away() -> None:
    """Gemini's hook is of this kind."""
    model, seen = make_model(tied=False), []
    mask_gradients(model, NEW, tensor_rank=0)
    model.lm_head.weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    train_backward(model)
    assert not seen[0][: NEW.start].any()
    assert seen[0][NEW.start : NEW.stop].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_train_as_if_they_were_all_there_is(dtype: torch.dtype) -> None:
    """Against AdamW over nothing but these rows; the others stay, bit for bit, and have no moments."""
    torch.manual_seed(1)
    source = torch.randn(50, 4).to(dtype).float()
    master = torch.nn.Parameter(source.clone())
    alone = torch.nn.Parameter(source[NEW.start : NEW.stop].clone())
    options = {"lr": 0.01, "betas": (0.9, 0.95), "fused": True}
    optimizer = torch.optim.AdamW([{"params": [master], "weight_decay": 0.0}], weight_decay=0.3, **options)
    reference = torch.optim.AdamW([alone], weight_decay=0.3, **options)
    values = local_values(NEW, master.shape, 0, 0, master.numel())
    decay_before_steps(optimizer, [NewRowValues(master, values)], 0.3)
    for step in range(5):
        gradient = torch.randn(len(NEW), 4)
        alone.grad = gradient.clone()
        master.grad = torch.zeros_like(master)
        master.grad[NEW.start : NEW.stop] = gradient
        for each in (optimizer, reference):
            each.param_groups[0]["lr"] = 0.01 / (step + 1)
            each.step()
    torch.testing.assert_close(master[NEW.start : NEW.stop], alone, rtol=1e-6, atol=1e-7)
    old = [row for row in range(50) if row not in NEW]
    assert torch.equal(master[old].view(torch.uint8), source[old].view(torch.uint8))
    assert not any(optimizer.state[master][kind][old].any() for kind in ("exp_avg", "exp_avg_sq"))


def test_steps_that_are_left_out_decay_nothing() -> None:
    """Of a parameter without a gradient, and where torch's scaler calls the step of an overflow."""
    masters = [torch.nn.Parameter(torch.ones(4, 2)) for _ in range(2)]
    optimizer = torch.optim.AdamW(masters, lr=0.1, weight_decay=0.0, fused=True)
    decay_before_steps(optimizer, [NewRowValues(master, slice(4, 8)) for master in masters], 0.5)
    masters[0].grad = torch.zeros(4, 2)
    optimizer.step()
    assert masters[0].detach().flatten().tolist() == pytest.approx([1.0] * 4 + [0.95] * 4)
    assert torch.equal(masters[1].detach(), torch.ones(4, 2))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))  # makes its scale
    before = masters[0].detach().clone()
    masters[0].grad = torch.full((4, 2), float("inf"))
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert torch.equal(masters[0].detach(), before)

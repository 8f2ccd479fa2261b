"""Canaries of transformers, tokenizers, peft and liger, and their cures."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from canaries import StillBroken, canary, expect_right, run_python
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)

from colossal_llama.training.llama.attention import install_attention
from colossal_llama.upstream.byte_order_marks import accept_byte_order_marks
from colossal_llama.upstream.newer_model_config import adopt_earlier_names

TINY = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
NEWER = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "dtype": "bfloat16"}


@canary("transformers 4.51.3: newer_model_config")
def test_a_configuration_of_transformers_5_keeps_its_rotary_base() -> None:
    base = LlamaConfig.from_dict(NEWER).rope_theta
    expect_right("right" if base == 5e5 else f"base {base}", r"base 10000\.0")


def test_earlier_names_keep_the_rotary_base() -> None:
    config = adopt_earlier_names(LlamaConfig.from_dict(NEWER))
    assert (config.rope_theta, config.rope_scaling, config.torch_dtype) == (5e5, None, torch.bfloat16)


READS_A_MARK = """
import sys
from transformers import LlamaConfig
try:
    print("right" if LlamaConfig.from_pretrained(sys.argv[1]).vocab_size == 7 else "another value")
except OSError as error:
    print(str(error).replace("\\n", " "))
"""


@canary("transformers 4.51.3: byte_order_marks")
def test_a_configuration_may_begin_with_a_byte_order_mark(tmp_path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"vocab_size": 7}).encode())
    code = READS_A_MARK.replace("sys.argv[1]", repr(str(tmp_path)))
    expect_right(run_python(code), "not a valid JSON file")


def test_both_configurations_are_read_with_a_byte_order_mark(tmp_path) -> None:
    accept_byte_order_marks()
    for name, content in (("config.json", {"vocab_size": 7}), ("generation_config.json", {"top_k": 7})):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + json.dumps(content).encode())
    assert LlamaConfig.from_pretrained(tmp_path).vocab_size == 7
    assert GenerationConfig.from_pretrained(tmp_path).top_k == 7


@canary("transformers 4.51.3: checkpoints would fail after a day of training")
def test_what_a_generation_configuration_read_can_be_written(tmp_path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.6}))
    config = GenerationConfig.from_pretrained(tmp_path)
    try:
        config.save_pretrained(tmp_path / "written")
    except ValueError as error:
        raise StillBroken from error


@canary("transformers 4.51.3: the row of pad_token_id would get no gradient")
def test_the_row_of_the_padding_token_trains() -> None:
    model = LlamaModel(LlamaConfig(**TINY, pad_token_id=2))
    model(torch.tensor([[1, 2, 3]])).last_hidden_state.sum().backward()
    if not model.embed_tokens.weight.grad[2].any():
        raise StillBroken


@canary("transformers 4.51.3: tokenizer/sentencepiece_extension.py")
def test_a_saved_tokenizer_is_the_same(llama2_tokenizer_dir, tmp_path) -> None:
    AutoTokenizer.from_pretrained(llama2_tokenizer_dir).save_pretrained(tmp_path)
    before, after = (
        json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
        for directory in (llama2_tokenizer_dir, tmp_path)
    )
    if after.get("add_prefix_space", True) is None and "add_prefix_space" not in before:
        raise StillBroken


@canary("transformers 4.51.3: conversation/template.py adds special tokens by their ids")
def test_a_llama3_tokenizer_adds_no_bos_that_was_declined(llama3_tokenizer_dir) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama3_tokenizer_dir, add_bos_token=False)
    if tokenizer("a").input_ids[0] == tokenizer.bos_token_id:
        raise StillBroken


@canary("tokenizers 0.21.4: dataset/encoders/pretraining.py goes by the end of a token")
def test_offsets_do_not_overlap(llama2_tokenizer_dir) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama2_tokenizer_dir, use_fast=True)
    offsets = tokenizer("\n a", add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    if any(before[1] > after[0] for before, after in itertools.pairwise(offsets)):
        raise StillBroken(offsets)


def second_document_changes(model: LlamaForCausalLM) -> bool:
    """Whether tokens of a row's second document depend on the first one."""
    mask = torch.tensor([[0, 0, 0, 1, 1]])
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    kwargs = {"attention_mask": mask} if hasattr(model.model.layers[0].self_attn, "ulysses_group") else {}
    with torch.no_grad():
        one, other = (
            model.model(torch.tensor([[first, 8, 9, 10, 11]]), position_ids=positions, **kwargs)[0][0, 3:]
            for first in (5, 40)
        )
    return not torch.equal(one, other)


@pytest.fixture
def sdpa_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY, initializer_range=0.3, attn_implementation="sdpa"))


@canary("transformers 4.51.3: training/llama/attention.py")
def test_documents_of_a_row_are_apart(sdpa_model) -> None:
    if second_document_changes(sdpa_model):
        raise StillBroken


def test_our_attention_keeps_documents_apart(sdpa_model) -> None:
    install_attention(sdpa_model)
    assert not second_document_changes(sdpa_model)


@canary("peft 0.13.2: training/llama/model.py trains the model's own embeddings")
def test_modules_to_save_keep_embeddings_tied() -> None:
    from peft import LoraConfig, get_peft_model

    model = LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=True))
    embeddings = ["embed_tokens", "lm_head"]
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=embeddings))
    weights = [
        module.weight if isinstance(module, torch.nn.Module) and hasattr(module, "weight") else None
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
    ]
    if weights[0] is not weights[1]:
        raise StillBroken


@canary("liger-kernel 0.5.10: training/llama/loss.py launches its kernel itself")
def test_losses_of_ligers_function_are_fp32(monkeypatch) -> None:
    cross_entropy = pytest.importorskip("liger_kernel.ops.cross_entropy")

    class Kernel:
        def __getitem__(self, grid):
            return lambda **arguments: dtypes.append(arguments["loss_ptr"].dtype)

    dtypes: list[torch.dtype] = []
    monkeypatch.setattr(cross_entropy, "liger_cross_entropy_kernel", Kernel())
    logits = torch.zeros(2, 8, dtype=torch.bfloat16)
    names = ("ignore_index", "lse_square_scale", "label_smoothing", "reduction", "softcap", "return_z_loss")
    values = (-100, 0.0, 0.0, "sum", None, False)
    cross_entropy.cross_entropy_forward(
        logits, torch.tensor([1, 2]), weight=None, **dict(zip(names, values, strict=True))
    )
    outcome = "right" if dtypes == [torch.float32] else str(dtypes)
    expect_right(outcome, "bfloat16")

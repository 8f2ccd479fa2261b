"""Models whose answers depend on all of their context: random weights, large enough to matter."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from colossal_llama.inference.loading import LoadedModel, load_model
from colossal_llama.inference.settings import ModelSettings

WEIGHT_SCALE = 5.0
CONTEXT_LENGTH = 512


def make_model(tokenizer_dir: Path, directory: Path) -> Path:
    """A LLaMA of two layers; its vocabulary and special tokens are the tokenizer's."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= WEIGHT_SCALE
    model.save_pretrained(directory)
    shutil.copytree(tokenizer_dir, directory, dirs_exist_ok=True)
    return directory


@pytest.fixture(scope="session", params=[2, 3])
def llama_dir(
    request: pytest.FixtureRequest,
    llama2_tokenizer_dir: Path,
    llama3_tokenizer_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A model directory of each LLaMA version."""
    source = llama2_tokenizer_dir if request.param == 2 else llama3_tokenizer_dir
    return make_model(source, tmp_path_factory.mktemp(f"llama{request.param}"))


@pytest.fixture(scope="session")
def loaded(llama_dir: Path) -> LoadedModel:
    return load_model(ModelSettings(str(llama_dir), device="cpu", dtype="fp32"))


@pytest.fixture(scope="session")
def reference(llama_dir: Path) -> LlamaForCausalLM:
    """The same model as others load it."""
    return AutoModelForCausalLM.from_pretrained(llama_dir)

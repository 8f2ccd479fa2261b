"""`--compile`: what refuses it, and how many graphs a run makes."""

from __future__ import annotations

import shutil
import sysconfig
from dataclasses import replace

import pytest
import torch
from plugin_cases import make_config, model_problems, parse

from colossal_llama.training.llama.compiling import compile_layers, count_graphs
from colossal_llama.training.llama.flash import FlashKernel
from colossal_llama.training.llama.forward import install_forwards
from colossal_llama.training.plugins import find_plugin


@pytest.mark.parametrize(
    ("flags", "refused"),
    [
        ("--plugin ddp", False),
        ("--plugin zero2", False),
        ("--plugin zero2_cpu", False),
        ("--plugin gemini", True),
        ("--plugin gemini_auto", True),
        ("--plugin 3d", True),
        ("--plugin 3d --tp 2", True),
    ],
)
def test_plugins_that_cannot_compile_refuse_by_name(flags, refused):
    name, settings = flags.split()[1], parse(flags)
    assert find_plugin(name)(settings, 2).conflicts() == []
    settings = replace(settings, layout=replace(settings.layout, compile=True))  # the parser would exit
    expected = f"--compile: {name} not tested with compiled layers; use zero2 or ddp, or leave it out"
    assert find_plugin(name)(settings, 2).conflicts() == ([expected] if refused else [])


@pytest.mark.parametrize(("on_gpu", "variable", "names"), [(False, "CXX", "g++"), (True, "CC", "gcc")])
def test_a_missing_compiler_is_an_error(on_gpu, variable, names, monkeypatch):
    monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    flags = "--plugin zero2 --compile"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    (problem,) = model_problems(flags, 1)
    assert problem.startswith(f"--compile: torch.compile needs a C compiler, and {names}")
    assert f"name one in the variable {variable}" in problem
    assert model_problems("--plugin zero2", 1) == []
    monkeypatch.setenv(variable, "mine -O2")
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if name == "mine" else None)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: "/nowhere")
    (problem,) = model_problems(flags, 1)
    assert "/nowhere has no Python.h" in problem


def test_a_gpu_that_is_too_old_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (6, 1))
    (problem,) = model_problems("--plugin ddp --compile", 1)
    assert problem == "--compile: this GPU has compute capability 6.1, and graphs need 7.0; leave it out"


def batch(rows: int, length: int, documents: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 128, (rows, length))
    index = torch.arange(length) * documents // length
    positions = torch.arange(length).expand(rows, -1)
    return {
        "input_ids": ids,
        "position_ids": positions,
        "attention_mask": index.expand(rows, -1),
        "labels": ids,
    }


def flash_in_eager_mode(query, key, value, offsets, longest, scale):
    """What no graph may hold: it looks at values."""
    assert not torch.compiler.is_compiling()
    outputs = []
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        q, k, v = (
            tensor[start:end].transpose(0, 1)
            for tensor in (query, *(t.repeat_interleave(2, dim=1) for t in (key, value)))
        )
        output = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        outputs.append(output.transpose(0, 1))
    return torch.cat(outputs)


KERNEL = FlashKernel("stand-in", False, flash_in_eager_mode)


# A compiler's minutes.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("lengths_vary", "kernel", "most_graphs"),
    [(False, None, 2), (True, None, 4), (False, KERNEL, 4), (True, KERNEL, 4)],
)
def test_documents_and_lengths_make_no_graphs_without_end(lengths_vary, kernel, most_graphs):
    """Twelve layers share what one needs: with a mask and without, the parts around a kernel."""
    from transformers import LlamaForCausalLM

    torch._dynamo.reset()
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model = LlamaForCausalLM(make_config(num_hidden_layers=12, vocab_size=128))
        install_forwards(model, kernel)
        models.append(model)
    compiled, plain = models
    compile_layers(compiled, lengths_vary, uses_flash=kernel is not None)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    before = count_graphs()
    for documents in (1, 3, 2, 7, 5, 1, 8):
        length = 40 + 3 * documents if lengths_vary else 48
        inputs = batch(2, length, documents)
        losses = [model(**inputs)["loss_sum"] for model in models]
        losses[0].backward()
        assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-5)
    assert 1 <= count_graphs() - before <= most_graphs

"""Merged models against a float64 mean, row by row; what has no mean is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import EMBEDDINGS, change_source, read_weights, run
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from colossal_llama.model import merge_models
from colossal_llama.model.merging import MergedModel, ModelLayout, plan_row_groups
from colossal_llama.utils.errors import UserError

Merge = Callable[..., dict[str, torch.Tensor]]


@pytest.fixture
def merge(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Merge:
    def merge(models: list[Path], **flags: Any) -> dict[str, torch.Tensor]:
        flags = {"output_dir": tmp_path / "merged", **flags}
        run(merge_models, monkeypatch, models=",".join(map(str, models)), **flags)
        return read_weights(Path(flags["output_dir"]))

    return merge


def shake(model: Path, seed: int) -> Path:
    """Changes all weights, as training does."""
    generator = torch.Generator().manual_seed(seed)
    for path in model.glob("*.safetensors"):
        tensors = {
            name: (t.float() + 0.02 * torch.randn(t.shape, generator=generator)).to(t.dtype)
            for name, t in load_file(path).items()
        }
        save_file(tensors, path, metadata={"format": "pt"})
    return model


def check_mean(
    merged: dict[str, torch.Tensor],
    sources: list[dict[str, torch.Tensor]],
    weights: list[float],
    num_tokens: list[int],
) -> None:
    """Every tensor is the float64 mean within its dtype's rounding; `num_tokens` of each source count."""
    most = max(num_tokens)
    for name, tensor in merged.items():
        step = torch.finfo(tensor.dtype).eps
        if name not in EMBEDDINGS:
            exact = sum(w * s[name].double() for w, s in zip(weights, sources, strict=True)) / sum(weights)
            torch.testing.assert_close(tensor.double(), exact, rtol=step, atol=1e-7)
            continue
        for row in range(len(tensor)):
            taking_part = [
                (w, s[name][row].double())
                for w, s, tokens in zip(weights, sources, num_tokens, strict=True)
                if row < len(s[name]) and (row < tokens or row >= most)
            ]
            exact = sum(w * values for w, values in taking_part) / sum(w for w, _ in taking_part)
            torch.testing.assert_close(tensor[row].double(), exact, rtol=step, atol=1e-7)


@pytest.mark.parametrize(
    ("dtype", "tied", "num_shards", "bin", "extra_rows"),
    [
        (torch.float32, False, 1, False, 0),
        (torch.bfloat16, False, 3, False, 7),
        (torch.float16, True, 2, False, 0),
        (torch.float32, False, 2, True, 5),
    ],
)
def test_a_base_and_its_extended_descendants(
    tiny_model_dir: Path,
    tmp_path: Path,
    extend_tokenizer: Callable[..., Path],
    extend_model: Callable[..., dict[str, torch.Tensor]],
    merge: Merge,
    dtype: torch.dtype,
    tied: bool,
    num_shards: int,
    bin: bool,
    extra_rows: int,
) -> None:
    base = change_source(tiny_model_dir, tmp_path / "base", dtype, extra_rows, tied, num_shards, bin)
    tokenizer = extend_tokenizer(base)
    models = [base]
    for number, padding in enumerate((1, 16)):
        extend_model(base, tokenizer, tmp_path / f"m{number}", pad_to_multiple_of=padding)
        models.append(shake(tmp_path / f"m{number}", number))
    weights = [2.0, 1.0, 0.5]
    merged = merge(models, weights="2,1,0.5")
    sources = [read_weights(model) for model in models]
    assert merged.keys() == sources[1].keys()
    assert all(tensor.dtype == dtype for tensor in merged.values())
    assert ("lm_head.weight" in merged) != tied
    old, new = (len(AutoTokenizer.from_pretrained(directory)) for directory in models[:2])
    assert len(merged[EMBEDDINGS[0]]) == len(sources[2][EMBEDDINGS[0]]) > new > old
    check_mean(merged, sources, weights, [old, new, new])

    target = tmp_path / "merged"
    loaded, report = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.config.vocab_size == len(merged[EMBEDDINGS[0]])
    for name in ("tokenizer.json", "tokenizer.model", "vocabulary_extension.json"):
        assert (target / name).read_bytes() == (models[2] / name).read_bytes()
    assert json.loads((target / "model_merge.json").read_text())["models"][0] == {
        "model": str(base),
        "weight": 2 / 3.5,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_models_are_their_mean_bit_for_bit(
    tiny_model_dir: Path, tmp_path: Path, merge: Merge, dtype: torch.dtype
) -> None:
    model = change_source(tiny_model_dir, tmp_path / "model", dtype, num_shards=2)
    copies = [shutil.copytree(model, tmp_path / f"copy{number}") for number in range(2)]
    merged = merge([model, *copies], weights="0.3,0.1,7")
    for name, tensor in read_weights(model).items():
        assert torch.equal(merged[name].view(torch.uint8), tensor.view(torch.uint8))


def test_a_chunk_at_a_time(
    tiny_model_dir: Path, tmp_path: Path, merge: Merge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("colossal_llama.model.merging.CHUNK_BYTES", 1000)
    models = [tiny_model_dir, shake(shutil.copytree(tiny_model_dir, tmp_path / "other"), 1)]
    merged = merge(models)
    tokens = len(AutoTokenizer.from_pretrained(tiny_model_dir))
    check_mean(merged, [read_weights(model) for model in models], [1.0, 1.0], [tokens, tokens])


def test_other_dtypes_need_a_choice(tiny_model_dir: Path, tmp_path: Path, merge: Merge) -> None:
    half = change_source(tiny_model_dir, tmp_path / "half", torch.bfloat16)
    with pytest.raises(UserError, match=r"is F32, in .*half BF16; choose the dtype .* with --dtype"):
        merge([tiny_model_dir, half])
    assert not (tmp_path / "merged").exists()
    merged = merge([tiny_model_dir, half], dtype="fp32")
    tokens = len(AutoTokenizer.from_pretrained(tiny_model_dir))
    check_mean(merged, [read_weights(tiny_model_dir), read_weights(half)], [1.0, 1.0], [tokens, tokens])
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["torch_dtype"] == "float32"


def test_what_has_no_mean(
    tiny_model_dir: Path,
    llama3_tokenizer_dir: Path,
    tmp_path: Path,
    merge: Merge,
) -> None:
    def changed(name: str, **values: Any) -> Path:
        model = shutil.copytree(tiny_model_dir, tmp_path / name)
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, **values}))
        return model

    with pytest.raises(UserError) as caught:
        merge([tiny_model_dir, changed("theta", rope_theta=500000.0, bos_token_id=5)])
    (problem,) = caught.value.problems
    assert "rope_theta is 10000.0" in problem
    assert "500000.0; only models of one configuration have a mean" in problem

    other = changed("vocabulary")
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (other / name).unlink(missing_ok=True)
    for path in llama3_tokenizer_dir.iterdir():
        shutil.copy(path, other)
    with pytest.raises(UserError, match=r"embeddings .* rows; give a model|neither the same vocabulary"):
        merge([tiny_model_dir, other])

    lacking = changed("lacking")
    tensors = load_file(lacking / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 3)
    tensors["model.layers.0.mlp.gate_proj.weight"] = tensors["model.layers.0.mlp.gate_proj.weight"].to(
        torch.int8
    )
    save_file(tensors, lacking / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        merge([lacking, tiny_model_dir])
    text = "\n".join(caught.value.problems)
    assert "lacks the tensor model.norm.weight" in text
    assert "up_proj.weight is [3, 3]" in text
    assert "gate_proj.weight is I8; fp32, fp16 or bf16 is needed" in text
    assert not (tmp_path / "merged").exists()


def test_values_that_are_not_finite(tiny_model_dir: Path, tmp_path: Path, merge: Merge) -> None:
    broken = shutil.copytree(tiny_model_dir, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.norm\.weight: its mean is not finite in F32"):
        merge([tiny_model_dir, broken])
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == []


def test_arguments(
    tiny_model_dir: Path,
    tmp_path: Path,
    merge: Merge,
    capsys: pytest.CaptureFixture,
) -> None:
    adapter, run_dir = tmp_path / "adapter", tmp_path / "epoch-0_step-5"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    shutil.copytree(tiny_model_dir, run_dir / "modeling")
    with pytest.raises(SystemExit):
        merge([adapter, run_dir, tiny_model_dir], weights="1,0", output_dir=tiny_model_dir)
    errors = capsys.readouterr().err
    assert "--weights 1,0: must be above 0" in errors
    with pytest.raises(SystemExit):
        merge([adapter, run_dir, tiny_model_dir], weights="1,2", output_dir=tiny_model_dir)
    errors = capsys.readouterr().err
    assert "--weights: 2 numbers for 3 --models" in errors
    assert f"{adapter}: is an adapter" in errors
    assert f"{run_dir}: no config.json in it; give {run_dir / 'modeling'}" in errors
    assert "is one of the --models, which are never changed" in errors
    with pytest.raises(SystemExit):
        merge([tiny_model_dir])
    assert "one model alone" in capsys.readouterr().err


def test_the_output_of_others_stays(
    tiny_model_dir: Path, tmp_path: Path, merge: Merge, capsys: pytest.CaptureFixture
) -> None:
    models = [tiny_model_dir, shake(shutil.copytree(tiny_model_dir, tmp_path / "other"), 1)]
    target = shutil.copytree(tiny_model_dir, tmp_path / "merged")
    with pytest.raises(SystemExit):
        merge(models)
    assert "holds files that this script did not make (config.json" in capsys.readouterr().err
    first = merge(models, overwrite=True)
    again = merge(models, weights="1,3")  # its own output
    assert not torch.equal(first["model.norm.weight"], again["model.norm.weight"])
    (target / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="holds other weights"):
        merge(models)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 6)), min_size=1, max_size=4))
def test_every_row_has_its_models(sizes: list[tuple[int, int]]) -> None:
    """Tokens and padding rows of each model."""
    models = [
        MergedModel(
            Path(str(n)), 1.0, {}, dict.fromkeys(range(tokens), "x"), ModelLayout({}), tokens + padding
        )
        for n, (tokens, padding) in enumerate(sizes)
    ]
    widest = max(models, key=lambda model: len(model.tokens))
    groups = plan_row_groups(models, widest)
    bounds = [0, *(stop for _, stop, _ in groups)]
    assert [start for start, _, _ in groups] == bounds[:-1]
    for start, stop, numbers in groups:
        for row in range(start, stop):
            has_token = [row < len(model.tokens) for model in models]
            if any(has_token):
                assert numbers == [n for n, has in enumerate(has_token) if has]
            else:
                assert numbers == [n for n, model in enumerate(models) if row < model.rows]
            assert numbers

"""Models from directories, with adapters, and what is said when they can't be loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from colossal_llama.inference.loading import choose_dtype, load_model, resolve_device
from colossal_llama.inference.settings import ModelSettings
from colossal_llama.model.model_config import find_context_length
from colossal_llama.utils.errors import UserError

CPU = torch.device("cpu")
IDS = torch.arange(3, 40)[None]


def load(directory: Path | str, tokenizer: str | None = None, device: str = "cpu"):
    return load_model(ModelSettings(str(directory), tokenizer, device, dtype="fp32"))


@pytest.fixture
def model_dir(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


@pytest.fixture
def adapter_dir(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A LoRA adapter with weights of some size, without a tokenizer."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    adapted = get_peft_model(base, LoraConfig(r=4, lora_alpha=32, task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_adapter_is_merged(adapter_dir: Path, tiny_model_dir: Path) -> None:
    from peft import PeftModel

    loaded = load(adapter_dir)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        plain = base(IDS).logits
        expected = PeftModel.from_pretrained(base, adapter_dir)(IDS).logits
        logits = loaded.model(IDS).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert (logits - plain).abs().max() > 0.1
    assert not any("lora" in name for name, _ in loaded.model.named_parameters())
    assert loaded.tokenizer.bos_token == "<s>"


def with_embeddings(adapter: Path, rows: int) -> dict[str, torch.Tensor]:
    """Puts embeddings into an adapter, as `--lora_embeddings train` does."""
    path, width = adapter / "adapter_model.safetensors", 64
    new = {
        f"base_model.model.{name}.weight": torch.randn(rows, width)
        for name in ("model.embed_tokens", "lm_head")
    }
    save_file({**load_file(path), **new}, path, metadata={"format": "pt"})
    return new


def test_adapter_with_embeddings_is_merged(adapter_dir: Path) -> None:
    new = with_embeddings(adapter_dir, rows=500)
    state = load(adapter_dir).model.state_dict()
    for name, tensor in new.items():
        assert torch.equal(state[name.removeprefix("base_model.model.")], tensor)


def test_embeddings_of_another_vocabulary_are_refused(adapter_dir: Path) -> None:
    with_embeddings(adapter_dir, rows=510)
    with pytest.raises(UserError, match=r"--model_path .*adapter: can't be loaded: .*size mismatch"):
        load(adapter_dir)


def test_adapter_says_what_ends_its_answers(adapter_dir: Path) -> None:
    assert load(adapter_dir).model.generation_config.eos_token_id == 2
    (adapter_dir / "generation_config.json").write_text('{"eos_token_id": [2, 7]}', encoding="utf-8")
    assert load(adapter_dir).model.generation_config.eos_token_id == [2, 7]


def test_adapter_without_its_base_model(adapter_dir: Path) -> None:
    config = adapter_dir / "adapter_config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    values["base_model_name_or_path"] = "/moved/away"
    config.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(
        UserError, match=r"base model /moved/away: no such directory.*base_model_name_or_path"
    ):
        load(adapter_dir)


@pytest.mark.parametrize("change", ["remove", "rename"])
def test_adapter_that_is_not_loaded_completely(adapter_dir: Path, change: str) -> None:
    path = adapter_dir / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensor = tensors.pop(name)
    if change == "rename":
        tensors[name.replace("layers.0", "layers.7")] = tensor
    save_file(tensors, path)
    with pytest.raises(UserError, match="weights are missing from its files"):
        load(adapter_dir)


def test_missing_weights(model_dir: Path) -> None:
    path = model_dir / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"missing from its files: model\.layers\.1\.mlp\.up_proj\.weight$"):
        load(model_dir)


def truncate_weights(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def remove_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def change_shape(directory: Path) -> None:
    path = directory / "config.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"vocab_size": 500', '"vocab_size": 600'))


def break_config(directory: Path) -> None:
    (directory / "config.json").write_text("{not json", encoding="utf-8")


def unknown_kind(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "no_such"}', encoding="utf-8")


def break_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.model").write_bytes(b"nonsense")
    (directory / "tokenizer.json").unlink(missing_ok=True)


def remote_code(directory: Path) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    config["model_type"] = "evil"
    path.write_text(json.dumps(config), encoding="utf-8")
    (directory / "evil.py").write_text("raise SystemExit('executed')", encoding="utf-8")


@pytest.mark.parametrize(
    "spoil",
    [
        truncate_weights,
        remove_weights,
        change_shape,
        break_config,
        unknown_kind,
        break_tokenizer,
        remote_code,
    ],
)
def test_damaged_directories(model_dir: Path, spoil: Callable[[Path], None]) -> None:
    spoil(model_dir)
    with pytest.raises(UserError) as error:
        load(model_dir)
    (problem,) = error.value.problems
    assert problem.startswith(f"--model_path {model_dir}: ")
    assert "\n" not in problem


def test_hub_out_of_reach() -> None:
    with pytest.raises(
        UserError, match="no such directory here, and it can't be had from the Hugging Face hub"
    ):
        load("owner/name")


def test_tokenizer_of_its_own(model_dir: Path, llama3_tokenizer_dir: Path) -> None:
    assert load(model_dir, str(llama3_tokenizer_dir)).tokenizer.eos_token == "<|end_of_text|>"
    for path in model_dir.glob("*token*"):
        path.unlink()
    with pytest.raises(UserError, match="name one with --tokenizer_path"):
        load(model_dir)
    with pytest.raises(UserError, match="--tokenizer_path owner/name: no tokenizer can be loaded"):
        load(model_dir, "owner/name")


def test_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="finds no GPU here; use --device cpu or auto"):
        resolve_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="--device cuda:2: this machine has 2 GPUs, cuda:0 to cuda:1"):
        resolve_device("cuda:2")


@pytest.mark.parametrize(
    ("capability", "stored", "expected"),
    [
        ((9, 0), torch.bfloat16, torch.bfloat16),
        ((9, 0), torch.float16, torch.float16),
        ((9, 0), torch.float32, torch.bfloat16),
        ((9, 0), None, torch.bfloat16),
        ((7, 0), torch.bfloat16, torch.float16),
        ((7, 0), torch.float32, torch.float16),
    ],
)
def test_dtype_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    stored: torch.dtype | None,
    expected: torch.dtype,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert choose_dtype("auto", torch.device("cuda:0"), stored, 10) == expected


def test_dtype_on_the_cpu() -> None:
    available = psutil.virtual_memory().available
    assert choose_dtype("auto", CPU, torch.bfloat16, 1000) == torch.float32
    assert choose_dtype("auto", CPU, torch.bfloat16, available // 3) == torch.bfloat16
    assert choose_dtype("fp16", CPU, None, 1000) == torch.float16


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, 4096),
        ({"rope_type": "linear", "factor": 4.0}, 16384),
        ({"type": "dynamic", "factor": 2.0}, 8192),
        ({"rope_type": "yarn", "factor": 2.0}, 8192),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 2048}, 4096),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 1024,
            },
            4096,
        ),
    ],
)
def test_context_length(scaling: dict | None, expected: int) -> None:
    config = LlamaConfig(max_position_embeddings=4096, rope_scaling=scaling)
    assert find_context_length(config) == expected

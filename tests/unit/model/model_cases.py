"""Models of many shapes, and how a script is called, for the tests of this directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
WORDS = ["人工智能", "人工", "▁the moon", "图书馆", "é", " 人"]
# Each way to make a new row of the rows of its sub-tokens, [sub-tokens, hidden].
FORMULAS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": lambda rows: rows.mean(0),
    "first": lambda rows: rows[0],
    "last": lambda rows: rows[-1],
    "half": lambda rows: (rows[0] + rows.mean(0)) / 2,
    "weighted": lambda rows: sum(2**i * row for i, row in enumerate(rows)) / (2 ** len(rows) - 1),
    "rescaled": lambda rows: rows.mean(0) / rows.mean(0).norm() * rows.norm(dim=1).mean(),
}


def run(module: Any, monkeypatch: pytest.MonkeyPatch, **flags: Any) -> None:
    """Calls a script's `main` with these flags."""
    monkeypatch.setattr("sys.argv", ["script", *(f"--{name}={value}" for name, value in flags.items())])
    module.main()


def read_weights(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
    for path in sorted(directory.glob("*.bin")):
        tensors |= torch.load(path, weights_only=True)
    return tensors


def change_source(
    source: Path,
    target: Path,
    dtype: torch.dtype = torch.float32,
    extra_rows: int = 0,
    tied: bool = False,
    num_shards: int = 1,
    bin: bool = False,
) -> Path:
    """A copy of a model in another dtype, padded, tied, sharded or as `.bin`."""
    shutil.copytree(source, target)
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(target / "model.safetensors").items()}
    (target / "model.safetensors").unlink()
    config = json.loads((target / "config.json").read_text())
    if extra_rows:
        for name in EMBEDDINGS:
            padding = torch.full((extra_rows, tensors[name].shape[1]), 0.25, dtype=dtype)
            tensors[name] = torch.cat([tensors[name], padding])
        config["vocab_size"] += extra_rows
    if tied:
        del tensors["lm_head.weight"]
        config["tie_word_embeddings"] = True
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    shards = [dict.fromkeys(names[i::num_shards]) for i in range(num_shards)]
    stem, suffix = ("pytorch_model", ".bin") if bin else ("model", ".safetensors")
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        content = {name: tensors[name] for name in shard}
        file = f"{stem}{suffix}" if num_shards == 1 else f"{stem}-{number:05d}-of-{num_shards:05d}{suffix}"
        weight_map |= dict.fromkeys(shard, file)
        if bin:
            torch.save(content, target / file)
        else:
            save_file(content, target / file, metadata={"format": "pt"})
    if num_shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (target / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    return target

"""A new stage takes over an optimizer, from any layout to any other, while the vocabulary grows."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from colossal_llama.training.arguments import parse_settings
from colossal_llama.training.checkpoint import kept_optimizer
from colossal_llama.training.checkpoint.files import write_safetensors
from colossal_llama.training.checkpoint.kept_optimizer import KeptOptimizer
from colossal_llama.training.plugins.base import ShardCoordinates
from colossal_llama.utils.errors import UserError

EMBEDDING, NORM, NEW = "model.embed_tokens.weight", "model.norm.weight", "model.layers.0.new.weight"
COLUMNS, STEPS = 3, 40.0


def padded_rows(rows: int, parts: int, padding: int) -> int:
    return -(-rows // (parts * padding)) * padding


def cut(whole: torch.Tensor, parts: int, part: int, rows: int, slices: int, index: int) -> torch.Tensor:
    """Slice `index` of part `part`: rows padded with zeros, split, flattened, padded and split again."""
    whole = torch.cat([whole, torch.zeros(rows * parts - len(whole), *whole.shape[1:])])
    flat = whole.chunk(parts)[part].reshape(-1)
    return torch.cat([flat, torch.zeros(-flat.numel() % slices)]).view(slices, -1)[index].clone()


def write_checkpoint(directory, values, tensor: int, zero: int, padding: int) -> None:
    (directory / "optimizer").mkdir()
    for part in range(tensor):
        for index in range(zero):
            tensors, parts = {}, {}
            for name, kinds in values.items():
                split = tensor if name == EMBEDDING else 1
                rows = padded_rows(len(kinds["master"]), split, padding if name == EMBEDDING else 1)
                shape = [rows, *kinds["master"].shape[1:]]
                parts[name] = {"shape": shape, "dim": 0 if name == EMBEDDING else None}
                for kind, whole in kinds.items():
                    tensors[f"{name}/{kind}"] = cut(whole, split, part if split > 1 else 0, rows, zero, index)
            metadata = {"parts": parts, "steps": dict.fromkeys(values, STEPS), "scaler": {}}
            write_safetensors(
                directory / "optimizer" / f"tp-{part:03d}_pp-000_zero-{index:04d}.safetensors",
                tensors,
                {key: json.dumps(value) for key, value in metadata.items()},
            )


class FakePlugin:
    """One process of a layout: slices of the parameters, and an optimizer that has done nothing."""

    device = torch.device("cpu")
    new_ids: range | None = None

    def __init__(self, loaded, vocab_size: int, tensor: int, part: int, zero: int, index: int, padding: int):
        config = SimpleNamespace(vocab_size=vocab_size, tie_word_embeddings=False)
        self.causal_lm = SimpleNamespace(config=config)
        self.optimizer = SimpleNamespace(optim=SimpleNamespace(state={}))
        self.settings = SimpleNamespace(data=SimpleNamespace(pretrained="extended"))
        self.place = ShardCoordinates(part, 0, index, zero, index, False)
        self.masters = {}
        for name, whole in loaded.items():
            split = tensor if name == EMBEDDING else 1
            rows = padded_rows(len(whole), split, padding if name == EMBEDDING else 1)
            parameter = torch.zeros(rows, *whole.shape[1:])
            parameter.dim_of_split = 0 if name == EMBEDDING else None
            master = cut(whole, split, part if split > 1 else 0, rows, zero, index)
            self.masters[name] = (parameter, master)

    def shard_coordinates(self) -> ShardCoordinates:
        return self.place

    def master_weights(self):
        return self.masters

    def slice_begin(self, parameter: torch.Tensor, master: torch.Tensor) -> int:
        return self.place.zero_rank * master.numel()

    def optimizer_step_count(self, steps: float, parameter: torch.Tensor) -> float:
        return steps

    def moment(self, name: str, kind: str) -> torch.Tensor:
        return self.optimizer.optim.state[self.masters[name][1]][kind]


def restore(checkpoint, known_rows, plugins, monkeypatch_context) -> list[str]:
    """What all processes of a layout log."""
    sums: list[torch.Tensor] = []
    lines: list[str] = []
    with monkeypatch_context as patch:
        patch.setattr(kept_optimizer, "tensor_parallel_dim", lambda parameter: parameter.dim_of_split)
        patch.setattr(kept_optimizer.dist, "all_reduce", sums.append)
        patch.setattr(kept_optimizer, "log", lambda line: None)
        kept = KeptOptimizer(SimpleNamespace(checkpoint=checkpoint), known_rows)
        for plugin in plugins:  # what each counts
            with contextlib.suppress(UserError):
                kept.restore(plugin)
        total = torch.stack(sums).sum(0)
        patch.setattr(kept_optimizer.dist, "all_reduce", lambda counts: counts.copy_(total))
        patch.setattr(kept_optimizer, "log", lines.append)
        kept._report(plugins[0], int(STEPS), 0, 0, 0)
    return lines


@given(
    old_rows=st.integers(1, 9),
    added=st.integers(0, 5),
    old_layout=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)),
    layout=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)),
)
def test_moments_of_known_rows_are_kept_and_others_are_zero(
    old_rows, added, old_layout, layout, tmp_path_factory
):
    """From tensor-parallel parts, ZeRO slices and a padded vocabulary to others of each."""
    checkpoint = tmp_path_factory.mktemp("checkpoint")
    kinds = ("master", "exp_avg", "exp_avg_sq")
    values = {
        EMBEDDING: {kind: torch.randn(old_rows, COLUMNS) for kind in kinds},
        NORM: {kind: torch.randn(COLUMNS) for kind in kinds},
    }
    tensor, zero, padding = old_layout
    write_checkpoint(checkpoint, values, tensor, zero, padding)
    tensor, zero, padding = layout
    loaded = {
        # As a half precision file has them.
        EMBEDDING: torch.cat([values[EMBEDDING]["master"].bfloat16().float(), torch.randn(added, COLUMNS)]),
        NORM: values[NORM]["master"].bfloat16().float(),
        NEW: torch.randn(2, COLUMNS),
    }
    plugins = [
        FakePlugin(loaded, old_rows + added, tensor, part, zero, index, padding)
        for part in range(tensor)
        for index in range(zero)
    ]
    known = old_rows if added else None
    (line,) = restore(checkpoint, known, plugins, pytest.MonkeyPatch.context())
    kept = (old_rows + 1) * COLUMNS
    assert f"moments of {kept:,} of {kept + (added + 2) * COLUMNS:,} trained parameters" in line
    assert f"{(added + 2) * COLUMNS} start at zero" in line
    assert (f"from {old_rows:,} on" in line) == bool(added)
    expected = {
        (EMBEDDING, kind): torch.cat([values[EMBEDDING][kind], torch.zeros(added, COLUMNS)])
        for kind in kinds[1:]
    }
    expected |= {(NORM, kind): values[NORM][kind] for kind in kinds[1:]}
    expected |= {(NEW, kind): torch.zeros(2, COLUMNS) for kind in kinds[1:]}
    masters = {
        EMBEDDING: torch.cat([values[EMBEDDING]["master"], loaded[EMBEDDING][old_rows:]]),
        NORM: values[NORM]["master"],
        NEW: loaded[NEW],
    }
    for plugin in plugins:
        place = plugin.place
        for name in loaded:
            split = tensor if name == EMBEDDING else 1
            rows = len(plugin.masters[name][0])
            where = (split, place.tensor_rank if split > 1 else 0, rows, zero, place.zero_rank)
            for kind in kinds[1:]:
                assert torch.equal(plugin.moment(name, kind), cut(expected[name, kind], *where))
            assert torch.equal(plugin.masters[name][1], cut(masters[name], *where))
            assert plugin.moment(name, "step") == STEPS


def test_weights_that_are_not_those_of_the_checkpoint(tmp_path):
    weights = torch.randn(4, COLUMNS)
    write_checkpoint(
        tmp_path, {EMBEDDING: dict.fromkeys(("master", "exp_avg", "exp_avg_sq"), weights)}, 1, 1, 1
    )
    other = weights.clone()
    other[1, 2] += 0.5
    plugin = FakePlugin({EMBEDDING: torch.cat([other, torch.zeros(1, COLUMNS)])}, 5, 1, 0, 1, 0, 1)
    with pytest.raises(UserError, match="1 weights of --pretrained extended are not those of"):
        restore(tmp_path, 4, [plugin], pytest.MonkeyPatch.context())


def test_nothing_to_keep(tmp_path):
    write_checkpoint(tmp_path, {NORM: {"master": torch.ones(COLUMNS)}}, 1, 1, 1)
    plugin = FakePlugin({NORM: torch.ones(COLUMNS)}, 5, 1, 0, 1, 0, 1)
    with pytest.raises(UserError, match="has no moments of the parameters that train now"):
        restore(tmp_path, None, [plugin], pytest.MonkeyPatch.context())


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("", "add --load_checkpoint"),
        ("--load_checkpoint latest", "leave it out, `latest` continues a run"),
    ],
)
def test_bad_combinations(flags, problem, capsys):
    with pytest.raises(SystemExit):
        parse_settings(["--pretrained", "model", "--dataset", ".", "--keep_optimizer", *flags.split()])
    assert problem in capsys.readouterr().err

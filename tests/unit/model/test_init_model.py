"""Extended models against a row-by-row float64 reference, and byte for byte in everything else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import EMBEDDINGS, FORMULAS, WORDS, change_source, read_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from colossal_llama.model import init_model
from colossal_llama.model.embedding_extension import RowPlan, mean_of_all_rows, plan_rows
from colossal_llama.model.initializations import INITIALIZATIONS, mean
from colossal_llama.model.model_extension import all_finite
from colossal_llama.utils.errors import UserError


def subtokens(source: Path, tokenizer: Path) -> dict[int, list[int]]:
    """New id -> source ids of its text, as transformers finds them after a character that joins nothing."""
    from transformers import AutoTokenizer

    old, new = (AutoTokenizer.from_pretrained(d, use_fast=False) for d in (source, tokenizer))
    barrier = len(old("\n", add_special_tokens=False).input_ids)
    return {
        token_id: old("\n" + token.replace("▁", " "), add_special_tokens=False).input_ids[barrier:]
        for token, token_id in new.get_vocab().items()
        if token_id >= len(old)
    }


def check_rows(
    source: dict[str, torch.Tensor],
    target: dict[str, torch.Tensor],
    means: dict[int, list[int]],
    num_old: int,
) -> None:
    assert source.keys() == target.keys()
    for name in source:
        if name not in EMBEDDINGS:
            assert target[name].dtype == source[name].dtype
            assert torch.equal(target[name].view(torch.uint8), source[name].view(torch.uint8))
            continue
        assert torch.equal(target[name][:num_old], source[name][:num_old])
        for row, ids in means.items():
            exact = sum(source[name][i].double() for i in ids) / len(ids)
            step = torch.finfo(target[name].dtype).eps
            torch.testing.assert_close(target[name][row].double(), exact, rtol=step, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"num_shards": 3},
        {"bin": True},
        {"bin": True, "num_shards": 2},
        {"tied": True},
        {"extra_rows": 12},
        {"extra_rows": 100},
    ],
    ids=str,
)
def test_every_form_of_source(
    tiny_model_dir: Path,
    tmp_path: Path,
    extend_tokenizer: Callable,
    extend_model: Callable,
    dtype: torch.dtype,
    shape: dict[str, Any],
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = change_source(tiny_model_dir, tmp_path / "source", dtype, **shape)
    tokenizer = extend_tokenizer(source)
    target = extend_model(source, tokenizer, tmp_path / "target")
    means = subtokens(source, tokenizer)
    assert len(means) > len(WORDS)
    check_rows(read_weights(source), target, means, 500)
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "target", torch_dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert model.dtype == dtype
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "target"))
    assert model.get_input_embeddings().weight.shape[0] == 500 + len(means)
    assert not list((tmp_path / "target").glob("*.tmp"))
    with safe_open(next((tmp_path / "target").glob("*.safetensors")), "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    "shape", [{}, {"tied": True}, {"tied": True, "num_shards": 3}, {"bin": True, "extra_rows": 12}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_input_and_output_rows_apart(
    tiny_model_dir: Path,
    tmp_path: Path,
    extend_tokenizer: Callable,
    extend_model: Callable,
    shape: dict[str, Any],
    dtype: torch.dtype,
    capsys: pytest.CaptureFixture,
) -> None:
    """Each matrix has rows of its own making; tied ones are untied, which is logged with its cost."""
    from transformers import AutoModelForCausalLM

    source = change_source(tiny_model_dir, tmp_path / "source", dtype, **shape)
    tokenizer = extend_tokenizer(source)
    target = extend_model(source, tokenizer, tmp_path / "target", init_input="last", init_output="first")
    means = subtokens(source, tokenizer)
    old = read_weights(source)
    old.setdefault("lm_head.weight", old["model.embed_tokens.weight"])
    assert target.keys() == old.keys()
    for name, place in (("model.embed_tokens.weight", -1), ("lm_head.weight", 0)):
        assert torch.equal(target[name][:500], old[name][:500])
        for row, ids in means.items():
            assert torch.equal(target[name][row], old[name][ids[place]])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "target", torch_dtype="auto")
    assert torch.equal(model.lm_head.weight, target["lm_head.weight"])
    assert torch.equal(model.model.embed_tokens.weight, target["model.embed_tokens.weight"])
    cost = f"{target['lm_head.weight'].numel():,} parameters more"
    assert (cost in "".join(capsys.readouterr())) == shape.get("tied", False)
    record = json.loads((tmp_path / "target" / "model_initialization.json").read_text())
    assert (record["init_input"], record["init_output"]) == ("last", "first")


@pytest.mark.parametrize(
    "shape", [{"num_shards": 3}, {"tied": True, "num_shards": 2, "extra_rows": 12}], ids=["untied", "tied"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_every_way_as_written(
    tiny_model_dir: Path,
    tmp_path: Path,
    extend_tokenizer: Callable,
    extend_model: Callable,
    shape: dict[str, Any],
    dtype: torch.dtype,
) -> None:
    """Sharded, tied, padded: each way's rows within the dtype's rounding of its formula in float64."""
    source = change_source(tiny_model_dir, tmp_path / "source", dtype, **shape)
    tokenizer = extend_tokenizer(source)
    old, replaced = read_weights(source), subtokens(source, tokenizer)
    for way, formula in FORMULAS.items():
        target = extend_model(
            source,
            tokenizer,
            tmp_path / way,
            init_input=way,
            init_output=way,
            pad_to_multiple_of=64,
        )
        assert target.keys() == old.keys()
        for name in EMBEDDINGS[: 1 if shape.get("tied") else 2]:
            assert len(target[name]) % 64 == 0
            assert torch.equal(target[name][:500], old[name][:500])
            for row, ids in replaced.items():
                exact = formula(old[name][ids].double())
                step = torch.finfo(dtype).eps
                torch.testing.assert_close(target[name][row].double(), exact, rtol=step, atol=1e-6)


def test_a_tied_model_stays_tied_where_both_are_made_alike(
    tiny_model_dir: Path, tmp_path: Path, extend_tokenizer: Callable, extend_model: Callable
) -> None:
    source = change_source(tiny_model_dir, tmp_path / "source", tied=True)
    ways = {"init_input": "rescaled", "init_output": "rescaled"}
    target = extend_model(source, extend_tokenizer(source), tmp_path / "target", **ways)
    assert "lm_head.weight" not in target
    assert json.loads((tmp_path / "target" / "config.json").read_text())["tie_word_embeddings"] is True


def test_byte_level_model(
    llama3_tokenizer_dir: Path,
    root: Path,
    tmp_path: Path,
    extend_tokenizer: Callable,
    extend_model: Callable,
) -> None:
    """Special tokens sit between the old ids and the new ones; partial characters have rows as well."""
    from transformers import AutoTokenizer

    from colossal_llama.tokenizer.byte_alphabet import token_bytes

    source = make_llama3_model(llama3_tokenizer_dir, root, tmp_path / "source")
    tokenizer = extend_tokenizer(source)
    target = extend_model(source, tokenizer, tmp_path / "target")
    old, new = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(tokenizer)
    means = {}
    for token, token_id in new.get_vocab().items():
        if token_id >= len(old):
            try:
                text = token_bytes(token).decode()
            except UnicodeDecodeError:
                # In this small vocabulary, parts of Chinese characters are single bytes.
                means[token_id] = [old.convert_tokens_to_ids(character) for character in token]
            else:
                means[token_id] = old(text, add_special_tokens=False).input_ids
    assert len(means) > len(WORDS)
    check_rows(read_weights(source), target, means, len(old))


def make_llama3_model(tokenizer_dir: Path, root: Path, target: Path) -> Path:
    from support import load_script
    from transformers import AutoTokenizer

    shutil.copytree(tokenizer_dir, target)
    rows = len(AutoTokenizer.from_pretrained(tokenizer_dir))
    maker = load_script(root / "examples" / "make_base_model.py")
    maker.make_model(target, rows, hidden_size=64, num_layers=1, num_heads=4, max_positions=64, seed=0)
    return target


@pytest.mark.parametrize(
    ("flag", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_dtype(
    tiny_model_dir: Path,
    tmp_path: Path,
    extend_tokenizer: Callable,
    extend_model: Callable,
    flag: str,
    dtype: torch.dtype,
) -> None:
    source = change_source(
        tiny_model_dir, tmp_path / "source", torch.float32 if flag != "fp32" else torch.bfloat16
    )
    inverse = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(8)}
    save_file(
        load_file(source / "model.safetensors") | inverse, source / "model.safetensors", {"format": "pt"}
    )
    target = extend_model(source, extend_tokenizer(source), tmp_path / "target", dtype=flag)
    for name, tensor in read_weights(source).items():
        if "inv_freq" in name:
            assert target[name].dtype == torch.float32
        else:
            assert target[name].dtype == dtype
        if name not in EMBEDDINGS:
            assert torch.equal(target[name], tensor.to(target[name].dtype))
        else:
            assert torch.equal(target[name][:500], tensor.to(dtype))
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    assert config["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_values_too_large_for_fp16(
    tiny_model_dir: Path, tmp_path: Path, extend_tokenizer: Callable, extend_model: Callable
) -> None:
    source = change_source(tiny_model_dir, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"model\.norm\.weight: .*too large for float16"):
        extend_model(source, extend_tokenizer(source), tmp_path / "target", dtype="fp16")
    assert not list((tmp_path / "target").iterdir())


@pytest.mark.parametrize("bin", [False, True])
def test_an_index_of_one_shard(
    tiny_model_dir: Path, tmp_path: Path, extend_tokenizer: Callable, extend_model: Callable, bin: bool
) -> None:
    from transformers import LlamaForCausalLM

    source = change_source(tiny_model_dir, tmp_path / "source", bin=bin)
    stem, suffix = ("pytorch_model", ".bin") if bin else ("model", ".safetensors")
    shard = source / f"{stem}-00001-of-00001{suffix}"
    (source / f"{stem}{suffix}").rename(shard)
    index = {"metadata": {}, "weight_map": dict.fromkeys(read_weights(source), shard.name)}
    (source / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    target = extend_model(source, extend_tokenizer(source), tmp_path / "target")
    state = LlamaForCausalLM.from_pretrained(tmp_path / "target").state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in target.items())


def test_a_configuration_of_transformers_5(
    tiny_model_dir: Path, tmp_path: Path, extend_tokenizer: Callable, extend_model: Callable
) -> None:
    """The base of the rotary embedding has another name there; the default in its place would be silent."""
    from colossal_llama.inference.loading import load_model
    from colossal_llama.inference.settings import ModelSettings
    from colossal_llama.training.llama.loading import load_config

    source = change_source(tiny_model_dir, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    for name in ("rope_theta", "rope_scaling", "torch_dtype"):
        config.pop(name, None)
    scaling = {"rope_type": "linear", "factor": 2.0}
    config |= {"rope_parameters": {"rope_theta": 5e5, **scaling}, "dtype": "float32"}
    (source / "config.json").write_text(json.dumps(config))
    tokenizer = extend_tokenizer(source)
    extend_model(source, tokenizer, tmp_path / "target", dtype="bf16")
    written = json.loads((tmp_path / "target" / "config.json").read_text())
    assert (written["rope_theta"], written["rope_scaling"]) == (5e5, scaling)
    assert written["rope_parameters"] == config["rope_parameters"]
    assert written["torch_dtype"] == written["dtype"] == "bfloat16"
    for loaded in (
        load_config(str(source), False),
        load_model(ModelSettings(str(source), str(tokenizer), device="cpu")).model.config,
    ):
        assert (loaded.rope_theta, loaded.rope_scaling, loaded.torch_dtype) == (5e5, scaling, torch.float32)


def test_a_configuration_that_is_no_object(
    tiny_model_dir: Path, tmp_path: Path, extend_tokenizer: Callable, extend_model: Callable
) -> None:
    source = change_source(tiny_model_dir, tmp_path / "source")
    tokenizer = extend_tokenizer(source)
    (source / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config\.json: not a JSON object"):
        extend_model(source, tokenizer, tmp_path / "target")


def test_padding(
    tiny_model_dir: Path, tmp_path: Path, extend_tokenizer: Callable, extend_model: Callable
) -> None:
    tokenizer = extend_tokenizer(tiny_model_dir)
    target = extend_model(tiny_model_dir, tokenizer, tmp_path / "target", pad_to_multiple_of=64)
    source = read_weights(tiny_model_dir)
    for name in EMBEDDINGS:
        assert target[name].shape[0] == 576
        mean = source[name].double().mean(0).float()
        torch.testing.assert_close(target[name][-1], mean)
    assert json.loads((tmp_path / "target" / "config.json").read_text())["vocab_size"] == 576


def test_target_may_be_the_tokenizer_and_runs_can_be_repeated(
    tiny_model_dir: Path, extend_tokenizer: Callable, extend_model: Callable
) -> None:
    tokenizer = extend_tokenizer(tiny_model_dir)
    first = extend_model(tiny_model_dir, tokenizer, tokenizer)
    second = extend_model(tiny_model_dir, tokenizer, tokenizer)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (tokenizer / "generation_config.json").exists()


def test_killed_run_never_looks_finished(
    tiny_model_dir: Path,
    tmp_path: Path,
    extend_tokenizer: Callable,
    extend_model: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = extend_tokenizer(tiny_model_dir)
    source = change_source(tiny_model_dir, tmp_path / "source", num_shards=3)
    extend_model(source, tokenizer, tmp_path / "target")
    from colossal_llama.model import model_extension

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model_extension, "_check_shard", die)
    with pytest.raises(KeyboardInterrupt):
        extend_model(source, tokenizer, tmp_path / "target")
    assert not (tmp_path / "target" / "config.json").exists()


def test_damage_is_found_before_success_is_printed(
    tiny_model_dir: Path,
    tmp_path: Path,
    extend_tokenizer: Callable,
    extend_model: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    new_rows = RowPlan.new_rows
    monkeypatch.setattr(RowPlan, "new_rows", lambda *arguments: new_rows(*arguments) * 1.01)
    with pytest.raises(UserError, match=r"weight: rows 500 to 514 are not"):
        extend_model(tiny_model_dir, extend_tokenizer(tiny_model_dir), tmp_path / "target")
    assert not (tmp_path / "target" / "config.json").exists()


def swap_ids(tokenizer: Path) -> None:
    path = tokenizer / "tokenizer.model"
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    proto.pieces[300].piece, proto.pieces[301].piece = proto.pieces[301].piece, proto.pieces[300].piece
    path.write_bytes(proto.SerializeToString())


def test_ids_that_change_their_meaning_are_refused(
    tiny_model_dir: Path, tmp_path: Path, extend_tokenizer: Callable, extend_model: Callable
) -> None:
    tokenizer = extend_tokenizer(tiny_model_dir)
    swap_ids(tokenizer)
    with pytest.raises(UserError) as caught:
        extend_model(tiny_model_dir, tokenizer, tmp_path / "target")
    assert "id 300 is" in caught.value.problems[0]
    assert not (tmp_path / "target").exists()


def test_other_weights_in_the_target_are_refused(
    tiny_model_dir: Path, tmp_path: Path, extend_tokenizer: Callable, extend_model: Callable
) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "model-00001-of-00002.safetensors").write_bytes(b"")
    tokenizer = extend_tokenizer(tiny_model_dir)
    with pytest.raises(UserError, match="holds other weights"):
        extend_model(tiny_model_dir, tokenizer, tmp_path / "target", overwrite=True)


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.json"],
)
def test_what_another_program_made_is_replaced_only_when_told(
    tiny_model_dir: Path,
    tmp_path: Path,
    extend_tokenizer: Callable,
    extend_model: Callable,
    capsys: pytest.CaptureFixture,
    name: str,
) -> None:
    """Also what stands behind a link, and a model that was trained from one of ours."""
    tokenizer, target = extend_tokenizer(tiny_model_dir), tmp_path / "target"
    target.mkdir()
    if name != "tokenizer.json":
        shutil.copyfile(tokenizer / "vocabulary_extension.json", target / "vocabulary_extension.json")
    (tmp_path / "theirs").write_bytes(b"{}")
    (target / name).symlink_to(tmp_path / "theirs")
    with pytest.raises(SystemExit):
        extend_model(tiny_model_dir, tokenizer, target)
    error = capsys.readouterr().err
    assert f"({name}); choose another directory, or --overwrite" in error
    if name != "pytorch_model.bin":  # refused all the same: it might be loaded
        extend_model(tiny_model_dir, tokenizer, target, overwrite=True)
        extend_model(tiny_model_dir, tokenizer, target, pad_to_multiple_of=8)  # its own, without the flag
    assert (tmp_path / "theirs").read_bytes() == b"{}"


def test_how_a_model_was_made_is_written_first(
    tiny_model_dir: Path,
    tmp_path: Path,
    extend_tokenizer: Callable,
    extend_model: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So a run that was killed at any moment can be repeated."""
    tokenizer, target = extend_tokenizer(tiny_model_dir), tmp_path / "target"
    monkeypatch.setattr(init_model, "_copy_small_files", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        extend_model(tiny_model_dir, tokenizer, target)
    assert {path.name for path in target.iterdir()} == {"model_initialization.json", "model.safetensors"}
    monkeypatch.undo()
    extend_model(tiny_model_dir, tokenizer, target, pad_to_multiple_of=64)
    how = json.loads((target / "model_initialization.json").read_text())
    report = json.loads((target / "vocabulary_extension.json").read_text())
    assert how["dtype"] == "source"
    assert how["kept_rows"] == report["counts"]["source_vocabulary_size"]
    assert how["kept_rows"] + how["new_rows"] == report["counts"]["target_vocabulary_size"]
    assert (how["kept_rows"] + how["new_rows"] + how["padding_rows"]) % 64 == 0


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda source: truncate(source / "model.safetensors"), "damaged safetensors file"),
        (
            lambda source: (source / "model.safetensors").write_bytes(b"abc"),
            "not a complete safetensors file",
        ),
        (
            lambda source: (source / "model.safetensors").write_bytes(b"\x10" + bytes(40)),
            "damaged safetensors",
        ),
        (lambda source: (source / "model.safetensors").unlink(), "no model weights"),
    ],
)
def test_damaged_sources(
    tiny_model_dir: Path,
    tmp_path: Path,
    extend_tokenizer: Callable,
    extend_model: Callable,
    damage: Callable[[Path], Any],
    reason: str,
) -> None:
    source = change_source(tiny_model_dir, tmp_path / "source")
    tokenizer = extend_tokenizer(source)
    damage(source)
    with pytest.raises(UserError, match=reason):
        extend_model(source, tokenizer, tmp_path / "target")


def test_pickles_are_not_executed(
    tiny_model_dir: Path, tmp_path: Path, extend_tokenizer: Callable, extend_model: Callable
) -> None:
    source = change_source(tiny_model_dir, tmp_path / "source")
    tokenizer = extend_tokenizer(source)
    (source / "model.safetensors").unlink()
    torch.save({"x": Evil(tmp_path / "executed")}, source / "pytorch_model.bin")
    with pytest.raises(UserError, match="can't be loaded as plain weights"):
        extend_model(source, tokenizer, tmp_path / "target")
    assert not (tmp_path / "executed").exists()


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_missing_head_is_an_error_unless_tied(
    tiny_model_dir: Path, tmp_path: Path, extend_tokenizer: Callable, extend_model: Callable
) -> None:
    source = change_source(tiny_model_dir, tmp_path / "source", tied=True)
    config = json.loads((source / "config.json").read_text())
    config["tie_word_embeddings"] = False
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"no tensor lm_head\.weight"):
        extend_model(source, extend_tokenizer(source), tmp_path / "target")


def test_plan_of_a_padded_vocabulary() -> None:
    """Six source rows, of which two are padding; three tokens more; padded to a multiple of four."""
    source = dict(enumerate(["<s>", "a", "b", "c"]))
    target = dict(enumerate(["<s>", "a", "b", "c", "ab", "bc", "abc"]))
    plan = plan_rows(source, target, 6, 4, lambda tokens: [[ord(c) - 96 for c in token] for token in tokens])
    assert plan.segments == [("kept", 0, 4), ("new", 4, 7), ("padding", 7, 8)]
    assert plan.subtokens == {4: [1, 2], 5: [2, 3], 6: [1, 2, 3]}
    assert (plan.num_rows, plan.num_source_tokens) == (8, 4)


def test_special_tokens_between_old_and_new_ids() -> None:
    source = {0: "a", 1: "b", 2: "<eot>"}
    plan = plan_rows(source, {**source, 3: "ab"}, 3, 1, lambda tokens: [[0, 1] for _ in tokens])
    assert plan.segments == [("kept", 0, 3), ("new", 3, 4)]


def test_a_tokenizer_that_was_put_beside_a_smaller_model(
    tiny_model_dir: Path, tmp_path: Path, extend_tokenizer: Callable, extend_model: Callable
) -> None:
    source = change_source(tiny_model_dir, tmp_path / "source")
    tokenizer = extend_tokenizer(source)
    shutil.copytree(tokenizer, source, dirs_exist_ok=True)
    with pytest.raises(UserError, match="has to hold the tokenizer that belongs to the model"):
        extend_model(source, tokenizer, tmp_path / "target")


def test_token_without_text_in_the_source_is_refused() -> None:
    with pytest.raises(UserError, match="no text"):
        plan_rows({0: "a"}, {0: "a", 1: "?"}, 1, 1, lambda tokens: [[] for _ in tokens])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_means_against_float64(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(300, 48, generator=generator).to(dtype)
    lists = [
        torch.randint(0, 300, (int(length),), generator=generator).tolist()
        for length in torch.randint(1, 30, (500,), generator=generator)
    ]
    means = mean(matrix, lists)
    assert means.dtype == torch.float32
    for row, ids in zip(means, lists, strict=True):
        torch.testing.assert_close(row.double(), matrix[ids].double().mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        mean_of_all_rows(matrix, 200, 7).double(), matrix[:200].double().mean(0), rtol=1e-6, atol=1e-7
    )


def test_another_initialization_is_a_function_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets what it needs both for a whole step's rows and for the check of single ones."""

    def second(matrix: torch.Tensor, subtokens: list[list[int]]) -> torch.Tensor:
        return matrix[[ids[1] for ids in subtokens]].to(torch.promote_types(matrix.dtype, torch.float32))

    monkeypatch.setitem(INITIALIZATIONS, "second", second)
    matrix = torch.randn(4, 8).bfloat16()
    plan = plan_rows(
        dict(enumerate("abcd")),
        dict(enumerate("abcdef")),
        4,
        1,
        lambda tokens: [[0, 3], [2, 1, 2]],
    )
    assert torch.equal(plan.new_rows(matrix, 4, 6, "second"), matrix[[3, 1]].float())
    assert torch.equal(plan.new_row_alone(matrix, 5, "second"), matrix[1].double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_found_anywhere(dtype: torch.dtype, value: float) -> None:
    for size in (1, 7, 1000, 100_003):
        for position in {0, size // 2, size - 1}:
            values = torch.randn(size).to(dtype)
            assert all_finite(values)
            values[position] = value
            assert not all_finite(values)
    assert all_finite(torch.empty(0, dtype=dtype))

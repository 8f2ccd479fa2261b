"""Whole comparisons in this process, against transformers alone."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from colossal_llama.evaluation import compare_models, scoring, standing_rows
from colossal_llama.evaluation.models import _names, find_models
from colossal_llama.utils.errors import UserError

Results = dict[tuple[str, str, str | None], dict[str, Any]]


def compare(
    output: Path, models: list[Path], sets: list[Path], patch: pytest.MonkeyPatch, **flags: Any
) -> Results:
    """Runs compare_models.py's steps; (model, set, category) -> its result."""
    values = {
        "models": ",".join(map(str, models)),
        "data_input_dirs": ",".join(map(str, sets)),
        "output_dir": output,
        "device": "cpu",
        **flags,
    }
    patch.setattr("sys.argv", ["compare_models.py", *(f"--{name}={value}" for name, value in values.items())])
    compare_models.main()
    content = json.loads((output / "comparison.json").read_text(encoding="utf-8"))
    return {(each["model"], each["set"], each["category"]): each for each in content["results"]}


def records_of(directory: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (directory / "records.jsonl").read_text().splitlines()]


def nats_of_text(model: Any, ids: list[int], num_scored: int) -> float:
    """By transformers alone: the summed loss of the last tokens."""
    labels = torch.tensor([-100] * (len(ids) - num_scored) + ids[len(ids) - num_scored :])
    with torch.no_grad():
        logits = model(torch.tensor(ids)[None]).logits[0, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum", ignore_index=-100))


@pytest.mark.parametrize("name", ["llama2", "llama3 tied", "extended"])
def test_bits_per_byte_are_those_of_transformers_alone(
    name: str,
    models: dict[str, Path],
    held_out: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """BOS, text, EOS; the loss of the target and of EOS by the bytes of the target."""
    results = compare(tmp_path, [models[name]], [held_out["en"], held_out["zh"]], monkeypatch)
    tokenizer = AutoTokenizer.from_pretrained(models[name])
    model = AutoModelForCausalLM.from_pretrained(models[name]).eval()
    for set_name in ("en", "zh"):
        loss = num_bytes = num_tokens = num_characters = 0.0
        for record in records_of(held_out[set_name]):
            text = record["source"] + record["target"]
            encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ids = encoded["input_ids"]
            border = len(record["source"])
            num_scored = sum(end > border for _, end in encoded["offset_mapping"]) if border else len(ids)
            whole = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
            loss += nats_of_text(model, whole, num_scored + 1)
            num_bytes += len(record["target"].encode())
            num_tokens += len(ids)
            num_characters += len(text)
        found = results[models[name].name, set_name, None]
        assert found["bits_per_byte"] == pytest.approx(loss / math.log(2) / num_bytes, rel=1e-4)
        assert found["bytes"] == num_bytes
        assert found["documents"] == len(records_of(held_out[set_name]))
        assert found["tokens_per_character"] == pytest.approx(num_tokens / num_characters)
    assert {key[2] for key in results if key[1] == "en"} == {None, "c0", "c1"}


@pytest.mark.parametrize("name", ["llama2", "llama3 tied"])
def test_long_documents_are_seen_in_windows_of_bytes(
    name: str,
    models: dict[str, Path],
    held_out: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each token with the tokens that begin in the 200 bytes up to the end of its window."""
    context, stride = 200, 80
    results = compare(
        tmp_path, [models[name]], [held_out["long"]], monkeypatch, context_bytes=context, stride_bytes=stride
    )
    tokenizer = AutoTokenizer.from_pretrained(models[name])
    model = AutoModelForCausalLM.from_pretrained(models[name]).eval()
    loss = num_bytes = 0.0
    for record in records_of(held_out["long"]):
        text = record["target"]
        num_bytes += len(text)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        ends = [len(tokenizer.decode(ids[: number + 1])) for number in range(len(ids))]
        starts = [0, *ends[:-1]]
        borders = list(range(context, len(text), stride))
        borders = [*borders, len(text)]
        for number, (token, end) in enumerate(zip(ids, ends, strict=True)):
            border = next(border for border in borders if end <= border)
            seen = [ids[i] for i in range(number) if starts[i] >= border - context]
            loss += nats_of_text(model, [tokenizer.bos_token_id, *seen, token], 1)
        seen = [token for token, start in zip(ids, starts, strict=True) if start >= len(text) - context]
        loss += nats_of_text(model, [tokenizer.bos_token_id, *seen, tokenizer.eos_token_id], 1)
    found = results[models[name].name, "long", None]
    assert found["bits_per_byte"] == pytest.approx(loss / math.log(2) / num_bytes, rel=1e-4)


def test_a_model_against_itself_gives_exactly_zero(
    models: dict[str, Path], held_out: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given twice, or as a copy elsewhere, which is scored for itself."""
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(models["llama2"], copy)
    given = [models["llama2"], models["llama2"], copy]
    results = compare(tmp_path / "out", given, [held_out["en"], held_out["zh"]], monkeypatch, dtype="bf16")
    assert len({model for model, *_ in results}) == 3
    for result in results.values():
        assert result["change"] == 0.0
        assert result["interval"] in (None, [0.0, 0.0])
    assert len(list((tmp_path / "out" / "scores").iterdir())) == 2


def test_new_rows_cost_old_text_what_masking_them_gives_back(
    models: dict[str, Path], held_out: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An extension that has not been trained: English has none of its pieces, and changes by their cost."""
    given = [models["llama2"], models["extended"]]
    results = compare(tmp_path, given, [held_out["en"], held_out["zh"]], monkeypatch)
    content = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    costs = {
        (cost["set"], cost["category"]): cost["cost_of_new_rows"] for cost in content["cost_of_new_rows"]
    }
    assert {cost["model"] for cost in content["cost_of_new_rows"]} == {"extended"}
    for category in (None, "c0", "c1"):
        change = results["extended", "en", category]["change"]
        assert change > 0.001
        assert costs["en", category] == pytest.approx(change, abs=1e-6)
    assert results["extended", "zh", None]["change"] != pytest.approx(costs["zh", None], abs=1e-3)
    facts = {model["name"]: model for model in content["models"]}
    assert facts["llama2"]["new_rows"] == 0
    assert facts["extended"]["new_rows"] > facts["extended"]["new_rows_in_text"] > 0
    found = results["extended", "zh", None]["tokens_per_character"]
    assert found < results["llama2", "zh", None]["tokens_per_character"]
    text = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert "## Cost of new rows" in text
    assert f"{facts['extended']['new_rows_in_text']} of {facts['extended']['new_rows']} new rows" in text


def test_new_rows_that_are_not_used(
    models: dict[str, Path], held_out: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the new rows are trained; where they started from is told by the files."""
    trained = AutoModelForCausalLM.from_pretrained(models["extended"])
    tokenizer = AutoTokenizer.from_pretrained(models["extended"])
    first, size = len(AutoTokenizer.from_pretrained(models["llama2"])), len(tokenizer)
    middle = (first + size) // 2
    with torch.no_grad():
        trained.get_input_embeddings().weight[middle:size] *= 2
        trained.get_output_embeddings().weight[middle:size] *= -1
    directory = tmp_path / "trained"
    shutil.copytree(models["extended"], directory)
    (directory / "model_initialization.json").unlink()  # as training leaves it out
    trained.save_pretrained(directory)

    def reports(given: list[Path]) -> dict[str, dict[str, Any]]:
        compare(tmp_path / "out", given, [held_out["zh"]], monkeypatch)
        content = json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))
        return {report["model"]: report for report in content["new_rows"]}

    alone = reports([models["llama2"], directory])
    both = reports([models["llama2"], directory, models["extended"], models["llama3 tied"]])
    by_name = {Path(name).name: report for name, report in both.items()}
    assert set(by_name) == {"trained", "extended"}
    assert Path(by_name["extended"]["start"]).name == Path(by_name["trained"]["start"]).name == "extended"
    assert by_name["extended"]["hardly_moved"] is None
    # An adapter that trained the embeddings has them in its own files.
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(models["extended"]), LoraConfig(r=2, target_modules=["q_proj"])
    )
    with torch.no_grad():
        for adapted_layer, layer in (
            (adapted.get_input_embeddings(), trained.get_input_embeddings()),
            (adapted.get_output_embeddings(), trained.get_output_embeddings()),
        ):
            adapted_layer.weight.copy_(layer.weight)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    (of_adapter,) = reports([models["llama2"], tmp_path / "adapter"]).values()
    (found,) = alone.values()
    for key in ("hardly_moved", "median_output_cosine", "start"):
        assert of_adapter[key] == found[key]
    assert found["start"] == "means of the base's rows"
    ids = {
        token
        for record in records_of(held_out["zh"])
        for token in tokenizer(record["target"], add_special_tokens=False)["input_ids"]
    }
    for report in (found, by_name["trained"]):
        assert report["pieces"] == size - first
        assert len(report["hardly_moved"]) == middle - first
        assert len(report["never_in_text"]) == len(set(range(first, size)) - ids)
        assert report["median_input_cosine"] == pytest.approx(1, abs=1e-5)
        assert -1.001 < report["median_output_cosine"] < 1
    text = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    assert "## New rows that are not used" in text


def test_rows_that_cannot_be_read_do_not_stop_a_comparison(
    models: dict[str, Path],
    held_out: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: object) -> None:
        raise UserError("no tensor")

    monkeypatch.setattr(standing_rows, "read_rows", refuse)
    compare(tmp_path, [models["llama2"], models["extended"]], [held_out["zh"]], monkeypatch)
    (report,) = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))["new_rows"]
    assert report["start"] is report["hardly_moved"] is None
    assert "how far its new rows moved can't be told: no tensor" in capsys.readouterr().err


def test_a_comparison_that_was_killed_continues(
    models: dict[str, Path], held_out: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is scored twice, and the files are the same, byte for byte."""
    monkeypatch.setattr(compare_models, "BATCH_TOKENS", 100)
    given, sets = [models["llama2"], models["llama3 tied"]], [held_out["en"], held_out["zh"]]
    compare(tmp_path / "whole", given, sets, monkeypatch)
    scored = []
    original = scoring.Scorer.score

    def score(self: scoring.Scorer, windows: list) -> list:
        if len(scored) == 5:
            raise KeyboardInterrupt
        scored.append(len(windows))
        return original(self, windows)

    monkeypatch.setattr(scoring.Scorer, "score", score)
    with pytest.raises(KeyboardInterrupt):
        compare(tmp_path / "killed", given, sets, monkeypatch)
    assert not (tmp_path / "killed" / "comparison.json").exists()
    (half,) = (tmp_path / "killed" / "scores").iterdir()
    lines = half.read_bytes().splitlines(keepends=True)
    assert len(lines) == 5
    half.write_bytes(b"".join(lines) + b"[[3, 1.5")  # killed while it wrote
    monkeypatch.setattr(scoring.Scorer, "score", original)
    compare(tmp_path / "killed", given, sets, monkeypatch)
    for name in ("comparison.json", "comparison.md", "comparison.png"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert half.read_bytes().splitlines(keepends=True)[:5] == lines

    def never(*_: object) -> None:
        raise AssertionError("everything has been scored")

    monkeypatch.setattr(scoring.Scorer, "score", never)
    compare(tmp_path / "killed", given[::-1], sets, monkeypatch)


def test_other_arithmetic_or_other_weights_are_scored_anew(
    models: dict[str, Path], held_out: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(models["llama2"], model)
    first = compare(tmp_path / "out", [model], [held_out["en"]], monkeypatch)
    bf16 = compare(tmp_path / "out", [model], [held_out["en"]], monkeypatch, dtype="bf16")
    (key,) = {key for key in first if key[2] is None}
    assert bf16[key]["bits_per_byte"] != first[key]["bits_per_byte"]
    assert bf16[key]["bits_per_byte"] == pytest.approx(first[key]["bits_per_byte"], rel=0.02)
    other = AutoModelForCausalLM.from_pretrained(model)
    torch.nn.init.normal_(other.lm_head.weight)
    other.save_pretrained(model)
    changed = compare(tmp_path / "out", [model], [held_out["en"]], monkeypatch)
    assert changed[key]["bits_per_byte"] != pytest.approx(first[key]["bits_per_byte"], rel=0.01)
    assert len(list((tmp_path / "out" / "scores").iterdir())) == 3


def test_models_of_different_dtypes_are_named(
    models: dict[str, Path],
    held_out: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    trained = tmp_path / "trained"
    shutil.copytree(models["llama2"], trained)
    AutoModelForCausalLM.from_pretrained(trained, torch_dtype=torch.bfloat16).save_pretrained(trained)
    given = [models["llama2"], trained]
    compare(tmp_path / "out", given, [held_out["en"]], monkeypatch)
    captured = capsys.readouterr()
    assert "the models are computed in different types (" in captured.out + captured.err
    assert "trained: bf16)" in captured.out + captured.err
    compare(tmp_path / "other", given, [held_out["en"]], monkeypatch, dtype="fp32")
    compare(tmp_path / "same", [trained, trained], [held_out["en"]], monkeypatch)
    captured = capsys.readouterr()
    assert "different types" not in captured.out + captured.err


def test_adapters_and_checkpoints(
    models: dict[str, Path], held_out: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(models["llama2"])
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    step = tmp_path / "run" / "epoch-0_step-9"
    adapted.save_pretrained(step / "modeling")
    merged = tmp_path / "merged"
    shutil.copytree(models["llama2"], merged)
    adapted.merge_and_unload().save_pretrained(merged)
    (step / "COMPLETE").write_text("{}")
    assert [Path(each.path) for each in find_models([str(tmp_path / "run" / "latest"), str(step)])] == (
        [step / "modeling"] * 2
    )
    results = compare(
        tmp_path / "out", [models["llama2"], step, merged], [held_out["en"]], monkeypatch, dtype="fp32"
    )
    by_model = {Path(key[0]).name: result for key, result in results.items() if key[2] is None}
    assert set(by_model) == {"llama2", "epoch-0_step-9", "merged"}
    assert by_model["merged"]["change"] == pytest.approx(by_model["epoch-0_step-9"]["change"], abs=1e-6)
    assert abs(by_model["merged"]["change"]) > 1e-4
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").rename(tmp_path / "checkpoint_dir")
    (found,) = find_models(["latest"])
    assert found.path == "checkpoint_dir/epoch-0_step-9/modeling"
    with pytest.raises(UserError, match=r"--models nowhere/latest: no complete checkpoint in nowhere"):
        find_models(["nowhere/latest"])


def test_names_tell_models_apart(tmp_path: Path) -> None:
    paths = ["base", "run/epoch-0_step-5/modeling", "run/modeling", "other/base"]
    for path in paths:
        (tmp_path / path).mkdir(parents=True)
    given = [str(tmp_path / path) for path in paths]
    assert _names([*given, given[0], "meta/llama", given[0]]) == [
        "base",
        "run/epoch-0_step-5",
        "run",
        "other/base",
        "base (2)",
        "meta/llama",
        "base (3)",
    ]


def test_problems_are_named_before_a_model_is_loaded(
    models: dict[str, Path],
    held_out: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    short, other = tmp_path / "short", tmp_path / "other"
    for directory, change in ((short, {"max_position_embeddings": 20}), (other, {"model_type": "mistral"})):
        shutil.copytree(models["llama2"], directory)
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, **change}))
        (directory / "model.safetensors").unlink()
    with pytest.raises(UserError) as caught:
        compare(tmp_path / "out", [short, other, models["llama2"]], [held_out["en"]], monkeypatch)
    positions, kind = caught.value.problems
    assert "short: a window has" in positions
    assert "20 positions; use --context_bytes" in positions
    assert "other: is a mistral model" in kind

    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "a.jsonl").write_text('{"messages": []}\n\n{"source": "", "target": "x"}\nnothing\n')
    with pytest.raises(UserError) as caught:
        compare(tmp_path / "out", [models["llama2"]], [bad], monkeypatch)
    lines = [problem.partition(": ") for problem in caught.value.problems]
    assert [Path(line[0]).name for line in lines] == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:4"]
    assert "a conversation" in lines[0][2]
    assert "'category' is missing" in lines[1][2]

    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "comparison.json").write_text("[1]")
    with pytest.raises(SystemExit):
        compare(
            tmp_path / "theirs",
            [tmp_path / "no" / "model", models["llama2"]],
            [tmp_path / "nowhere"],
            monkeypatch,
            stride_bytes=10,
            context_bytes=0,
        )
    message = capsys.readouterr().err
    for part in (
        "--models",
        "no/model: no such directory",
        "--data_input_dirs",
        "--context_bytes 0: must be",
    ):
        assert part in message
    with pytest.raises(SystemExit):
        compare(
            tmp_path / "theirs",
            [models["llama2"]],
            [held_out["en"]],
            monkeypatch,
            stride_bytes=10,
            context_bytes=9,
        )
    message = capsys.readouterr().err
    assert "--stride_bytes 10: more than --context_bytes 9" in message
    assert "comparison.json is there already, and this script did not write it" in message

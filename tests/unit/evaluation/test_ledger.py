"""The ledger of a small extended model against transformers alone."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus import CHINESE
from safetensors.torch import load_file, save_file
from tokenizer_cases import run_extension  # on the path thanks to conftest.py
from transformers import AutoModelForCausalLM, AutoTokenizer

from colossal_llama.dataset.preparation import prepare
from colossal_llama.dataset.settings import (
    PathSettings,
    PreparationSettings,
    PretrainSettings,
    RowSettings,
    WorkerSettings,
)
from colossal_llama.evaluation import ledger
from colossal_llama.model import init_model
from colossal_llama.utils.errors import UserError

TEXTS = [f"{text}图书馆在中国。" for text in CHINESE]


def write_held_out(directory: Path, texts: list[str]) -> Path:
    directory.mkdir()
    records = [{"source": "", "target": text, "category": "web"} for text in texts]
    lines = [json.dumps(record) + "\n" for record in records]
    (directory / "records.jsonl").write_text("".join(lines), encoding="utf-8")
    return directory


@pytest.fixture(params=["llama2", "llama3 tied"])
def pair(request: pytest.FixtureRequest, models: dict[str, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A base, and its extension as `init_model.py` writes it."""
    base = models[request.param]
    if request.param == "llama2":
        return base, models["extended"]
    target = tmp_path / "extended"
    run_extension(base, target, ["人工智能", "中国", "图书馆"], "add")
    flags = {
        "source_model_and_tokenizer_path": base,
        "target_tokenizer_path": target,
        "target_model_path": target,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["init_model.py", *(f"--{name}={value}" for name, value in flags.items())])
        init_model.main()
    return base, target


@pytest.fixture
def trained(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    """The extended model with its weights changed, the new rows among them."""
    target = shutil.copytree(pair[1], tmp_path / "trained")
    tensors = load_file(target / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for tensor in tensors.values():
        tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def run(monkeypatch: pytest.MonkeyPatch, **flags: Any) -> dict[str, Any]:
    words = [f"--{name}={value}" for name, value in {"device": "cpu", **flags}.items()]
    monkeypatch.setattr("sys.argv", ["ledger.py", *words])
    ledger.main()
    return json.loads((Path(flags["output_dir"]) / "ledger.json").read_text())


def losses_of(directory: Path, text: str) -> list[tuple[int, int, int, float]]:
    """(id, first and last character, loss) of each token of a text."""
    tokenizer, model = (
        AutoTokenizer.from_pretrained(directory),
        AutoModelForCausalLM.from_pretrained(directory),
    )
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = torch.tensor([[tokenizer.bos_token_id, *encoding.input_ids]])
    with torch.no_grad():
        scores = model.double()(ids).logits[0, :-1].log_softmax(-1)
    losses = -scores.gather(1, ids[0, 1:, None])[:, 0]
    prefix = tokenizer.convert_tokens_to_ids("▁")  # offsets say that it stands for the first character
    return [
        (token, start, 0 if start == 0 and token == prefix else end, loss)
        for token, (start, end), loss in zip(
            encoding.input_ids, encoding.offset_mapping, losses.tolist(), strict=True
        )
    ]


def test_the_ledger_is_that_of_transformers_alone(
    pair: tuple[Path, Path], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, start = pair
    data = write_held_out(tmp_path / "held_out", TEXTS)
    paths = PathSettings([data], tokenizer_dir=trained, data_output_dirs=tmp_path / "data")
    rows = RowSettings(max_length=512, num_spliced_dataset_bins=1)
    prepare(PreparationSettings(PretrainSettings(), paths, rows, WorkerSettings(1)))
    flags = {
        "base_model": base,
        "model": trained,
        "data_input_dirs": data,
        "dataset": tmp_path / "data" / "arrow",
        "dtype": "fp32",
    }
    found = run(monkeypatch, **flags, output_dir=tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(trained)
    num_old = len(AutoTokenizer.from_pretrained(base))
    pieces = {piece["piece"]: piece for piece in found["pieces"]}
    assert [piece["id"] for piece in found["pieces"]] == list(range(num_old, len(tokenizer)))
    assert {"人工智能", "中国", "图书馆"} <= pieces.keys()

    occurrences: dict[int, int] = defaultdict(int)
    nats: dict[int, list[float]] = defaultdict(list)
    base_nats: dict[int, list[float]] = defaultdict(list)
    for text in TEXTS:
        by_base = losses_of(base, text)
        for token, first, last, loss in losses_of(trained, text):
            if token < num_old:
                continue
            occurrences[token] += 1
            inside = [each for each in by_base if first <= each[1] < each[2] <= last]
            if inside[0][1] == first and inside[-1][2] == last:
                nats[token].append(loss)
                base_nats[token].append(sum(each[3] for each in inside))
    assert len(nats) > 3
    for piece in found["pieces"]:
        token = piece["id"]
        assert piece["held_out_occurrences"] == piece["data_occurrences"] == occurrences[token]
        if "\\x" in piece["piece"]:
            continue  # a part of a character: there, offsets do not tell where tokens begin
        assert piece["compared"] == len(nats[token])
        if nats[token]:
            mean = sum(nats[token]) / len(nats[token])
            of_base = sum(base_nats[token]) / len(nats[token])
            assert piece["mean_nats"] == pytest.approx(mean, abs=1e-4)
            assert piece["mean_nats_of_base"] == pytest.approx(of_base, abs=1e-4)

    before, after = (load_file(path / "model.safetensors") for path in (start, trained))
    for name, key in (("model.embed_tokens.weight", "input_row"), ("lm_head.weight", "output_row")):
        if name not in before:  # tied
            assert all(piece[key] is None for piece in found["pieces"])
            continue
        for piece in found["pieces"]:
            old, new = before[name][piece["id"]].double(), after[name][piece["id"]].double()
            row = piece[key]
            assert row["distance"] == pytest.approx((new - old).norm().item(), rel=1e-4)
            assert row["cosine"] == pytest.approx(torch.cosine_similarity(old, new, dim=0).item(), rel=1e-5)
    # The start that is computed is the one that init_model.py wrote.
    again = run(monkeypatch, **flags, start_model=start, output_dir=tmp_path / "out")
    for one, other in zip(found["pieces"], again["pieces"], strict=True):
        assert one["input_row"]["distance"] == pytest.approx(other["input_row"]["distance"], rel=1e-4)
    # In windows that overlap, each token counts once.
    cut = run(monkeypatch, **flags, output_dir=tmp_path / "cut", context_bytes=48, stride_bytes=24)
    for one, other in zip(found["pieces"], cut["pieces"], strict=True):
        for count in ("held_out_occurrences", "compared"):
            assert one[count] == other[count]
    assert cut["summary"]["saved_nats"] != found["summary"]["saved_nats"]
    text = (tmp_path / "out" / "ledger.md").read_text()
    assert "## The worst" in text
    assert "| `中国` |" in text


def test_an_untrained_model_has_not_moved(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_held_out(tmp_path / "held_out", ["Nothing new."])
    found = run(
        monkeypatch,
        base_model=models["llama2"],
        model=models["extended"],
        data_input_dirs=data,
        output_dir=tmp_path / "out",
    )
    summary = found["summary"]
    assert summary["hardly_moved"] == summary["pieces"] == summary["never_in_held_out_text"]
    assert summary["in_data"] is None
    assert summary["median_input_cosine"] == pytest.approx(1.0)


def test_what_is_refused(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    data = write_held_out(tmp_path / "held_out", ["Text."])
    flags = {"data_input_dirs": data, "output_dir": tmp_path / "out"}
    with pytest.raises(UserError, match="its tokenizer has no more tokens than that of --base_model"):
        run(monkeypatch, base_model=models["llama2"], model=models["llama2"], **flags)
    with pytest.raises(UserError, match="its tokenizer does not extend that of --base_model"):
        run(monkeypatch, base_model=models["llama3 tied"], model=models["extended"], **flags)
    both = {"base_model": models["llama2"], "model": models["extended"], **flags}
    with pytest.raises(UserError, match=r"--start_model .* and no row"):
        run(monkeypatch, start_model=models["llama2"], **both)
    (tmp_path / "out" / "ledger.json").write_text("[]")
    with pytest.raises(SystemExit):
        run(monkeypatch, **both, context_bytes=10, stride_bytes=20)
    errors = capsys.readouterr().err
    assert "--stride_bytes 20: more than --context_bytes 10" in errors
    assert "ledger.json is there already, and this script did not write it" in errors

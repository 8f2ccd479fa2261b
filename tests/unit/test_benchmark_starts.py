"""The benchmark of the starts of new rows: its parts, and (slow) a whole case that is killed and goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, load_script

SCRIPT = ROOT / "benchmarks" / "starts_of_new_rows.py"


@pytest.fixture(scope="module")
def starts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        yield load_script(SCRIPT)


def test_names_of_starts(starts) -> None:
    for text in ("mean+half", "last+mean+calibrated"):
        assert str(starts.Way.parse(text)) == text
    for text in ("mean", "mean+calibrated", "mean+median", "mean+half+calibrated+calibrated"):
        with pytest.raises(ValueError, match="INPUT"):
            starts.Way.parse(text)


def test_sections_at_equal_distances(starts, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    lines = [json.dumps({"target": f"{number:010}"}) for number in range(100)]
    (source / "a.jsonl").write_text("\n".join(lines) + "\n")
    starts.take_sections(source, tmp_path / "target", 250)
    found = (tmp_path / "target" / "sections.jsonl").read_text().splitlines()
    assert found == lines[::4]


def test_the_results_file(starts) -> None:
    results = [
        {
            "init_input": "mean",
            "init_output": way,
            "calibrated": calibrated,
            "bits_per_byte": {"new": 2.5 + change, "old": 1.25},
            "change": {"new": [change, change - 0.1, change + 0.1], "old": [0.0, 0.0, 0.0]},
        }
        for way, calibrated, change in (
            ("mean", False, 0.0),
            ("mean", True, -0.25),
            ("half", False, 0.5),
            ("half", True, -0.5),
        )
    ]
    curves = [
        {
            "start": "mean+half",
            "seed": seed,
            "tokens": 1024,
            "lr": 0.001,
            "bits_per_byte": {"0": {"new": 3.0, "old": 1.0}, "25": {"new": 2.0 + seed, "old": 1.5}},
        }
        for seed in (1, 2)
    ]
    table = {"base": {"new": 2.0, "old": 1.25}, "results": results}
    text = starts.as_markdown(
        [{"name": "a case", "command": "python it", "steps": [0, 25, 50], "table": table, "curves": curves}]
    )
    assert "| mean | 2.500 / 2.250 | 3.000 / **2.000** |" in text
    assert "by -1.000 to -0.250 (median -0.625; worse in 0 of 2)" in text
    assert "| mean | mean | yes | 2.250 | -0.250 [-0.350, -0.150] | 1.250 |  |" in text
    assert "| mean+half | 3.000 | 3.500 (1.000) |  | 1.000 | 1.500 (0.000) |  |" in text


# Six processes that import torch, half a minute on a quiet machine.
@pytest.mark.slow
def test_a_case_from_the_table_to_the_curves(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, pieces, tokenizer = tmp_path / "corpus", tmp_path / "pieces.jsonl", tmp_path / "tokenizer"
    corpus.mkdir()
    record = {
        "source": "",
        "target": "人工智能改变了图书馆。The moon is made of 人工 light. " * 8,
        "category": "a",
    }
    (corpus / "a.jsonl").write_text((json.dumps(record) + "\n") * 60)
    pieces.write_text('{"piece": "人工智能"}\n{"piece": "图书馆"}\n')
    subprocess.run(
        [
            *(sys.executable, str(ROOT / "colossal_llama" / "tokenizer" / "init_tokenizer.py")),
            *("--source_tokenizer_dir", str(tiny_model_dir), "--target_tokenizer_dir", str(tokenizer)),
            *("--expand_tokens_file", str(pieces), "--unreachable", "add"),
        ],
        check=True,
    )
    flags = {
        "work_dir": tmp_path / "work",
        "output_file": tmp_path / "results.md",
        "name": "toy",
        "base": tiny_model_dir,
        "tokenizer": tokenizer,
        "corpus": corpus,
        "held_out": f"{corpus},{corpus}",
        "held_out_bytes": "2000,1000",
        "num_positions": 200,
        "init_input": "mean",
        "init_output": "mean,half",
    }

    def call(**more: object) -> str:
        words = [f"--{name}={value}" for name, value in (flags | more).items()]
        subprocess.run([sys.executable, str(SCRIPT), *words], check=True, stderr=subprocess.DEVNULL)
        return (tmp_path / "results.md").read_text()

    assert "After steps" not in call()
    table = tmp_path / "work" / "toy" / "table" / "initializations.json"
    made = table.stat().st_mtime_ns
    text = call(starts="mean+mean+calibrated", steps="0,2", seeds="1", max_length=512)
    assert "| mean+mean+calibrated |" in text
    assert table.stat().st_mtime_ns == made  # not measured again
    content = json.loads((tmp_path / "results.json").read_text())
    (curve,) = content[0]["curves"]
    (start,) = [
        start
        for start in content[0]["table"]["results"]
        if start["calibrated"] and start["tied"] is False and start["init_output"] == "mean"
    ]
    # What measure_init.py found before training, train.py finds at step 0.
    assert curve["bits_per_byte"]["0"]["new"] == pytest.approx(start["bits_per_byte"]["new"], abs=0.01)

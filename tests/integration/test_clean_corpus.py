"""examples/clean_corpus.py with datatrove, in an environment of its own.

Slow: the environment is installed from the package index (40 MB), and datatrove starts processes for each of
its stages. That its commands and requirements are those of docs/cleaning.md is a quick test.
"""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
from support import ROOT

SCRIPT = ROOT / "examples" / "clean_corpus.py"
SAMPLE = ROOT / "examples" / "data" / "pretrain"


def requirements() -> list[str]:
    (found,) = re.findall(r"^# dependencies = (\[.*\])$", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)
    return json.loads(found)


def test_the_page_installs_what_the_script_asks_for() -> None:
    page = (ROOT / "docs" / "cleaning.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^pip install (?!--)(.*)$", page, flags=re.MULTILINE)
    assert line.replace("'", "").split() == requirements()


def test_without_datatrove_it_says_where_it_comes_from(tmp_path: Path) -> None:
    hidden = tmp_path / "datatrove.py"
    hidden.write_text("raise ImportError", encoding="utf-8")
    flags = ["--data_input_dirs", str(SAMPLE), "--output_dir", str(tmp_path / "out")]
    done = run_script(Path(sys.executable), *flags, first_on_path=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: datatrove is not installed in this environment: see docs/cleaning.md\n"
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cleaning") / "environment"
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    python = directory / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", *requirements()]
    installed = subprocess.run(install, capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"datatrove can't be installed here: {installed.stderr.strip().splitlines()[-1]}")
    return python


def run_script(python: Path, *flags: str, first_on_path: Path = ROOT) -> subprocess.CompletedProcess:
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{first_on_path}:{ROOT}"}
    command = [str(python), str(SCRIPT), *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def records_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_records(path: Path, records: list[dict], **options: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record, **options) + "\n" for record in records]
    text = "".join(lines).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def pretraining(target: str, source: str = "", **fields: object) -> dict:
    return {"source": source, "target": target, "category": "planted", **fields}


@pytest.mark.slow
def test_what_was_planted_is_found_and_the_rest_is_as_it_was(python: Path, tmp_path: Path) -> None:
    samples = {path.name: records_of(path) for path in sorted(SAMPLE.glob("*.jsonl"))}
    for name, records in samples.items():
        # Spaces and escapes that no writer would choose again, fields that nothing reads, an empty line.
        text = (SAMPLE / name).read_text(encoding="utf-8") if name != "science.jsonl" else ""
        (tmp_path / "in" / "first").mkdir(parents=True, exist_ok=True)
        if text:
            (tmp_path / "in" / "first" / name).write_text(text.replace("\n", "\n\n", 1), encoding="utf-8")
        else:
            odd = [{"id": number, **record} for number, record in enumerate(records)]
            write_records(tmp_path / "in" / "first" / name, odd, indent=None, separators=(" ,", " : "))
    chinese = max(
        (r for r in samples["science.jsonl"] if r["target"].count("，") > 9), key=lambda r: len(r["target"])
    )
    english = max(
        (r for r in samples["history.jsonl"] if r["target"].isascii()), key=lambda r: len(r["target"])
    )
    questions = [
        "What carries the water of the old river to the mills of the town beyond the hill in spring?"
    ]
    questions += ["一个装满水的杯子放在桌子上的时候，杯子里的水面为什么总是平的，而不会倾斜到一边去呢？"]
    planted = {
        "duplicate": [
            {**english, "category": "elsewhere"},
            pretraining(chinese["source"] + chinese["target"]),
        ],
        "near_duplicate": [
            {**english, "target": english["target"] + " This was added at the end."},
            {**chinese, "target": chinese["target"].replace("，", "、", 3)},
        ],
        "contaminated": [
            pretraining("A list of questions. " + questions[0].upper() + " The mill race."),
            pretraining("练习题：" + questions[1] + "请回答。"),
        ],
        "repetitive": [pretraining("The same line again.\n" * 20)],
    }
    clean = [
        pretraining("What carries the water of the old river? A short question is not a benchmark."),
        pretraining("", source="A record without target."),
        pretraining("a"),
    ]
    write_records(tmp_path / "in" / "second" / "more.jsonl.gz", [*chain(*planted.values()), *clean])
    write_records(
        tmp_path / "benchmark" / "test.jsonl", [{"q": {"text": text}, "choices": ["A"]} for text in questions]
    )

    directories = f"{tmp_path}/in/first,{tmp_path}/in/second"
    flags = [
        "--data_input_dirs",
        directories,
        "--reference_dirs",
        f"{tmp_path}/benchmark",
        "--drop_repetitive",
    ]
    outputs = []
    for workers in ("1", "2"):
        out = tmp_path / f"out{workers}"
        done = run_script(python, *flags, "--output_dir", str(out), "--num_workers", workers)
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
        outputs.append(
            {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        )
    assert outputs[0] == outputs[1]

    removed = {
        reason: [entry["record"] for entry in records_of(out / "removed" / f"{reason}.jsonl")]
        for reason in planted
    }
    # Of two near duplicates either may stay.
    pairs = removed.pop("near_duplicate")
    assert len(pairs) == 2
    assert {record["target"][:20] for record in pairs} == {english["target"][:20], chinese["target"][:20]}
    assert removed == {reason: records for reason, records in planted.items() if reason != "near_duplicate"}
    shared = [entry["shared"] for entry in records_of(out / "removed" / "contaminated.jsonl")]
    assert shared[0].startswith("what carries the water")

    entries = [entry for path in (out / "removed").glob("*.jsonl") for entry in records_of(path)]
    gone = {(entry["file"], entry["line"]) for entry in entries}
    kept = {}
    for path in sorted((tmp_path / "in").rglob("*.jsonl*")):
        name = str(path.relative_to(tmp_path / "in")).removesuffix(".gz")
        text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        lines = enumerate(text.splitlines(keepends=True), start=1)
        kept[name] = b"".join(line for number, line in lines if line.strip() and (name, number) not in gone)
        assert (out / "kept" / name).read_bytes() == kept[name]
    counts = json.loads((out / "cleaning.json").read_text(encoding="utf-8"))
    assert counts["read"] == counts["kept"] + sum(len(records) for records in planted.values())
    assert counts["kept"] == sum(text.count(b"\n") for text in kept.values())


@pytest.mark.slow
def test_conversations_and_records_that_can_not_be_read(python: Path, tmp_path: Path) -> None:
    turns = [{"from": "human", "content": "How are you today, my friend?"}]
    turns += [{"from": "assistant", "content": "Well, thank you, and how was your long way home?"}]
    write_records(tmp_path / "in" / "a.jsonl", [{"messages": turns}, {"messages": turns, "category": "x"}])
    flags = [
        "--data_input_dirs",
        f"{tmp_path}/in",
        "--output_dir",
        f"{tmp_path}/out",
        "--keep_near_duplicates",
    ]
    assert run_script(python, *flags).returncode == 0
    assert records_of(tmp_path / "out" / "kept" / "in" / "a.jsonl") == [{"messages": turns}]

    (tmp_path / "in" / "b.jsonl").write_text('{"text": "no target"}\n{"messages"\n', encoding="utf-8")
    flags[3] += "2"
    done = run_script(python, *flags)
    assert done.returncode == 2
    assert f"{tmp_path}/in/b.jsonl:1: " in done.stderr
    assert f"{tmp_path}/in/b.jsonl:2: not valid JSON" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out2").exists()

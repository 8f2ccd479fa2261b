"""The pieces of examples/study that decide what its figures mean."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from support import ROOT, load_script

from colossal_llama.training.schedule import ScheduleSettings, make_schedule
from colossal_llama.utils.arguments import ArgumentParser
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.settings import add_settings, read_settings

STUDY = ROOT / "examples" / "study"
run_study = load_script(STUDY / "run_study.py")
report = load_script(STUDY / "report.py")
choose_text = load_script(STUDY / "choose_text.py")
steps = load_script(STUDY / "steps.py")
tables = load_script(STUDY / "tables.py")
collect = load_script(STUDY / "collect.py")


def schedule_of(words: list[str], data_steps: int) -> list[float]:
    """The rates that train.py makes of the flags, where the data is enough for so many steps."""
    parser = ArgumentParser(prog="train.py")
    add_settings(parser, ScheduleSettings)
    parser.add_argument("--warmup_steps", type=int)
    parsed = parser.parse_args(words)
    schedule = make_schedule(read_settings(ScheduleSettings, parsed), 1.0, parsed.warmup_steps, data_steps)
    return [schedule.at(step) for step in range(schedule.total_steps)]


@pytest.mark.parametrize("num_steps", [6, 62, 98])
def test_a_run_of_given_steps_is_a_cosine_whatever_the_epoch_has(num_steps: int) -> None:
    words = run_study.cosine(num_steps)
    warmup = str(run_study.warmup_of(num_steps))
    plain = schedule_of(["--lr_schedule", "cosine", "--warmup_steps", warmup], num_steps)
    assert schedule_of(words, num_steps + 50) == pytest.approx(plain, abs=1e-12)


def test_no_text_is_taken_twice() -> None:
    records = [{"target": "字" * length} for length in (5, 90, 1, 7, 3)]
    taken, rest = choose_text.take(records, 40)
    assert choose_text.size_of(taken) <= 40
    assert sorted(map(len, (each["target"] for each in taken + rest))) == [1, 3, 5, 7, 90]


def test_a_page_gets_its_tables_and_keeps_its_text() -> None:
    page = "before\n<!-- table: a -->\nold\n<!-- end -->\nbetween\n<!-- table: b -->\n<!-- end -->\nafter\n"
    filled = report.refresh(page, {"a": "| 1 |", "b": "| 2 |"})
    assert filled == (
        "before\n<!-- table: a -->\n| 1 |\n<!-- end -->\nbetween\n<!-- table: b -->\n| 2 |\n<!-- end -->\n"
        "after\n"
    )
    assert report.refresh(filled, {"a": "| 1 |", "b": "| 2 |"}) == filled
    with pytest.raises(UserError, match="no such table: b"):
        report.refresh(page, {"a": ""})


@pytest.mark.parametrize(
    ("interval", "seeds", "expected"),
    [
        ((-0.3, -0.1), (-0.2, -0.1), True),
        ((-0.3, -0.1), (-0.5, 0.1), False),
        ((-0.3, 0.1), (-0.2, -0.1), False),
        (None, (), False),
    ],
)
def test_what_is_called_a_difference(
    interval: tuple[float, float] | None, seeds: tuple[float, ...], expected: bool
) -> None:
    assert tables.is_difference({"change": -0.2, "interval": interval, "seeds": seeds}) is expected


def test_break_even_is_between_the_steps_where_the_curves_cross() -> None:
    def run(kind: str, bits: list[float]) -> dict:
        curve = [{"step": 10 * n, "tokens": 1000 * n, "zh": value} for n, value in enumerate(bits)]
        return {"kind": kind, "curve": curve}

    runs = [run("base_vocabulary", [1.7, 1.5, 1.4]), run("extended", [2.3, 1.6, 1.3])]
    assert collect.find_break_even(runs)["tokens"] == pytest.approx(1500)
    runs = [run("base_vocabulary", [1.7, 1.5, 1.4]), run("extended", [2.3, 1.6, 1.5])]
    assert collect.find_break_even(runs)["tokens"] is None


def python_step(name: str, code: str, **more: object) -> steps.Step:
    return steps.Step(name, "work", lambda: ["-c", code], **more)


def test_steps_run_once_and_again_when_something_before_them_changed(tmp_path: Path) -> None:
    def make(content: str) -> list[steps.Step]:
        first = python_step("first", f"open('first', 'a').write({content!r})", outputs=("first",))
        second = python_step("second", "open('second', 'a').write('x')", needs=("first",))
        return [first, second, python_step("third", "open('third', 'a').write('x')")]

    for content in ("1", "1", "2"):
        steps.Runner(tmp_path, 1).run_all(make(content))
    assert (tmp_path / "first").read_text() == "2"
    assert (tmp_path / "second").read_text() == "xx"
    assert (tmp_path / "third").read_text() == "x"


def test_a_step_that_fails_is_named_with_the_end_of_its_output(tmp_path: Path) -> None:
    step = python_step("broken", "print('what went wrong'); raise SystemExit(3)")
    with pytest.raises(UserError, match=r"broken: .* exit code 3.*\n.*what went wrong"):
        steps.Runner(tmp_path, 1).run_all([step])
    assert not (tmp_path / "steps" / "broken.json").exists()


def test_an_interrupted_step_continues_or_begins_anew(tmp_path: Path) -> None:
    """The first try dies by a signal after it has written; the second does not."""
    code = (
        "import os, pathlib, sys; path = pathlib.Path('out'); there = path.exists(); "
        "path.write_text(str(there) + ' '.join(sys.argv[1:])); marker = pathlib.Path('tried'); "
        f"marker.exists() or (marker.touch(), os.kill(os.getpid(), {int(signal.SIGKILL)}))"
    )
    for more, expected in (
        ({}, "False"),
        ({"continues": True}, "True"),
        ({"resume": lambda: ["--load_checkpoint"]}, "True--load_checkpoint"),
    ):
        work_dir = tmp_path / expected
        step = python_step("work", code, outputs=("out",), **more)
        with pytest.raises(UserError, match="exit code -9"):
            steps.Runner(work_dir, 1).run_all([step])
        steps.Runner(work_dir, 1).run_all([step])
        assert (work_dir / "out").read_text() == expected


def test_every_table_of_the_page_is_made() -> None:
    page = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    asked = {name for _, name, _, _ in report.TABLE.findall(page)}
    assert asked == set(tables.TABLES)

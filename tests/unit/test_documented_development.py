"""The pages for developers know the rooms of the package, their order, and files that exist."""

from __future__ import annotations

import re

from support import ROOT, documented_examples
from test_structure import LAYERS

PACKAGE = ROOT / "colossal_llama"
PAGES = ("development.md", "walks.md", "testing.md")
TEXT = "\n".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in PAGES)


def test_rooms_are_listed_in_the_order_of_their_layers() -> None:
    section = TEXT.partition("\n## Rooms\n")[2].partition("\nInside `training/`")[0]
    listed = re.findall(r"^\| `(\w+)/` \|", section, flags=re.MULTILINE)
    assert listed == [room for room in LAYERS if room in listed]
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms - set(listed) == set(), "a room is missing from docs/development.md"


def test_files_and_directories_exist() -> None:
    missing = []
    for name in sorted(set(re.findall(r"`([\w/.]*/[\w/.]*)(?::\w+)?`", TEXT))):
        starts = (PACKAGE, PACKAGE / "training", ROOT)
        is_output = name.startswith(("arrow/", "jsonl/", "cache/", "modeling/", "quickstart_output/"))
        if not is_output and not any((start / name).exists() for start in starts):
            missing.append(name)
    assert missing == []


def test_the_example_of_a_schedule_falls_from_one_to_zero() -> None:
    exponential = documented_examples()["exponential"]
    assert (exponential(0.0), exponential(1.0)) == (1.0, 0.0)


def test_examples_of_new_parts_are_complete() -> None:
    names = {"MyPlugin", "ZephyrTemplate", "MyEngine", "UnigramSource", "exponential", "middle"}
    assert set(documented_examples()) == names

"""Every cure says what it is for, and has a canary."""

from __future__ import annotations

import ast
import re

import pytest
from canaries import ROOT

import colossal_llama.upstream

UPSTREAM = ROOT / "colossal_llama" / "upstream"
# Calls the others.
COLLECTIONS = ("__init__", "cpu_training")
CURES = sorted(path.stem for path in UPSTREAM.glob("*.py") if path.stem not in COLLECTIONS)
# A canary would have to start Ray and kill a worker; tests/integration/test_prepare_on_ray.py sees the cure.
WITHOUT_CANARY = ("raylet_messages",)


@pytest.mark.parametrize("cure", CURES)
def test_a_cure_is_described(cure: str) -> None:
    documentation = ast.get_docstring(ast.parse((UPSTREAM / f"{cure}.py").read_text(encoding="utf-8")))
    assert [word for word in ("Broken in:", "Shows as:", "Cure:") if f"\n{word}" not in documentation] == []


@pytest.mark.parametrize("cure", CURES)
def test_a_cure_has_a_canary(cure: str) -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests/upstream").glob("test_*.py"))
    named = bool(re.search(rf': {cure}["\)]|\("{cure}", ', tests))
    assert named != (cure in WITHOUT_CANARY)


def test_what_is_cured_by_design_is_where_the_table_says() -> None:
    table = colossal_llama.upstream.__doc__
    places = re.findall(r"^    +((?:\w+/)+)(?:\n +| +[^\n]*\n +)?(\w+\.py)", table, flags=re.MULTILINE)
    assert len(places) > 10
    assert [place for place in places if not (ROOT / "colossal_llama" / "".join(place)).is_file()] == []
    canaries = set(re.findall(r" {2,}(\w+)$", table.partition("canary\n")[2], flags=re.MULTILINE))
    assert canaries == {"colossalai", "torch", "transformers"}

"""Which template the parts of a run name, and what does not go together."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from colossal_llama.conversation.carried import CarriedTemplate
from colossal_llama.training.data.templates import find_data_template
from colossal_llama.utils.errors import UserError

COLOSSAL = CarriedTemplate("colossal", "{{ 1 }}", (1, 2))
OTHER_SPACES = CarriedTemplate("colossal", "{{ 2 }}", (1, 2))
LLAMA2 = CarriedTemplate("llama2", "{{ 3 }}", (1, 3))
OWN = CarriedTemplate("tokenizer")
UNWRITABLE = CarriedTemplate("colossal")


def make_parts(directory: Path, *templates: CarriedTemplate | str | None) -> Any:
    """Parts with these templates; "pretrain" and None for those without conversations or a name."""
    paths = []
    for number, template in enumerate(templates):
        path = directory / f"part-{number:05d}"
        path.mkdir()
        prepared: dict[str, Any] = {"kind": "pretrain" if template == "pretrain" else "sft"}
        if isinstance(template, CarriedTemplate):
            prepared["template"] = template.as_json()
        if template != "of other programs":
            (path / "prepared.json").write_text(json.dumps(prepared))
        paths.append(path)
    return SimpleNamespace(paths=paths)


def test_parts_for_pretraining_are_neutral(tmp_path: Path) -> None:
    found = find_data_template(make_parts(tmp_path, "pretrain", COLOSSAL, COLOSSAL, "pretrain"))
    assert (found.carried, found.part, found.unnamed) == (COLOSSAL, tmp_path / "part-00001", None)


@pytest.mark.parametrize(
    ("templates", "reason"),
    [
        (["pretrain"], "the data is for pre-training"),
        ([None], "part-00000 names no template"),
        (["of other programs"], "part-00000 names no template"),
        ([OWN, "pretrain"], "the data was prepared with --chat_template"),
        ([UNWRITABLE], "no chat template makes the rows of --template colossal"),
    ],
)
def test_why_the_source_s_template_stays(templates: list, reason: str, tmp_path: Path) -> None:
    found = find_data_template(make_parts(tmp_path, *templates))
    assert found.carried is None or found.carried.text is None
    assert reason in found.explain_kept()


def test_an_unnamed_part_beside_a_named_one(tmp_path: Path) -> None:
    found = find_data_template(make_parts(tmp_path, None, COLOSSAL))
    assert (found.carried, found.unnamed) == (COLOSSAL, tmp_path / "part-00000")


@pytest.mark.parametrize("other", [LLAMA2, OTHER_SPACES, OWN])
def test_two_templates_are_an_error_that_names_the_parts(other: CarriedTemplate, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"part-00000: .*colossal, but \S*part-00001 with"):
        find_data_template(make_parts(tmp_path, COLOSSAL, other))


def test_a_damaged_description(tmp_path: Path) -> None:
    data = make_parts(tmp_path, COLOSSAL)
    (data.paths[0] / "prepared.json").write_text('{"kind": "sft", "template": 3}')
    with pytest.raises(UserError, match="'template' is damaged"):
        find_data_template(data)

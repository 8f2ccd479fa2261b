"""Which ids an extension added, as its report says."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizer_cases import run_extension
from transformers import AutoTokenizer

from colossal_llama.tokenizer.new_rows import read_new_ids
from colossal_llama.utils.errors import UserError


@pytest.mark.parametrize("kind", ["llama2", "llama3"])
def test_the_report_says_which_ids_are_new(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The pieces, their characters and intermediates: every id that the source's tokenizer does not have."""
    source = request.getfixturevalue(f"{kind}_tokenizer_dir")
    report = run_extension(source, tmp_path / "target", ["人工智能", "春天"], "add")
    before, after = (AutoTokenizer.from_pretrained(path) for path in (source, tmp_path / "target"))
    new = sorted(set(after.get_vocab().values()) - set(before.get_vocab().values()))
    assert len(new) >= report["counts"]["pieces_added"] > 0
    assert list(read_new_ids(tmp_path / "target" / "vocabulary_extension.json")) == new


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{}", "does not say which ids are new"),
        ('{"counts": 3}', "does not say which ids are new"),
        ('{"counts": {"source_vocabulary_size": 3}}', "does not say which ids are new"),
        ("[]", "not a JSON object"),
        (
            '{"counts": {"source_vocabulary_size": 5, "target_vocabulary_size": 5}}',
            "no piece was added to the 5",
        ),
    ],
)
def test_a_report_that_does_not_say_so_is_named(content: str, problem: str, tmp_path: Path) -> None:
    report = tmp_path / "vocabulary_extension.json"
    report.write_text(content)
    with pytest.raises(UserError, match=rf"vocabulary_extension\.json: .*{problem}"):
        read_new_ids(report)

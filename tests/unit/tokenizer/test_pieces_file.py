"""The pieces file: every invalid line is reported with file and line, valid ones keep their order."""

from __future__ import annotations

from pathlib import Path

import pytest

from colossal_llama.tokenizer.pieces_file import PieceRules, read_pieces
from colossal_llama.utils.errors import UserError

SENTENCEPIECE = PieceRules("▁", ["<s>", "</s>", "<0x0A>"], [">▁"])
BYTE_LEVEL = PieceRules(" ", ["<|eot_id|>"])


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("人工智能", "not valid JSON"),
        ('{"token": "人工"}', 'no "piece"'),
        ('["人工"]', 'no "piece"'),
        ('{"piece": 7}', "not a string"),
        ('{"piece": null}', "not a string"),
        ('{"piece": ""}', "empty"),
        ('{"piece": "  "}', "white space"),
        ('{"piece": "▁▁"}', "white space"),
        ('{"piece": "　"}', "white space"),
        ('{"piece": "人\\n工"}', "control character U+000A"),
        ('{"piece": "人\\u0000"}', "control character U+0000"),
        ('{"piece": "\\ud800"}', "surrogate"),
        ('{"piece": "</s>"}', "own token '</s>'"),
        ('{"piece": "好</s>的"}', "own token '</s>'"),
        ('{"piece": "<0x0A>"}', "own token '<0x0A>'"),
        ('{"piece": "> 人"}', "tears apart"),
        ('{"piece": ' + "9" * 5000 + "}", "a number too long"),
    ],
)
def test_invalid_line_names_file_line_and_reason(tmp_path: Path, line: str, reason: str) -> None:
    path = write(tmp_path / "pieces.jsonl", '{"piece": "好"}\n\n' + line + "\n")
    with pytest.raises(UserError) as caught:
        read_pieces(path, SENTENCEPIECE)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(f"{path}:3: ")
    assert reason in caught.value.problems[0]


def test_invalid_utf8_is_reported(tmp_path: Path) -> None:
    path = write(tmp_path / "pieces.jsonl", b'{"piece": "\xff"}\n')
    with pytest.raises(UserError, match=r"pieces\.jsonl:1: not UTF-8"):
        read_pieces(path, SENTENCEPIECE)


def test_all_invalid_lines_are_reported_up_to_twenty(tmp_path: Path) -> None:
    path = write(tmp_path / "pieces.jsonl", "{}\n" * 25)
    with pytest.raises(UserError) as caught:
        read_pieces(path, SENTENCEPIECE)
    assert len(caught.value.problems) == 21
    assert "5 more" in caught.value.problems[-1]


def test_order_duplicates_and_spaces(tmp_path: Path) -> None:
    content = '\ufeff{"piece": "人工"}\r\n{"piece": "的 人"}\n\n{"piece": "▁人"}\n{"piece": "人工"}'
    listed = read_pieces(write(tmp_path / "pieces.jsonl", content), SENTENCEPIECE)
    assert listed.line_of == {"人工": 1, "的▁人": 2, "▁人": 4}
    assert (listed.num_lines, listed.duplicates) == (4, ["人工"])


def test_byte_level_pieces_have_plain_spaces(tmp_path: Path) -> None:
    listed = read_pieces(write(tmp_path / "pieces.jsonl", '{"piece": "▁moon"}'), BYTE_LEVEL)
    assert list(listed.line_of) == [" moon"]


def test_empty_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no pieces"):
        read_pieces(write(tmp_path / "pieces.jsonl", "\n\n"), SENTENCEPIECE)

"""Reads the JSONL file of new pieces, `{"piece": "人工智能"}` a line, and reports every line that is not one."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from colossal_llama.utils.errors import UserError

SPACE_SYMBOL = "▁"  # how sentencepiece writes a space inside a piece
MAX_LISTED_PROBLEMS = 20


@dataclass
class ListedPieces:
    """The valid content of a pieces file.

    Attributes:
        line_of: piece -> line of its first appearance (1-based), in file order. Spaces are kept as the file has
            them or as `▁`, whichever the reader was asked for.
        num_lines: lines that hold a piece, duplicates counted.
        duplicates: pieces that came again, one entry for each further appearance.
    """

    path: Path
    line_of: dict[str, int] = field(default_factory=dict)
    num_lines: int = 0
    duplicates: list[str] = field(default_factory=list)


def read_pieces(path: Path, space: str, reserved: Iterable[str], torn: Iterable[str] = ()) -> ListedPieces:
    """Reads `path`; blank lines are passed over.

    Args:
        space: the character that stands for a space in this tokenizer's pieces: `▁` for sentencepiece, a plain
            space for byte-level BPE. Both spellings in the file are converted to it.
        reserved: special, added and byte tokens. A text is cut at such a string before pieces are looked for, so
            a piece that contains one is an error.
        torn: strings that the tokenizer's own code tears apart; a piece that contains one is an error.

    Raises:
        UserError: naming every invalid line (the first 20, then their number).
    """
    listed = ListedPieces(path)
    reserved_pattern = _any_of(reserved)
    torn_pattern = _any_of(torn)
    problems = []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"--expand_tokens_file {path}: {error.strerror}") from None
    for number, raw in enumerate(lines, start=1):
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if not raw.strip():
            continue
        piece, reason = _parse_line(raw)
        if reason is None:
            piece = piece.replace(SPACE_SYMBOL, " ")
            reason = _objection(piece)
        if reason is None:
            piece = piece.replace(" ", space)
            if found := reserved_pattern.search(piece):
                reason = f"piece {piece!r} contains the tokenizer's own token {found.group()!r}"
            elif found := torn_pattern.search(piece):
                reason = (
                    f"piece {piece!r} contains {found.group()!r}, which transformers' slow tokenizer tears"
                )
        if reason is not None:
            problems.append(f"{path}:{number}: {reason}")
            continue
        listed.num_lines += 1
        if piece in listed.line_of:
            listed.duplicates.append(piece)
        else:
            listed.line_of[piece] = number
    if problems:
        raise UserError(cap_problems(problems, "invalid lines"))
    if not listed.line_of:
        raise UserError(
            f'--expand_tokens_file {path}: no pieces in it; each line holds {{"piece": "人工智能"}}'
        )
    return listed


def cap_problems(problems: list[str], what: str) -> list[str]:
    """The first 20 of `problems`, and how many more there are."""
    if len(problems) <= MAX_LISTED_PROBLEMS:
        return problems
    rest = len(problems) - MAX_LISTED_PROBLEMS
    return [*problems[:MAX_LISTED_PROBLEMS], f"… and {rest:,} more {what}"]


def _parse_line(raw: bytes) -> tuple[str, str | None]:
    """The piece of a line, or the reason why there is none."""
    try:
        record = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return "", f"not UTF-8 text (byte {error.start} of the line)"
    except (json.JSONDecodeError, RecursionError) as error:
        return "", f"not valid JSON ({getattr(error, 'msg', 'nested too deeply')})"
    if not isinstance(record, dict) or "piece" not in record:
        return "", 'no "piece" in it; write {"piece": "人工智能"}'
    piece = record["piece"]
    if not isinstance(piece, str):
        return "", f'"piece" is {json.dumps(piece, ensure_ascii=False)[:40]}, not a string'
    return piece, None


def _objection(piece: str) -> str | None:
    if not piece:
        return "empty piece"
    if not piece.strip():
        return f"piece {piece!r} is only white space"
    for character in piece:
        category = unicodedata.category(character)
        if category == "Cc":
            return f"piece {piece!r} holds the control character U+{ord(character):04X}"
        if category == "Cs":
            return f"piece {piece!r} holds half of a surrogate pair, U+{ord(character):04X}"
    return None


def _any_of(strings: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the strings; nothing at all when there are none."""
    escaped = [re.escape(string) for string in sorted(set(strings), key=len, reverse=True) if string]
    return re.compile("|".join(escaped) if escaped else r"(?!)")

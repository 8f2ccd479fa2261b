"""Reads the JSONL file of new pieces, one `{"piece": "人工智能"}` per line; reports every other line."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from colossal_llama.utils.errors import UserError
from colossal_llama.utils.messages import cap_problems

SPACE_SYMBOL = "▁"  # how sentencepiece writes a space inside a piece


@dataclass
class ListedPieces:
    """The valid content of a pieces file.

    Attributes:
        line_of: piece -> line of its first appearance (1-based), in file order.
        num_lines: lines that hold a piece, duplicates counted.
        duplicates: pieces that came again, one entry for each further appearance.
    """

    path: Path
    line_of: dict[str, int] = field(default_factory=dict)
    num_lines: int = 0
    duplicates: list[str] = field(default_factory=list)


class PieceRules:
    """What a string must be to become a piece of one tokenizer.

    Args:
        space: the character that stands for a space in this tokenizer's pieces: `▁` for sentencepiece, a
            plain space for byte-level BPE. Both spellings are converted to it.
        reserved: special, added and byte tokens. A text is cut at such a string before pieces are looked for,
            so a piece that contains one is refused.
        torn: strings that the tokenizer's own code tears apart; a piece that contains one is refused.
    """

    def __init__(self, space: str, reserved: Iterable[str], torn: Iterable[str] = ()) -> None:
        self._space = space
        self._reserved = _any_of(reserved)
        self._torn = _any_of(torn)

    def spell(self, piece: str) -> str:
        """The piece as the tokenizer writes it."""
        return piece.replace(SPACE_SYMBOL, " ").replace(" ", self._space)

    def why_not_a_piece(self, piece: str) -> str | None:
        """Why this string, as `spell` returns it, can't be a piece; None when it can."""
        if not piece:
            return "empty piece"
        if not piece.replace(SPACE_SYMBOL, " ").strip():
            return f"piece {piece!r} is only white space"
        for character in piece:
            category = unicodedata.category(character)
            if category == "Cc":
                return f"piece {piece!r} holds the control character U+{ord(character):04X}"
            if category == "Cs":
                return f"piece {piece!r} holds half of a surrogate pair, U+{ord(character):04X}"
        if found := self._reserved.search(piece):
            return f"piece {piece!r} contains the tokenizer's own token {found.group()!r}"
        if found := self._torn.search(piece):
            return (
                f"piece {piece!r} contains {found.group()!r}, which transformers' slow tokenizer tears apart"
            )
        return None


def read_pieces(path: Path, rules: PieceRules) -> ListedPieces:
    """Reads `path`; blank lines are passed over.

    Raises:
        UserError: naming every invalid line (the first 20, then their number).
    """
    listed = ListedPieces(path)
    problems = []
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, raw in enumerate(lines, start=1):
        if not raw.strip():
            continue
        text, reason = _parse_line(raw)
        piece = rules.spell(text)
        reason = reason or rules.why_not_a_piece(piece)
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


def _parse_line(raw: bytes) -> tuple[str, str | None]:
    """The piece of a line, or the reason why there is none."""
    try:
        record = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return "", f"not UTF-8 text (byte {error.start} of the line)"
    except json.JSONDecodeError as error:
        return "", f"not valid JSON ({error.msg})"
    except (ValueError, RecursionError):
        return "", "not valid JSON (a number too long, or nested too deeply)"
    if not isinstance(record, dict) or "piece" not in record:
        return "", 'no "piece" in it; write {"piece": "人工智能"}'
    piece = record["piece"]
    if not isinstance(piece, str):
        return "", f'"piece" is {json.dumps(piece, ensure_ascii=False)[:40]}, not a string'
    return piece, None


def _any_of(strings: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the strings; nothing at all when there are none."""
    escaped = [re.escape(string) for string in sorted(set(strings), key=len, reverse=True) if string]
    return re.compile("|".join(escaped) if escaped else r"(?!)")

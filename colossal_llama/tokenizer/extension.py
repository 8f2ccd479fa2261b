"""What extending a vocabulary did, with the counts and lists to report. Common to both kinds of source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from colossal_llama.tokenizer.pieces_file import ListedPieces
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.files import read_json_object
from colossal_llama.utils.messages import cap_problems

UNREACHABLE_MODES = ("report", "add", "drop", "error")


@dataclass
class VocabularyExtension:
    """The outcome of one extension.

    Attributes:
        kind: "sentencepiece" or "byte-level".
        source_size: number of ids of the source, added tokens included.
        listed: what the pieces file held.
        present: listed pieces that the source has already.
        added: listed pieces that became new ones, in id order.
        characters: characters of new pieces that were no pieces themselves, added after them.
        intermediates: pieces added only so that others can be produced.
        unreachable: added pieces that no running text yields -> the parts that stay apart.
        dropped: listed pieces left out because no running text would yield them -> the parts.
        notes: facts about this source that the user should know.
    """

    kind: str
    source_size: int
    listed: ListedPieces
    present: list[str]
    added: list[str] = field(default_factory=list)
    characters: list[str] = field(default_factory=list)
    intermediates: list[str] = field(default_factory=list)
    unreachable: dict[str, list[str]] = field(default_factory=dict)
    dropped: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def target_size(self) -> int:
        return self.source_size + len(self.added) + len(self.characters) + len(self.intermediates)

    def counts(self) -> dict[str, int]:
        """Everything that can be counted, in the order of the summary table."""
        return {
            "source_vocabulary_size": self.source_size,
            "lines_with_a_piece": self.listed.num_lines,
            "duplicates_in_the_file": len(self.listed.duplicates),
            "pieces_present_already": len(self.present),
            "unreachable_pieces_dropped": len(self.dropped),
            "pieces_added": len(self.added),
            "of_these_unreachable": len(self.unreachable),
            "missing_characters_added": len(self.characters),
            "intermediates_added": len(self.intermediates),
            "target_vocabulary_size": self.target_size,
        }

    def report(self, unreachable_mode: str) -> dict[str, Any]:
        """The content of the report file: counts, then the lists behind them."""
        return {
            "kind": self.kind,
            "unreachable_mode": unreachable_mode,
            "counts": self.counts(),
            "notes": self.notes,
            "unreachable": self.unreachable,
            "dropped": self.dropped,
            "characters": self.characters,
            "intermediates": self.intermediates,
            "present_already": self.present,
            "duplicates": self.listed.duplicates,
        }


def read_new_ids(report: Path) -> range:
    """The ids that an extension added: those after the source's, as its report file counts them.

    Raises:
        UserError: naming the file, when it is no such report, or nothing was added.
    """
    counts = read_json_object(report).get("counts")
    counts = counts if isinstance(counts, dict) else {}
    sizes = [counts.get(f"{name}_vocabulary_size") for name in ("source", "target")]
    if not all(isinstance(size, int) for size in sizes):
        raise UserError(
            f"{report}: does not say which ids are new (`counts` lacks the sizes of the two vocabularies); "
            "it is not a report of init_tokenizer.py"
        )
    if sizes[0] >= sizes[1]:
        raise UserError(f"{report}: says that no piece was added to the {sizes[0]:,} of the source")
    return range(*sizes)


def missing_characters(
    pieces: Iterable[str], vocabulary: Mapping[str, int], added: Iterable[str]
) -> list[str]:
    """Characters of `pieces` that are neither in the vocabulary nor added, in order of appearance."""
    known = set(added)
    missing: dict[str, None] = {}
    for piece in pieces:
        for character in piece:
            if character not in vocabulary and character not in known:
                missing[character] = None
    return list(missing)


def raise_unreachable(listed: ListedPieces, unreachable: Mapping[str, list[str]]) -> None:
    """The error of `--unreachable error`: every unreachable piece with its line."""
    if not unreachable:
        return
    problems = [
        f"{listed.path}:{listed.line_of[piece]}: piece {piece!r} can never be produced: it stays "
        f"{' + '.join(parts)}"
        for piece, parts in unreachable.items()
    ]
    remedy = "use --unreachable add (adds what is missing), drop (leaves them out) or report"
    raise UserError([*cap_problems(problems, "unreachable pieces"), f"--unreachable error: {remedy}"])

"""Adds pieces to a byte-level BPE tokenizer (LLaMA-3) by vocabulary and merges in `tokenizer.json`.

New merges rank below all of the source's, so they act on what the source's merges have left: the source's
tokens are the symbols that new pieces are made of. A piece is formed in every text by the same last merge as
when it is encoded alone (see `reachability`), so each new token needs exactly one merge, and no merge leads
to a token of the source. Texts change only where a new piece, a new character or an intermediate occurs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from colossal_llama.tokenizer.byte_alphabet import byte_token
from colossal_llama.tokenizer.extension import (
    VocabularyExtension,
    missing_characters,
    raise_unreachable,
)
from colossal_llama.tokenizer.pieces_file import ListedPieces, PieceRules
from colossal_llama.tokenizer.reachability import (
    last_parts,
    plan_intermediates,
    unreachable_pieces,
    without_superfluous,
)
from colossal_llama.tokenizer.tokenizer_files import FAST_FILE, TokenizerFiles, steps_of
from colossal_llama.utils.errors import UserError


class ByteLevelSource:
    """A byte-level BPE tokenizer that can be extended.

    Attributes:
        files: its directory.
        vocabulary: token -> id, added tokens included.
        added_tokens: special and other added tokens -> id.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        self.files = files
        self.path = files.directory / FAST_FILE
        self.model = files.fast["model"]
        self._refuse_unsuitable()
        self.added_tokens = files.added_tokens(self.model["vocab"])
        self.vocabulary = {**self.model["vocab"], **self.added_tokens}
        self._check_ids()

    @property
    def rules(self) -> PieceRules:
        """What can be a new piece."""
        return PieceRules(" ", self.added_tokens)

    def extend(self, listed: ListedPieces, unreachable_mode: str) -> VocabularyExtension:
        """See `extend_byte_level`."""
        return extend_byte_level(self, listed, unreachable_mode)

    def vocabulary_files(self, extension: VocabularyExtension) -> dict[str, bytes]:
        """See `byte_level_files`."""
        return byte_level_files(self, extension)

    def symbols_of(self, token: str) -> list[str]:
        """What the source's merges make of a token's bytes, whatever the pre-tokenizer would do to them."""
        if token not in self._symbols:
            self._symbols[token] = [item.value for item in self._bare.model.tokenize(token)]
        return self._symbols[token]

    def pre_tokens(self, text: str) -> list[str]:
        """What the pre-tokenizer cuts `text` into, spelled as tokens; no merge crosses a cut."""
        return [token for token, _ in self._whole.pre_tokenizer.pre_tokenize_str(text)]

    @cached_property
    def _symbols(self) -> dict[str, list[str]]:
        return {}

    @cached_property
    def _whole(self) -> Any:
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.path))

    @cached_property
    def _bare(self) -> Any:
        return bare_tokenizer(self.model)

    def _refuse_unsuitable(self) -> None:
        problems = []
        kind = self.model.get("type")
        steps = steps_of(self.files.fast.get("pre_tokenizer"))
        byte_level = [step for step in steps if step.get("type") == "ByteLevel"]
        if kind != "BPE" or self.model.get("byte_fallback") or not byte_level:
            problems.append(
                f"{self.path}: neither byte-level BPE (a {kind} model, pre-tokenizer "
                f"{', '.join(str(step.get('type')) for step in steps) or 'none'}) nor accompanied by "
                "tokenizer.model; LLaMA-2 tokenizers need their tokenizer.model beside it"
            )
        elif byte_level[0].get("add_prefix_space"):
            problems.append(f"{self.path}: it puts a space before every text, which LLaMA-3's does not")
        if self.files.fast.get("normalizer"):
            normalizer = ", ".join(str(step.get("type")) for step in steps_of(self.files.fast["normalizer"]))
            problems.append(
                f"{self.path}: it rewrites text before it splits it ({normalizer}); only tokenizers without "
                "a normalizer, such as LLaMA-3's, can be extended"
            )
        if self.model.get("continuing_subword_prefix") or self.model.get("end_of_word_suffix"):
            problems.append(f"{self.path}: it marks parts of words, which byte-level BPE of LLaMA-3 does not")
        if problems:
            raise UserError(problems)

    def _check_ids(self) -> None:
        ids = set(self.vocabulary.values())
        if len(ids) != len(self.vocabulary):
            raise UserError(f"{self.path}: two tokens share an id; fix the added tokens")
        gaps = sorted(set(range(len(ids))) - ids)
        if gaps:
            raise UserError(
                f"{self.path}: no token has id {gaps[0]} ({len(gaps):,} gaps below {max(ids)}). New pieces "
                "would have to fill the gaps; give the added tokens consecutive ids"
            )
        for token in self.added_tokens:
            if token not in self.model["vocab"] and self.pre_tokens(token) == [token]:
                # In `model.vocab`, where it has to be to keep its id, it would also match as plain text.
                raise UserError(
                    f"{self.path}: the added token {token!r} is a plain word. Extended, it would be found in "
                    "texts whose special tokens are meant as plain text; give it a name such as <|name|>"
                )


def extend_byte_level(
    source: ByteLevelSource, listed: ListedPieces, unreachable_mode: str
) -> VocabularyExtension:
    """Works out the new vocabulary.

    New ids follow the source's last, special tokens included: listed pieces in file order, then missing
    characters, then intermediates. Characters are made reachable in every mode, by parts of characters where
    there is no other way. Pieces that the pre-tokenizer cuts are never reachable: "add" leaves them out.

    Raises:
        UserError: `unreachable_mode` is "error" and there are unreachable pieces.
    """
    dropped: dict[str, list[str]] = {}
    while True:
        extension, failed = _plan(source, listed, dropped, add=unreachable_mode == "add")
        if unreachable_mode == "error":
            raise_unreachable(listed, failed)
        if unreachable_mode == "report":
            extension.unreachable = failed
            if failed and source.model.get("ignore_merges"):
                extension.notes.append(
                    "an unreachable piece still comes out where it is a whole pre-token by itself (the "
                    "source has ignore_merges)"
                )
        if unreachable_mode in ("report", "error") or not failed:
            break
        # Characters of what is left out are no longer needed, which may leave other pieces without a chain.
        dropped |= failed
    extension.dropped = dropped
    return extension


def _plan(
    source: ByteLevelSource, listed: ListedPieces, dropped: Mapping[str, list[str]], add: bool
) -> tuple[VocabularyExtension, dict[str, list[str]]]:
    """The extension without the `dropped` pieces, and the listed pieces that stay unreachable in it."""
    token_of = {piece: byte_token(piece) for piece in listed.line_of}
    present = [piece for piece, token in token_of.items() if token in source.vocabulary]
    added = [p for p, token in token_of.items() if token not in source.vocabulary and p not in dropped]
    known = {
        character for piece in added for character in piece if byte_token(character) in source.vocabulary
    }
    characters = missing_characters(added, dict.fromkeys(known, 0), added)
    cut = {}
    for piece in added:
        pre_tokens = source.pre_tokens(piece)
        if pre_tokens != [token_of[piece]]:
            cut[piece] = pre_tokens
    joinable = [token_of[piece] for piece in added if piece not in cut]
    single = [byte_token(c) for c in [*characters, *(piece for piece in added if len(piece) == 1)]]
    scores = _scores([*joinable, *map(byte_token, characters)])
    forbidden = source.vocabulary

    def extended_by(unreachable: Mapping[str, list[str]], intermediates: list[str]) -> list[str]:
        more = plan_intermediates(unreachable, source.symbols_of, scores, _next_score, forbidden)
        scores.update(_scores(more, below=len(scores)))
        return [*intermediates, *more]

    intermediates = extended_by(unreachable_pieces(single, source.symbols_of, scores), [])
    failed = unreachable_pieces(joinable, source.symbols_of, scores)
    if add and failed:
        intermediates = extended_by(failed, intermediates)
        failed = unreachable_pieces(joinable, source.symbols_of, scores)
        required = [token for token in [*joinable, *single] if token not in failed]
        intermediates = without_superfluous(intermediates, required, source.symbols_of, scores)
    extension = VocabularyExtension(
        kind="byte-level",
        source_size=len(source.vocabulary),
        listed=listed,
        present=present,
        added=added,
        characters=characters,
        intermediates=intermediates,
        notes=_notes(source, intermediates),
    )
    stuck = {piece: failed[token_of[piece]] for piece in added if token_of[piece] in failed}
    return extension, cut | stuck


def byte_level_files(source: ByteLevelSource, extension: VocabularyExtension) -> dict[str, bytes]:
    """`tokenizer.json` of the extended tokenizer, by its name."""
    import orjson

    tokens = [
        *map(byte_token, extension.added),
        *map(byte_token, extension.characters),
        *extension.intermediates,
    ]
    unreachable = {byte_token(piece) for piece in extension.unreachable}
    joinable = [token for token in tokens if token not in unreachable]
    scores = _scores(joinable)
    merges = [last_parts(source.symbols_of(token), scores) for token in joinable]
    # Added tokens stand in the model's vocabulary too: the tokenizers library numbers any other anew, after
    # the last new piece.
    new_ids = {token: index for index, token in enumerate(tokens, start=len(source.vocabulary))}
    vocabulary = {**source.model["vocab"], **source.added_tokens, **new_ids}
    as_text = bool(source.model["merges"]) and isinstance(source.model["merges"][0], str)
    new_merges = [" ".join(merge) if as_text else merge for merge in merges]
    model = {**source.model, "vocab": vocabulary, "merges": [*source.model["merges"], *new_merges]}
    _check_reachable(model, joinable)
    return {FAST_FILE: orjson.dumps({**source.files.fast, "model": model})}


def bare_tokenizer(model: Mapping[str, Any]) -> Any:
    """A tokenizer of the model alone, which only ever merges: no pre-tokenizer, no whole words looked up."""
    import orjson
    from tokenizers import Tokenizer

    return Tokenizer.from_str(
        orjson.dumps(
            {
                "version": "1.0",
                "truncation": None,
                "padding": None,
                "added_tokens": [],
                "normalizer": None,
                "pre_tokenizer": None,
                "post_processor": None,
                "decoder": None,
                "model": {**model, "ignore_merges": False},
            }
        ).decode()
    )


def _check_reachable(model: Mapping[str, Any], tokens: Iterable[str]) -> None:
    """Asks the tokenizers library itself: every token must come out whole."""
    bare = bare_tokenizer(model)
    wrong = [token for token in tokens if len(bare.model.tokenize(token)) != 1]
    if wrong:
        raise RuntimeError(f"merges do not lead to {len(wrong)} new tokens, such as {wrong[0]!r}")


def _notes(source: ByteLevelSource, intermediates: Iterable[str]) -> list[str]:
    from colossal_llama.tokenizer.byte_alphabet import token_bytes

    partial = 0
    for token in intermediates:
        try:
            token_bytes(token).decode("utf-8")
        except UnicodeDecodeError:
            partial += 1
    notes = []
    if partial:
        notes.append(
            f"{partial:,} intermediates are parts of characters: other characters that begin or end with the "
            "same bytes are split differently than before"
        )
    return notes


def _scores(tokens: Iterable[str], below: int = 0) -> dict[str, float]:
    """Falling scores in the order of the tokens."""
    return {token: -float(rank) for rank, token in enumerate(tokens, start=below)}


def _next_score(score: float) -> float:
    return score - 1.0

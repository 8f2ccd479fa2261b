"""Adds pieces to a sentencepiece BPE tokenizer (LLaMA-2) so that its slow and fast form agree on every text.

Slow: sentencepiece reads `tokenizer.model` and joins the two neighbours whose joined piece has the highest
score, the leftmost on ties. Fast: the tokenizers library reads `tokenizer.json` and joins by the rank of the
pair in a list. The two agree when that list is ordered by score, no two new scores are equal, and every
character is a piece: sentencepiece joins characters that are no pieces, the fast form has already split those
into bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from colossal_llama.tokenizer.extension import (
    VocabularyExtension,
    missing_characters,
    raise_unreachable,
)
from colossal_llama.tokenizer.pieces_file import SPACE_SYMBOL, ListedPieces, PieceRules
from colossal_llama.tokenizer.reachability import plan_intermediates, unreachable_pieces
from colossal_llama.tokenizer.tokenizer_files import (
    CONFIG_FILE,
    FAST_FILE,
    SENTENCEPIECE_FILE,
    SPECIAL_TOKENS_FILE,
    TokenizerFiles,
)
from colossal_llama.utils.errors import UserError

# Values of sentencepiece's ModelProto.SentencePiece.Type and TrainerSpec.ModelType.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BPE_MODEL = 2
MODEL_TYPES = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}

SUPPORTED_CLASSES = (None, "LlamaTokenizer", "LlamaTokenizerFast")


class SentencePieceSource:
    """A sentencepiece BPE tokenizer that can be extended.

    Attributes:
        files: its directory.
        proto: its `ModelProto`.
        vocabulary: piece -> id, every type of piece.
        scores: normal piece -> score; what joins can produce.
        outside: added tokens beyond the sentencepiece vocabulary, in the order of their ids.
        reserved: strings at which a text is cut, or that stand for bytes.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        self.files = files
        self.proto = files.sentencepiece
        self._refuse_unsuitable()
        self.vocabulary = {piece.piece: index for index, piece in enumerate(self.proto.pieces)}
        self.scores = {piece.piece: piece.score for piece in self.proto.pieces if piece.type == NORMAL}
        added = files.added_tokens(self.vocabulary)
        self.outside = self._tokens_outside(added)
        self.reserved = {piece.piece for piece in self.proto.pieces if piece.type != NORMAL} | added.keys()

    @property
    def size(self) -> int:
        """Number of ids, added tokens included."""
        return len(self.proto.pieces) + len(self.outside)

    @property
    def rules(self) -> PieceRules:
        """What can be a new piece.

        With `legacy` off, transformers' slow tokenizer encodes "<unk>" + text and cuts off the tokens of
        "<unk>": a piece that reaches from one into the other would lose text.
        """
        unknown = self.files.special_token("unk_token", "<unk>")
        torn = () if self.files.legacy else (unknown[-1:] + SPACE_SYMBOL,)
        return PieceRules(SPACE_SYMBOL, self.reserved, torn)

    @property
    def skips_prefix_before_spaces(self) -> bool:
        """Whether `tokenizer.json` has Metaspace put the dummy prefix, as transformers converts it.

        Metaspace leaves the prefix out before a text that starts with a space; the slow tokenizer does not.
        """
        fast = self.files.fast or {}
        pre_tokenizer = fast.get("pre_tokenizer") or {}
        return (
            not self.files.legacy
            and not fast.get("normalizer")
            and pre_tokenizer.get("type") == "Metaspace"
            and pre_tokenizer.get("prepend_scheme") == "first"
        )

    @property
    def is_made_from_slow(self) -> bool:
        """Whether transformers makes the fast tokenizer anew at every load, without `tokenizer.json`."""
        return self.files.config.get("add_prefix_space") is not None

    @property
    def has_ambiguous_prefix(self) -> bool:
        """Whether `add_prefix_space` has to be left out for slow and fast tokenizer to agree.

        They understand `null` differently. With `true`, transformers makes a fast one that leaves the prefix
        out before a space (see `skips_prefix_before_spaces`).
        """
        if self.files.legacy or "add_prefix_space" not in self.files.config:
            return False
        stated = self.files.config["add_prefix_space"]
        return self.files.has_harmful_null_prefix if stated is None else bool(stated)

    def _prefix_problems(self) -> list[str]:
        """That one of slow and fast tokenizer puts a space before every text, and the other does not."""
        if self.has_ambiguous_prefix:
            return []
        stated = self.files.config.get("add_prefix_space", True)
        slow = self.proto.normalizer_spec.add_dummy_prefix if self.files.legacy else bool(stated)
        if self.is_made_from_slow:
            fast = bool(stated)
        else:
            fast = slow if self.files.fast is None else self.files.fast_puts_prefix
        if slow == fast:
            return []
        first, second = ("slow", "fast") if slow else ("fast", "slow")
        return [
            f"{self.files.directory / CONFIG_FILE}: the {first} tokenizer puts a space before every text, "
            f"the {second} one does not. To have both do as the slow one, leave add_prefix_space out and "
            f"remove {FAST_FILE}, which is made anew; as the fast one, write "
            f'"legacy": false and "add_prefix_space": {str(fast).lower()}'
        ]

    def extend(self, listed: ListedPieces, unreachable_mode: str) -> VocabularyExtension:
        """See `extend_sentencepiece`."""
        return extend_sentencepiece(self, listed, unreachable_mode)

    def vocabulary_files(self, extension: VocabularyExtension) -> dict[str, bytes]:
        """See `sentencepiece_files`."""
        return sentencepiece_files(self, extension)

    def _refuse_unsuitable(self) -> None:
        path = self.files.directory / SENTENCEPIECE_FILE
        trainer, normalizer = self.proto.trainer_spec, self.proto.normalizer_spec
        problems = []
        if trainer.model_type != BPE_MODEL:
            kind = MODEL_TYPES.get(trainer.model_type, str(trainer.model_type))
            reason = "its pieces carry probabilities that new pieces do not have" if kind == "unigram" else ""
            problems.append(
                f"{path}: a sentencepiece {kind} model{' (' + reason + ')' if reason else ''}; "
                "only BPE models, such as LLaMA-2's, can be extended"
            )
        if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
            problems.append(
                f"{path}: it rewrites text before it splits it (normalizer {normalizer.name or 'unnamed'}, "
                f"remove_extra_whitespaces={normalizer.remove_extra_whitespaces}); transformers' fast LLaMA "
                "tokenizer does not, so the two would disagree"
            )
        if not normalizer.escape_whitespaces or trainer.treat_whitespace_as_suffix:
            problems.append(f"{path}: it does not write spaces as a leading {SPACE_SYMBOL}, as LLaMA's does")
        unused = sum(piece.type == UNUSED for piece in self.proto.pieces)
        if unused:
            problems.append(
                f"{path}: {unused:,} pieces of type UNUSED, which a fast tokenizer cannot express"
            )
        tokenizer_class = self.files.config.get("tokenizer_class")
        if tokenizer_class not in SUPPORTED_CLASSES:
            problems.append(
                f"{self.files.directory / CONFIG_FILE}: tokenizer_class {tokenizer_class}; only "
                "LlamaTokenizer and LlamaTokenizerFast are known to encode as this program assumes"
            )
        problems += self._prefix_problems()
        if problems:
            raise UserError(problems)

    def _tokens_outside(self, added: Mapping[str, int]) -> list[str]:
        """Added tokens with ids after the last piece, which must follow it without a gap."""
        size = len(self.proto.pieces)
        outside = {token: token_id for token, token_id in added.items() if token_id >= size}
        for expected, (token, token_id) in enumerate(outside.items(), start=size):
            if token in self.vocabulary:
                raise UserError(
                    f"{self.files.directory}: added token {token!r} has id {token_id}, but "
                    f"{SENTENCEPIECE_FILE} has it at {self.vocabulary[token]}; save the tokenizer again with "
                    "one id"
                )
            if token_id != expected:
                raise UserError(
                    f"{self.files.directory}: added token {token!r} has id {token_id}, and no token has id "
                    f"{expected}. New pieces would have to fill the gap; give the added tokens consecutive "
                    "ids"
                )
        return list(outside)


def extend_sentencepiece(
    source: SentencePieceSource, listed: ListedPieces, unreachable_mode: str
) -> VocabularyExtension:
    """Works out the new vocabulary.

    New ids follow the source's last: listed pieces in file order, then missing characters, then
    intermediates.

    Raises:
        UserError: `unreachable_mode` is "error" and there are unreachable pieces; or no score is left below
            the source's lowest.
    """
    known = source.vocabulary.keys() | set(source.outside)
    extension = VocabularyExtension(
        kind="sentencepiece",
        source_size=source.size,
        listed=listed,
        present=[piece for piece in listed.line_of if piece in known],
        added=[piece for piece in listed.line_of if piece not in known],
        notes=_notes(source),
    )
    scores = dict(source.scores)
    lowest = _append_scores(scores, extension.added, min(scores.values(), default=0.0))
    unreachable = unreachable_pieces(extension.added, list, scores)
    if unreachable_mode == "error":
        raise_unreachable(listed, unreachable)
    elif unreachable_mode == "drop":
        # What is never produced takes part in no other piece's chain: leaving it out changes nothing else.
        extension.dropped = unreachable
        extension.added = [piece for piece in extension.added if piece not in unreachable]
        scores = dict(source.scores)
        lowest = _append_scores(scores, extension.added, min(scores.values(), default=0.0))
    extension.characters = missing_characters(extension.added, source.vocabulary, extension.added)
    _append_scores(scores, extension.characters, lowest)
    if unreachable_mode == "add":
        extension.intermediates = plan_intermediates(unreachable, list, scores, next_lower_score)
        _append_scores(scores, extension.intermediates, min(scores.values()))
    elif unreachable_mode == "report":
        extension.unreachable = unreachable
    return extension


def sentencepiece_files(source: SentencePieceSource, extension: VocabularyExtension) -> dict[str, bytes]:
    """The files of the extended tokenizer that differ from the source's: file name -> content."""
    new_pieces = [*extension.added, *extension.characters, *extension.intermediates]
    proto = _extended_proto(source, new_pieces)
    files = {SENTENCEPIECE_FILE: proto.SerializeToString(), FAST_FILE: _fast_tokenizer(source, proto)}
    if source.has_ambiguous_prefix:
        files[CONFIG_FILE] = source.files.config_without_prefix_setting()
    return files


def next_lower_score(score: float) -> float:
    """The score of the next piece: 1 lower, or the next float32 where 1 is below its resolution.

    Scores are stored as float32; some tokenizers hold -1e9, whose neighbour is 64 away.
    """
    import numpy as np

    current = np.float32(score)
    lower = np.float32(current - np.float32(1))
    if not lower < current:
        with np.errstate(over="ignore"):
            lower = np.nextafter(current, np.float32(-np.inf))
    if not np.isfinite(lower):
        raise UserError(f"{SENTENCEPIECE_FILE}: its lowest score is {score}; no score is left below it")
    return float(lower)


def _append_scores(scores: dict[str, float], pieces: Iterable[str], lowest: float) -> float:
    """Gives each piece a score below the one before; returns the last."""
    for piece in pieces:
        lowest = next_lower_score(lowest)
        scores[piece] = lowest
    return lowest


def _notes(source: SentencePieceSource) -> list[str]:
    notes = []
    pieces = [piece for piece in source.scores if len(piece) > 1]
    if tied := len(pieces) - len({source.scores[piece] for piece in pieces}):
        notes.append(
            f"{tied:,} pieces of the source share their score with another: where those meet, the source's "
            "own slow and fast tokenizers may split text differently, and so will the new ones"
        )
    characterless = sum(any(character not in source.scores for character in piece) for piece in pieces)
    if characterless:
        notes.append(
            f"{characterless:,} pieces of the source hold characters that are no pieces: the source's own "
            "slow and fast tokenizers split them differently"
        )
    if source.skips_prefix_before_spaces:
        notes.append(
            f"the source's {FAST_FILE} leaves out the dummy prefix before a text that starts with a space, "
            f"{SENTENCEPIECE_FILE} does not; the new {FAST_FILE} has it too"
        )
    if source.has_ambiguous_prefix:
        stated = json.dumps(source.files.config["add_prefix_space"])
        notes.append(
            f"'add_prefix_space: {stated}' in the source's {CONFIG_FILE} means one thing to the fast "
            "tokenizer and another to the slow one; it is left out of the new one, and both put the prefix"
        )
    if source.outside:
        notes.append(
            f"{len(source.outside):,} added tokens ({', '.join(source.outside[:5])}) keep their ids from "
            f"{len(source.proto.pieces):,} on; new pieces follow them"
        )
    return notes


def _extended_proto(source: SentencePieceSource, new_pieces: list[str]) -> Any:
    proto = type(source.proto)()
    proto.CopyFrom(source.proto)
    for token in source.outside:
        # Holds the id: sentencepiece never produces a control piece from text, transformers still cuts it
        # out.
        proto.pieces.add(piece=token, score=0.0, type=CONTROL)
    scores: dict[str, float] = {}
    _append_scores(scores, new_pieces, min(source.scores.values(), default=0.0))
    for piece, score in scores.items():
        proto.pieces.add(piece=piece, score=score)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return proto


def _fast_tokenizer(source: SentencePieceSource, proto: Any) -> bytes:
    """`tokenizer.json` for `proto`: the source's with a new vocabulary, or one made from its settings."""
    import orjson

    fast = source.files.fast
    if fast is None or source.is_made_from_slow:
        fast = _new_fast_tokenizer(source)
    else:
        _check_fast_matches(source, fast)
        if source.skips_prefix_before_spaces:
            fast = {**fast, **_prefix_steps("first")}
    vocabulary = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    merges = merges_by_score({piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL})
    return orjson.dumps({**fast, "model": {**fast["model"], "vocab": vocabulary, "merges": merges}})


def merges_by_score(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """The pairs that join to a piece, in the order in which sentencepiece would join them.

    Within one piece, and among pieces of equal score, longer left parts go first, as in transformers'
    conversion.
    """
    merges = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                merges.append((-score, -cut, cut - len(piece), left, right))
    merges.sort(key=lambda merge: merge[:3])
    return [(left, right) for *_, left, right in merges]


def _check_fast_matches(source: SentencePieceSource, fast: Mapping[str, Any]) -> None:
    path = source.files.directory / FAST_FILE
    model = fast["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback", False):
        raise UserError(
            f"{path}: not the fast form of {SENTENCEPIECE_FILE} (a {model.get('type')} model, byte_fallback "
            f"{model.get('byte_fallback')}); remove the file and it is made anew"
        )
    vocabulary = model["vocab"]
    for piece, token_id in source.vocabulary.items():
        if vocabulary.get(piece) != token_id:
            raise UserError(
                f"{path}: token {piece!r} has id {vocabulary.get(piece)}, but {token_id} in "
                f"{SENTENCEPIECE_FILE}; remove the file and it is made anew"
            )


def _new_fast_tokenizer(source: SentencePieceSource) -> dict[str, Any]:
    """An empty `tokenizer.json` that does what transformers' slow tokenizer does with this configuration.

    With `legacy` on, sentencepiece itself puts the dummy prefix before every stretch between special tokens;
    with it off, transformers puts one before the text.
    """
    import orjson
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    config = source.files.config
    add_prefix_space = config.get("add_prefix_space", True)
    tokenizer = Tokenizer(
        models.BPE(unk_token=source.proto.trainer_spec.unk_piece, fuse_unk=True, byte_fallback=True)
    )
    puts_prefix = add_prefix_space
    if source.files.legacy:
        puts_prefix = source.proto.normalizer_spec.add_dummy_prefix
        steps = [normalizers.Replace(" ", SPACE_SYMBOL)]
        if puts_prefix:
            steps.insert(0, normalizers.Prepend(SPACE_SYMBOL))
        tokenizer.normalizer = normalizers.Sequence(steps)
    elif not puts_prefix:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE_SYMBOL, prepend_scheme="never", split=False)
    decoding = [decoders.Replace(SPACE_SYMBOL, " "), decoders.ByteFallback(), decoders.Fuse()]
    if add_prefix_space:
        decoding.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(decoding)
    fast = orjson.loads(tokenizer.to_str())
    if not source.files.legacy and puts_prefix:
        fast |= _prefix_steps("first")
    fast["added_tokens"] = _added_token_entries(source)
    is_normalized = any(entry["normalized"] for entry in fast["added_tokens"])
    if source.files.legacy and puts_prefix and add_prefix_space is None and is_normalized:
        # The source's fast form, which transformers makes without the prefix, finds such words anywhere;
        # after Prepend, which changes what is searched for, one that follows another is not found.
        fast |= _prefix_steps("always")
    fast["post_processor"] = _post_processor(source)
    return fast


def _prefix_steps(prepend_scheme: str) -> dict[str, Any]:
    """Normalizer and pre-tokenizer that put the dummy prefix before a text, whatever it starts with.

    A normalizer sees the stretches between special tokens one by one, not which is the first; Metaspace does,
    but leaves a stretch alone that starts with the character it puts there. So spaces are written `▁` before,
    Metaspace puts a space, the only one there is, and another one writes that `▁` too:

        (start) " a"  →  "▁a"  →  " ▁a"  →  "▁▁a"
        </s>    " a"  →  "▁a"  →   "▁a"  →   "▁a"

    Args:
        prepend_scheme: Metaspace's: "first", as drawn, or "always", before every stretch.
    """
    prefix = {"type": "Metaspace", "replacement": " ", "prepend_scheme": prepend_scheme, "split": False}
    spell = {"type": "Metaspace", "replacement": SPACE_SYMBOL, "prepend_scheme": "never", "split": False}
    return {
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_SYMBOL},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [prefix, spell]},
    }


def _added_token_entries(source: SentencePieceSource) -> list[dict[str, Any]]:
    ids = source.files.added_tokens(source.vocabulary)
    # transformers' slow tokenizer adds these by itself.
    for name, default in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")):
        token = source.files.special_token(name, default)
        if token in source.vocabulary:
            ids.setdefault(token, source.vocabulary[token])
    for piece in source.proto.pieces:
        if piece.type in (CONTROL, USER_DEFINED):
            ids.setdefault(piece.piece, source.vocabulary[piece.piece])
    settings = source.files.added_token_settings()
    user_defined = {piece.piece for piece in source.proto.pieces if piece.type == USER_DEFINED}
    legacy_words = _legacy_plain_words(source)
    entries = []
    for token, token_id in sorted(ids.items(), key=lambda item: item[1]):
        entry = {"single_word": False, "lstrip": False, "rstrip": False}
        plain = token in user_defined or token in legacy_words
        entry |= {"normalized": token in legacy_words, "special": not plain}
        entry |= {key: value for key, value in settings.get(token, {}).items() if key in entry}
        entries.append({"id": token_id, "content": token, **entry})
    return entries


def _legacy_plain_words(source: SentencePieceSource) -> set[str]:
    """Tokens that only `added_tokens.json` names: words, not special tokens."""
    path = source.files.directory / "added_tokens.json"
    if not path.exists() or "added_tokens_decoder" in source.files.config:
        return set()
    from colossal_llama.utils.files import read_json

    return set(read_json(path)) - set(source.files.special_token_strings())


def _post_processor(source: SentencePieceSource) -> dict[str, Any] | None:
    """Puts BOS and EOS where the configuration wants them, in `tokenizer.json`'s terms."""
    import orjson
    from tokenizers import processors

    config = source.files.config
    vocabulary = {
        **source.vocabulary,
        **{t: len(source.vocabulary) + i for i, t in enumerate(source.outside)},
    }
    bos = source.files.special_token("bos_token", "<s>") if config.get("add_bos_token", True) else None
    eos = source.files.special_token("eos_token", "</s>") if config.get("add_eos_token", False) else None
    for name, token in (("bos_token", bos), ("eos_token", eos)):
        if token is not None and token not in vocabulary:
            raise UserError(
                f"{source.files.directory / SPECIAL_TOKENS_FILE}: {name} {token!r} is not in the vocabulary"
            )
    one = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
    two = [*one, *([f"{bos}:1"] if bos else []), "$B:1", *([f"{eos}:1"] if eos else [])]
    processor = processors.TemplateProcessing(
        single=one, pair=two, special_tokens=[(token, vocabulary[token]) for token in {bos, eos} - {None}]
    )
    return orjson.loads(processor.__getstate__())

"""Tries out an engine before it is used: every piece of the vocabulary, and hard strings.

An engine may refuse a `tokenizer.json`, or misread it, and read another one that means the same. `find_form`
tries several and takes the first that passes, so that they mean the same need not be proved.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from colossal_llama.dataset.engines import ENGINES, REFERENCE
from colossal_llama.dataset.engines.base import Engine
from colossal_llama.dataset.engines.checked import (
    CheckedEngine,
    EngineDifference,
    NotForThisTokenizer,
    raise_difference,
)
from colossal_llama.tokenizer.pieces_file import SPACE_SYMBOL
from colossal_llama.tokenizer.token_bytes import TokenBytes
from colossal_llama.utils.registry import look_up

TRIAL_FORMAT = 1  # raised when other texts are tried
BATCH_TEXTS = 1024
PIECES_PER_TEXT = 24
LONG_RUN = 3000

HARD_STRINGS = [
    *("", " ", "  ", "   ", " A", "  A", "A ", "A  B", "\n", "\n\n", " \n", "\n ", "\r\n", "\t", "\tA", "\0"),
    *("A\u00a0B", "\u3000人", "\u200b", "\ufeffA", "e\u0301", "é", "ﬁ", "Å", "\u212b", "\u1e9b\u0323"),
    *(
        "👩\u200d👩\u200d👧",
        "🏳\ufe0f\u200d🌈",
        "ابجد",
        "שלום",
        "हिन्दी",
        "한국어",
        "\u1112\u1161\u11ab",
        "ไทย",
    ),
    *("0", "12", "123", "1234", "1,234.56", "٣٤٥", "½", "²", "don't", "DON'T", "we'LL go", "x'sy", "a_b-c.d"),
    *("<s>", "</s>", "<unk>", "<0x41>", "<|eot_id|>", "<|begin_of_text|>", "[INST]", "<s></s> A<s>B"),
    *(
        "def f(x):\n    return x\n\n\n",
        "a\n\n\n  b\n",
        "  \n  \n",
        "http://a.b/c?d=e&f#g",
        "...!!!???",
        "\u2028A",
    ),
]


def hard_texts() -> Iterator[str]:
    """The same texts for every tokenizer: special strings, runs, all planes of Unicode, mixtures."""
    yield from HARD_STRINGS
    for run in ("a", "A", " ", "\n", "0", "人", "é", "🌊", "ab", "\0", "-", " a", "\t", "=-", "'s"):
        for length in (2, 3, 7, 8, 15, 16, 17, 63, 64, 65, 127, 300, LONG_RUN):
            yield run * length
            yield f"x{run * min(length, 300)} y"
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    basic, others = characters[: 0x10000 - 0x800], characters[0x10000 - 0x800 :]
    for start in range(0, len(basic), 64):
        yield "".join(basic[start : start + 64])
        yield "a".join(basic[start : start + 64 : 4])
    for start in range(0, len(others), 64 * 8):
        yield "".join(others[start : start + 64])
    generator = random.Random(0)
    for _ in range(2000):
        parts = generator.choices(HARD_STRINGS, k=generator.randint(2, 6))
        parts.insert(generator.randrange(len(parts)), generator.choice(basic))
        yield "".join(parts)


def piece_texts(table: TokenBytes) -> Iterator[str]:
    """Every piece that is text by itself, alone and among others."""
    pieces = [content.decode(errors="ignore") for content in table.contents]
    pieces = [piece for piece in dict.fromkeys(pieces) if piece]
    yield from pieces
    generator = random.Random(0)
    generator.shuffle(pieces)
    for start in range(0, len(pieces), PIECES_PER_TEXT):
        yield "".join(pieces[start : start + PIECES_PER_TEXT])


def forms_of(serialised: str) -> Iterator[str]:
    """The tokenizer itself, then ones that may mean the same by plain text, each as a `tokenizer.json`."""
    yield serialised
    value: dict[str, Any] = {**json.loads(serialised), "added_tokens": [], "post_processor": None}
    yield json.dumps(value, ensure_ascii=False)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_SYMBOL}
    prepend = {"type": "Prepend", "prepend": SPACE_SYMBOL}
    if TokenBytes.of_json(serialised).writes_spaces_as_symbol:  # type: ignore[union-attr]
        for steps in ([prepend, replace], [replace]):
            normalizer = {"type": "Sequence", "normalizers": steps}
            yield json.dumps({**value, "normalizer": normalizer, "pre_tokenizer": None}, ensure_ascii=False)


def compare(engine: CheckedEngine, texts: Iterable[str]) -> int:
    """Number of texts on which an engine was compared; `EngineDifference` for the first that differs."""
    taken = (text for text in texts if not engine.is_left_out(text))
    count = 0
    while batch := list(islice(taken, BATCH_TEXTS)):
        count += len(batch)
        for text, found, wanted in zip(
            batch, engine.engine.encode(batch), engine.reference.encode(batch), strict=True
        ):
            raise_difference(engine.name, text, found, wanted)
    return count


def find_form(name: str, tokenizer_json: str, directory: Path) -> tuple[str, int]:
    """The file that an engine reads for a tokenizer, and on how many texts it was compared.

    Args:
        directory: where a file of another form is written.

    Raises:
        EngineDifference: it made other ids of a text, in the form that came furthest.
        NotForThisTokenizer: it reads no form of it.
    """
    reference = look_up(ENGINES, REFERENCE)(tokenizer_json)
    # Whether it can be used at all does not depend on the form.
    table = CheckedEngine.of_file(name, _Nothing(), reference, tokenizer_json).table
    serialised = Path(tokenizer_json).read_text(encoding="utf-8")
    refusal: Exception | None = None
    furthest: tuple[int, EngineDifference] | None = None
    for number, form in enumerate(forms_of(serialised)):
        path = Path(tokenizer_json)
        if number:
            path = directory / f"{path.stem}-{name}.json"
            path.write_text(form, encoding="utf-8")
        try:
            engine = CheckedEngine.of_file(name, _load(name, str(path)), reference, tokenizer_json)
        except NotForThisTokenizer as error:
            refusal = refusal or error
            continue
        num_texts = 0
        try:
            for texts in (hard_texts(), piece_texts(table)):
                num_texts += compare(engine, texts)
        except EngineDifference as difference:
            if furthest is None or num_texts > furthest[0]:
                furthest = num_texts, difference
            continue
        return str(path), num_texts
    if furthest is not None:
        raise furthest[1]
    assert refusal is not None
    raise refusal


class _Nothing:
    """An engine that is never asked."""

    def encode(self, texts: Sequence[str]) -> Iterable[list[int]]:
        raise AssertionError


def _load(name: str, tokenizer_json: str) -> Engine:
    try:
        return look_up(ENGINES, name)(tokenizer_json)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of a Rust library is no `Exception`
        raise NotForThisTokenizer(f"{name} can't read it: {error}") from None

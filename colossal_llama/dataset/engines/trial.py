"""Tries out an engine before it is used: every piece of the vocabulary, and hard strings.

An engine may refuse a `tokenizer.json`, or misread it, and read another one that means the same. `find_form`
tries several and takes the first that passes, so that they mean the same need not be proved.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import orjson

from colossal_llama.dataset.engines import ENGINES, load_reference
from colossal_llama.dataset.engines.base import Engine
from colossal_llama.dataset.engines.checked import (
    CheckedEngine,
    EngineDifference,
    NotForThisTokenizer,
    raise_difference,
    read_vocabulary,
)
from colossal_llama.tokenizer.pieces_file import SPACE_SYMBOL
from colossal_llama.tokenizer.token_bytes import TokenBytes
from colossal_llama.utils.registry import look_up

TRIAL_FORMAT = 2  # raised when other texts are tried
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
    """The same texts for every tokenizer: runs, all planes of Unicode, mixtures of `HARD_STRINGS`."""
    for run in ("a", "A", " ", "\n", "0", "人", "é", "🌊", "ab", "\0", "-", " a", "\t", "=-", "'s"):
        for length in (2, 3, 7, 8, 15, 16, 17, 63, 64, 65, 127, 300, LONG_RUN):
            yield run * length
            yield f"x{run * min(length, 300)} y"
    basic = [*range(0xD800), *range(0xE000, 0x10000)]
    for start in range(0, len(basic), 64):
        yield "".join(map(chr, basic[start : start + 64]))
        yield "a".join(map(chr, basic[start : start + 64 : 4]))
    for start in range(0x10000, 0x110000, 64 * 8):
        yield "".join(map(chr, range(start, start + 64)))
    generator = random.Random(0)
    for _ in range(2000):
        parts = generator.choices(HARD_STRINGS, k=generator.randint(2, 6))
        parts.insert(generator.randrange(len(parts)), chr(generator.choice(basic)))
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


def forms_of(tokenizer: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Other forms of a `tokenizer.json` that may mean the same by plain text, beside the tokenizer itself."""
    value = {**tokenizer, "added_tokens": [], "post_processor": None}
    yield value
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_SYMBOL}
    prepend = {"type": "Prepend", "prepend": SPACE_SYMBOL}
    splitting = orjson.dumps([tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")]).decode()
    if SPACE_SYMBOL in splitting:
        for steps in ([prepend, replace], [replace]):
            normalizer = {"type": "Sequence", "normalizers": steps}
            yield {**value, "normalizer": normalizer, "pre_tokenizer": None}


def compare(engine: CheckedEngine, texts: Iterable[str]) -> int:
    """Number of texts on which an engine was compared; `EngineDifference` for the first that differs."""
    taken = (text for text in texts if not engine.is_left_out(text))
    num_texts = 0
    while batch := list(islice(taken, BATCH_TEXTS)):
        num_texts += len(batch)
        for text, found, wanted in zip(
            batch, engine.engine.encode(batch), engine.reference.encode(batch), strict=True
        ):
            raise_difference(engine.name, text, found, wanted)
    return num_texts


def write_form(name: str, tokenizer_json: str, number: int, directory: Path) -> Path | None:
    """The file that an engine reads: the tokenizer's own for form 0, else one that is written for it.

    Returns:
        None where there is no form of that number.
    """
    path = Path(tokenizer_json)
    if number == 0:
        return path
    forms = list(forms_of(orjson.loads(path.read_bytes())))
    if not 0 < number <= len(forms):
        return None
    form = forms[number - 1]
    path = directory / f"{path.stem}-{name}.json"
    path.write_bytes(orjson.dumps(form))
    return path


def find_form(name: str, tokenizer_json: str, directory: Path) -> tuple[int, int]:
    """The number of the form in which an engine reads a tokenizer, and on how many texts it was compared.

    Args:
        directory: where a file of another form is written; see `write_form`.

    Raises:
        EngineDifference: it made other ids of a text, in the form that came furthest.
        NotForThisTokenizer: it reads no form of it.
    """
    reference = load_reference(tokenizer_json)
    table, words = read_vocabulary(Path(tokenizer_json).read_bytes())  # these do not depend on the form
    refusal: Exception | None = None
    furthest: tuple[int, EngineDifference] | None = None
    for number in count():
        path = write_form(name, tokenizer_json, number, directory)
        if path is None:
            break
        try:
            engine = CheckedEngine(name, _load(name, str(path)), reference, table, words)
        except NotForThisTokenizer as error:
            refusal = refusal or error
            continue
        num_texts = 0
        try:
            with _all_cores():
                # A form that does not fit mostly fails on the first of them.
                for texts in (HARD_STRINGS, hard_texts(), piece_texts(table)):
                    num_texts += compare(engine, texts)
        except EngineDifference as difference:
            if furthest is None or num_texts > furthest[0]:
                furthest = num_texts, difference
            continue
        return number, num_texts
    if furthest is not None:
        raise furthest[1]
    assert refusal is not None
    raise refusal


@contextlib.contextmanager
def _all_cores() -> Iterator[None]:
    """Lets the reference encode a batch on all cores, as long as nothing else is to do."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "true"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _load(name: str, tokenizer_json: str) -> Engine:
    try:
        return look_up(ENGINES, name)(tokenizer_json)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of a Rust library is no `Exception`
        raise NotForThisTokenizer(f"{name} can't read it: {error}") from None

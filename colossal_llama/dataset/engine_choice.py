"""Which engine encodes a preparation: what `--tokenizer_engine` asks for, if its ids are the tokenizer's."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from platform import machine
from typing import Any

import numpy as np

from colossal_llama.corpus.jsonl import Shard, read_records
from colossal_llama.corpus.records import BadRecord, parse_object
from colossal_llama.dataset.encoders import find_encoder
from colossal_llama.dataset.encoders.base import EncoderSpec, RecordEncoder
from colossal_llama.dataset.engines import REFERENCE, TESTED_VERSIONS, installed_version
from colossal_llama.dataset.engines.checked import EngineDifference, NotForThisTokenizer
from colossal_llama.dataset.engines.trial import TRIAL_FORMAT, find_form, write_form
from colossal_llama.utils.console import log, warn
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.files import read_json, write_json

SAMPLED_SHARDS = 32
SAMPLED_RECORDS = 16  # of each
SAMPLED_CHARACTERS = 1 << 18  # of all


def find_candidate(asked: str) -> str:
    """The engine to try, by what is installed; raises `UserError` for one that is not."""
    if asked == "auto":
        return next((n for n, tested in TESTED_VERSIONS.items() if installed_version(n) in tested), REFERENCE)
    if asked == REFERENCE or asked not in TESTED_VERSIONS:
        return asked
    found, tested = installed_version(asked), TESTED_VERSIONS[asked]
    if found is None:
        raise UserError(
            f"--tokenizer_engine {asked}: the package is not installed; pip install {asked}=={tested[-1]}, "
            "or use --tokenizer_engine hf, which gives the same output"
        )
    if found not in tested:
        warn(f"--tokenizer_engine {asked}: version {found} is not tested here ({', '.join(tested)} is)")
    return asked


def packages_of(engine: str) -> list[str]:
    """What has to be installed, in one version, wherever the engine works."""
    return [engine] if engine in TESTED_VERSIONS else []


def settle_engine(engine: str, spec: EncoderSpec, shards: Sequence[Shard]) -> EncoderSpec:
    """The spec with this engine, or with the reference where a trial finds other ids; the log says which."""
    if engine == REFERENCE:
        return spec
    if not find_encoder(spec.kind).uses_engine:
        log("Tokenizer engine: hf (with --chat_template, the tokenizer's own library encodes)")
        return spec
    found = installed_version(engine) or ""
    name = f"{engine} {found}".strip()
    try:
        path, num_texts = _find_form(engine, found, spec)
        fast = replace(spec, engine=engine, engine_version=found, engine_json=path)
        num_records = _compare_sample(fast, spec, shards)
    except (EngineDifference, NotForThisTokenizer) as error:
        warn(f"{engine} is not used for this tokenizer, hf is: {error}")
        return spec
    log(f"Tokenizer engine: {name} (the ids of hf on {num_texts:,} texts and {num_records:,} records)")
    return fast


def _find_form(engine: str, found: str, spec: EncoderSpec) -> tuple[str, int]:
    """As `find_form`; a trial that was passed once is not repeated for the same tokenizer and versions."""
    source = Path(spec.tokenizer_json)
    key = f"{engine}-{found}_tokenizers-{version('tokenizers')}_{machine()}_{TRIAL_FORMAT}_{source.stem}"
    record = _cache_dir() / f"{key}.json"
    with suppress(UserError, OSError, TypeError, KeyError):  # a record that is not there, or damaged
        passed = read_json(record)
        path = write_form(engine, spec.tokenizer_json, passed["form"], source.parent)
        if path is not None and _digest(path) == passed["sha256"]:
            return str(path), passed["texts"]
    form, num_texts = find_form(engine, spec.tokenizer_json, source.parent)
    path = write_form(engine, spec.tokenizer_json, form, source.parent)
    assert path is not None
    with suppress(UserError, OSError):  # where it can't be kept, the next run tries again
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, {"form": form, "sha256": _digest(path), "texts": num_texts})
    return str(path), num_texts


def _cache_dir() -> Path:
    """Of this user, on this machine or for all that share a home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    home = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return home / "colossal_llama" / "engine_trials"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _compare_sample(fast: EncoderSpec, slow: EncoderSpec, shards: Sequence[Shard]) -> int:
    """Encodes some of the input with both; returns the number of records."""
    encoder = find_encoder(fast.kind)
    ours, theirs = encoder(fast), encoder(slow)
    num_records = num_characters = 0
    step = -(-len(shards) // SAMPLED_SHARDS)
    for shard in shards[:: max(step, 1)]:
        # What is wrong with the input is said when it is encoded.
        with suppress(UserError):
            for record in islice(_read_good(shard, ours), SAMPLED_RECORDS):
                num_records += 1
                num_characters += record.num_characters
                _compare_record(fast.engine, record, ours, theirs)
                if num_characters >= SAMPLED_CHARACTERS:
                    return num_records
    return num_records


def _read_good(shard: Shard, encoder: RecordEncoder) -> Iterator[Any]:
    for line in read_records(shard, encoder.fields):
        with suppress(BadRecord):
            yield encoder.parse(line if isinstance(line, dict) else parse_object(line))


def _compare_record(engine: str, record: Any, ours: RecordEncoder, theirs: RecordEncoder) -> None:
    (found,), (wanted,) = ours.encode([record]), theirs.encode([record])
    are_equal = len(found.pieces) == len(wanted.pieces) and all(
        map(np.array_equal, found.pieces, wanted.pieces)
    )
    if not are_equal or found.num_tokens != wanted.num_tokens:
        raise EngineDifference(engine, record.text, "other tokens or labels")

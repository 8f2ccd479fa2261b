"""Which engine encodes a preparation: what `--tokenizer_engine` asks for, if its ids are the tokenizer's."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from platform import machine
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from colossal_llama.dataset.workers import Workers

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


@dataclass(frozen=True)
class Trial:
    """A trial that an engine passed: the file that it reads, and on how many texts it made the same ids."""

    engine_json: str
    num_texts: int


def recall_trial(engine: str, tokenizer_json: str) -> Trial | None:
    """The trial that this engine passed in an earlier run, for the same tokenizer and versions."""
    if engine == REFERENCE:
        return None
    with suppress(UserError, OSError, TypeError, KeyError):  # a record that is not there, or damaged
        passed = read_json(_record_path(engine, tokenizer_json))
        path = write_form(engine, tokenizer_json, passed["form"], Path(tokenizer_json).parent)
        if path is not None and _digest(path) == passed["sha256"]:
            return Trial(str(path), passed["texts"])
    return None


def settle_engine(
    engine: str, spec: EncoderSpec, shards: Sequence[Shard], workers: Workers, trial: Trial | None = None
) -> EncoderSpec:
    """The spec with this engine, or with the reference where a trial finds other ids; the log says which.

    Args:
        workers: one of them, which has loaded both, compares a sample of the input.
        trial: that of an earlier run, which is not repeated.
    """
    if engine == REFERENCE:
        return spec
    if not find_encoder(spec.kind).uses_engine:
        log("Tokenizer engine: hf (with --chat_template, the tokenizer's own library encodes)")
        return spec
    found = installed_version(engine) or ""
    name = f"{engine} {found}".strip()
    try:
        trial = trial or _try_engine(engine, spec.tokenizer_json)
        fast = replace(spec, engine=engine, engine_version=found, engine_json=trial.engine_json)
        sample = Sample(fast, tuple(shards[:: max(-(-len(shards) // SAMPLED_SHARDS), 1)]))
        ((_, (num_records, difference)),) = workers.run(compare_sample, [sample])
    except (EngineDifference, NotForThisTokenizer) as error:
        difference = str(error)
    if difference:
        warn(f"{engine} is not used for this tokenizer, hf is: {difference}")
        return spec
    log(f"Tokenizer engine: {name} (the ids of hf on {trial.num_texts:,} texts and {num_records:,} records)")
    return fast


def _try_engine(engine: str, tokenizer_json: str) -> Trial:
    """As `find_form`; a trial that was passed is recorded for later runs."""
    directory = Path(tokenizer_json).parent
    form, num_texts = find_form(engine, tokenizer_json, directory)
    path = write_form(engine, tokenizer_json, form, directory)
    assert path is not None
    with suppress(UserError, OSError):  # where it can't be kept, the next run tries again
        record = _record_path(engine, tokenizer_json)
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, {"form": form, "sha256": _digest(path), "texts": num_texts})
    return Trial(str(path), num_texts)


def _record_path(engine: str, tokenizer_json: str) -> Path:
    versions = f"{engine}-{installed_version(engine) or ''}_tokenizers-{version('tokenizers')}_{machine()}"
    return _cache_dir() / f"{versions}_{TRIAL_FORMAT}_{Path(tokenizer_json).stem}.json"


def _cache_dir() -> Path:
    """Of this user, on this machine or for all that share a home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    home = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return home / "colossal_llama" / "engine_trials"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass(frozen=True)
class Sample:
    """Shards of which some records are encoded with an engine and with the reference."""

    spec: EncoderSpec
    shards: tuple[Shard, ...]


def compare_sample(sample: Sample) -> tuple[int, str]:
    """The number of records that were compared, and the difference that was found, "" for none."""
    encoder = find_encoder(sample.spec.kind)
    reference = replace(sample.spec, engine=REFERENCE, engine_version="", engine_json="")
    num_records = num_characters = 0
    try:
        ours, theirs = encoder(sample.spec), encoder(reference)
        for shard in sample.shards:
            # What is wrong with the input is said when it is encoded.
            with suppress(UserError):
                for record in islice(_read_good(shard, ours), SAMPLED_RECORDS):
                    num_records += 1
                    num_characters += record.num_characters
                    _compare_record(sample.spec.engine, record, ours, theirs)
                    if num_characters >= SAMPLED_CHARACTERS:
                        return num_records, ""
    except (EngineDifference, NotForThisTokenizer) as error:
        return num_records, str(error)
    return num_records, ""


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

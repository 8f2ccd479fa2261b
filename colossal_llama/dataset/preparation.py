"""Data preparation from JSONL directories to packed bins, for pre-training and SFT alike.

    input files ─▶ shards ─▶ encode_shard ─▶ cache/shards ─▶ deal to bins ─▶ write_bin ─▶ arrow/, jsonl/

`encode_shard` and `write_bin` run in the workers; what is between them is decided here, on lengths alone.
`stats.json` is written last: where it is, the output is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from colossal_llama.dataset.bins import BinTask, deal_documents, write_bin
from colossal_llama.dataset.jsonl import Shard, find_input_files, make_shards
from colossal_llama.dataset.shards import (
    CACHE_FORMAT,
    MAX_LISTED_BAD_RECORDS,
    ShardSummary,
    ShardTask,
    encode_shard,
    read_table,
    remove_stale_shards,
)
from colossal_llama.dataset.statistics import (
    BinCounts,
    Counts,
    draw_lengths,
    format_statistics,
    make_statistics,
)
from colossal_llama.dataset.tokenization import EncoderSpec, load_plain_backend
from colossal_llama.dataset.workers import Workers, open_workers
from colossal_llama.tokenizer.fingerprint import tokenizer_fingerprint
from colossal_llama.tokenizer.tokenizer_files import check_settings
from colossal_llama.utils.console import log, progress_bar
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.files import locked_directory, naming, read_json, remove_path, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER_NAME = re.compile(r"[0-9a-f]{24}\.json")
PART_NAME = re.compile(r"part-\d{5}(\.jsonl)?")
ASIDE_NAME = re.compile(r"\.part-\d{5}(\.jsonl)?(\.[0-9a-f]{16})?\.tmp")


@dataclass(frozen=True)
class Settings:
    """What the user asked for; `splice` packs several documents into a row, no `num_workers` is all cores."""

    data_input_dirs: Sequence[Path | str]
    tokenizer_dir: Path
    data_output_dirs: Path
    data_arrow_output_dir: Path
    max_length: int
    num_bins: int
    seed: int
    splice: bool
    skip_bad_records: bool = False
    overwrite: bool = False
    num_workers: int | None = 1
    ray_address: str = "none"
    recursive: bool = False

    @property
    def cache_dir(self) -> Path:
        return self.data_output_dirs / "cache"

    @property
    def jsonl_dir(self) -> Path:
        return self.data_output_dirs / "jsonl"

    @property
    def stats_path(self) -> Path:
        return self.data_output_dirs / "stats.json"

    @property
    def run_file(self) -> Path:
        """Says which run the output belongs to."""
        return self.cache_dir / "run.json"


@dataclass(frozen=True)
class TokenizerInfo:
    """What the bins say about the tokenizer that made them."""

    json_path: Path
    fingerprint: str
    vocab_size: int


def make_settings(args: Namespace, splice: bool) -> Settings:
    """The settings that the shared flags ask for."""
    return Settings(
        data_input_dirs=args.data_input_dirs,
        tokenizer_dir=args.tokenizer_dir,
        data_output_dirs=args.data_output_dirs,
        data_arrow_output_dir=args.data_arrow_output_dir,
        max_length=args.max_length,
        num_bins=args.num_spliced_dataset_bins,
        seed=args.seed,
        splice=splice,
        skip_bad_records=args.on_bad_record == "skip",
        overwrite=args.overwrite,
        num_workers=args.num_workers,
        ray_address=args.ray_address,
        recursive=args.recursive,
    )


def load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a Hugging Face directory; `UserError` when there is none, or no BOS or EOS."""
    from transformers import AutoTokenizer

    check_settings(directory)
    try:
        # Not left open: transformers would ask standard input whether to run the directory's code.
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the Rust library has no exception types of its own
        raise UserError(f"--tokenizer_dir {directory}: no tokenizer can be loaded: {error}") from None
    if not tokenizer.is_fast:
        raise UserError(f"--tokenizer_dir {directory}: {type(tokenizer).__name__} is not a fast tokenizer")
    for name in ("bos_token", "eos_token"):
        if getattr(tokenizer, f"{name}_id") is None:
            raise UserError(
                f"--tokenizer_dir {directory}: the tokenizer has no {name}; set it in its configuration"
            )
    return tokenizer


def prepare(
    settings: Settings,
    make_spec: Callable[[PreTrainedTokenizerFast], EncoderSpec],
    facts: Mapping[str, Any],
) -> None:
    """Encodes, packs and writes everything that the settings name.

    Args:
        make_spec: how to encode with a tokenizer; `tokenizer_json` is filled in here.
        facts: choices that belong in `stats.json` beside those of `Settings`; "kind" is one of them.

    Raises:
        UserError: bad records, output that is there, fewer documents than bins, …
    """
    started = time.monotonic()
    workers = open_workers(settings.ray_address, settings.num_workers, [encode_shard, write_bin])
    files = find_input_files(settings.data_input_dirs, settings.recursive)
    with contextlib.ExitStack() as stack:
        outputs = {settings.data_output_dirs.resolve(), settings.data_arrow_output_dir.resolve()}
        for directory in sorted(outputs):
            stack.enter_context(locked_directory(directory, "data preparation"))
        stack.enter_context(workers)
        workers.check_storage(
            [settings.cache_dir, settings.jsonl_dir, settings.data_arrow_output_dir],
            [file for directory in files for file in directory],
        )
        tokenizer = load_tokenizer(settings.tokenizer_dir)
        spec = make_spec(tokenizer)
        info = _save_tokenizer(tokenizer, settings.cache_dir)
        spec = replace(spec, tokenizer_json=str(info.json_path))
        facts = {
            **facts,
            "max_length": settings.max_length,
            "num_bins": settings.num_bins,
            "seed": settings.seed,
            "tokenizer_fingerprint": info.fingerprint,
            "vocab_size": info.vocab_size,
        }
        shards = make_shards(files)
        run_key = _find_run_key(shards, spec, facts, settings)
        run_id = _claim_output(settings, run_key)
        shard_tasks, summaries = _encode_shards(workers, shards, spec, settings)
        _check_bad_records(settings, shards, summaries)
        stats = _write_bins(workers, shard_tasks, summaries, settings, info, run_key, run_id, facts, spec)
        picture = settings.data_output_dirs / "stats.png"
        with naming(picture):
            draw_lengths(stats, picture)
        write_json(settings.stats_path, stats)
        node_table = workers.describe_nodes()
    log(format_statistics(stats))
    if node_table:
        log(f"\n{node_table}\n")
    seconds = time.monotonic() - started
    log(
        f"Data: {settings.data_arrow_output_dir} ({stats['rows']['tokens']:,} tokens in {seconds:.1f} s, "
        f"{stats['rows']['tokens'] / seconds:,.0f} tokens/s)"
    )


def _save_tokenizer(tokenizer: PreTrainedTokenizerFast, cache_dir: Path) -> TokenizerInfo:
    """Serialises the Rust tokenizer for the workers, under a name that stands for its content."""
    directory = cache_dir / "tokenizer"
    directory.mkdir(parents=True, exist_ok=True)
    text = tokenizer.backend_tokenizer.to_str()
    path = directory / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
    for other in directory.iterdir():
        if TOKENIZER_NAME.fullmatch(other.name):
            other.unlink()
    with naming(path):
        path.write_text(text, encoding="utf-8")
    backend = load_plain_backend(str(path))
    for token_id, token in tokenizer.added_tokens_decoder.items():
        text = f"{token.content} a{token.content}"
        is_unknown = token_id == tokenizer.unk_token_id  # may stand for any character
        if (
            token.special
            and not is_unknown
            and token_id in backend.encode(text, add_special_tokens=False).ids
        ):
            raise UserError(
                f"{tokenizer.name_or_path}: the merges of this tokenizer turn the plain text {token.content} "
                f"into the special token {token_id}; use a tokenizer that keeps them apart"
            )
    return TokenizerInfo(path.absolute(), tokenizer_fingerprint(tokenizer), len(tokenizer))


def _find_run_key(shards: list[Shard], spec: EncoderSpec, facts: dict[str, Any], settings: Settings) -> str:
    """A digest of everything that decides the output: a run with the same one goes on where it stopped."""
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(repr(shard).encode())
    arrow_dir = os.path.relpath(settings.data_arrow_output_dir.resolve(), settings.data_output_dirs.resolve())
    what = {
        **facts,
        "cache_format": CACHE_FORMAT,
        "splice": settings.splice,
        "skip": settings.skip_bad_records,
        "spec": spec.as_key(),
        "arrow_dir": arrow_dir,  # parts that lie in another one are none of this run's
    }
    digest.update(json.dumps(what, sort_keys=True).encode())
    return digest.hexdigest()[:24]


def _claim_output(settings: Settings, run_key: str) -> str:
    """Refuses output that is there, except parts of this very run; with `--overwrite`, removes it.

    Only names that preparation itself gives are ever removed. Returns an id of this run: what is left of
    earlier ones on other machines may not write any more.
    """
    run: Any = {}
    with contextlib.suppress(UserError):  # missing or damaged: of another run
        run = read_json(settings.run_file)
    if not isinstance(run, dict) or (run and "run_key" not in run):
        raise UserError(
            f"{settings.run_file}: is there already, and no preparation wrote it; use another directory"
        )
    is_same_run = run.get("run_key") == run_key
    is_complete = settings.stats_path.exists()
    parts = [
        path
        for directory in (settings.data_arrow_output_dir, settings.jsonl_dir)
        if directory.is_dir()
        for path in directory.iterdir()
        if PART_NAME.fullmatch(path.name)
    ]
    if is_complete and not settings.overwrite:
        raise UserError(
            f"--data_output_dirs {settings.data_output_dirs}: holds a prepared data set; "
            "use another directory, or --overwrite"
        )
    if parts and not is_same_run and not settings.overwrite:
        raise UserError(
            f"{parts[0]}: is there already, from another run that did not finish or had other settings; "
            "use another directory, or --overwrite"
        )
    picture = settings.data_output_dirs / "stats.png"
    if picture.exists() and not (is_complete or run or settings.overwrite):
        raise UserError(
            f"{picture}: is there already, without a data set; use another directory, or --overwrite"
        )
    if is_complete or not is_same_run:
        settings.stats_path.unlink(missing_ok=True)  # first: from here on the output is not complete
        picture.unlink(missing_ok=True)
        for path in parts:
            remove_path(path)
        for path in (settings.cache_dir / "bins").glob("part-*.json"):
            path.unlink()
    run_id = secrets.token_hex(8)
    write_json(settings.run_file, {"run_key": run_key, "run_id": run_id})
    _remove_unfinished_parts(settings)
    return run_id


def _remove_unfinished_parts(settings: Settings) -> None:
    """Removes what killed workers left half-written."""
    for directory in (settings.data_arrow_output_dir, settings.jsonl_dir):
        for path in directory.iterdir() if directory.is_dir() else ():
            if ASIDE_NAME.fullmatch(path.name):
                remove_path(path)


def _encode_shards(
    workers: Workers, shards: list[Shard], spec: EncoderSpec, settings: Settings
) -> tuple[list[ShardTask], list[ShardSummary]]:
    cache_dir = settings.cache_dir / "shards"
    cache_dir.mkdir(parents=True, exist_ok=True)
    tasks = [ShardTask(shard, spec, str(cache_dir.absolute())) for shard in shards]
    remove_stale_shards(cache_dir, tasks)
    num_finished = sum(task.table_path.exists() for task in tasks)
    if num_finished:
        log(f"{num_finished} of {len(tasks)} shards are in the cache")
    # The largest first, so that no worker is left alone with a big compressed file at the end.
    order = sorted(range(len(tasks)), key=lambda i: (shards[i].start - shards[i].end, i))
    summaries: list[ShardSummary | None] = [None] * len(tasks)
    only_check = False

    def tasks_to_run() -> Iterator[ShardTask]:
        for i in order:
            yield replace(tasks[i], check_only=only_check)

    num_bytes = sum(shard.end - shard.start for shard in shards)
    with progress_bar(total=num_bytes, desc="encoding", unit="B", unit_scale=True) as bar:
        meter = _TokenMeter(bar)
        for index, summary in workers.run(encode_shard, tasks_to_run()):
            summaries[order[index]] = summary
            # After a bad record there will be no output: what is left to do is to list the others.
            only_check |= bool(summary.bad_records) and not settings.skip_bad_records
            meter.update(summary.num_tokens, summary.num_bytes)
    remove_stale_shards(cache_dir, tasks)
    return tasks, summaries  # type: ignore[return-value]


def _check_bad_records(settings: Settings, shards: list[Shard], summaries: list[ShardSummary]) -> None:
    """Stops with a list of the bad records, or says how many were skipped."""
    kinds = sum((summary.bad_records for summary in summaries), Counter())
    if not kinds:
        return
    by_kind = ", ".join(f"{kind}: {number:,}" for kind, number in sorted(kinds.items()))
    listed = list(_list_bad_records(shards, summaries))
    if settings.skip_bad_records:
        log(f"Skipped {kinds.total():,} bad records ({by_kind}), the first: {listed[0]}")
        return
    rest = kinds.total() - len(listed)
    raise UserError(
        [
            *listed,
            *([f"… and {rest:,} more"] if rest else []),
            f"{kinds.total():,} bad records ({by_kind}); mend them, or use --on_bad_record skip",
        ]
    )


def _list_bad_records(shards: list[Shard], summaries: list[ShardSummary]) -> Iterator[str]:
    """The first bad records as `file:line: what is wrong`."""
    num_listed = 0
    lines_before: Counter[str] = Counter()
    for shard, summary in zip(shards, summaries, strict=True):
        for line, what in summary.listed_bad_records:
            if num_listed == MAX_LISTED_BAD_RECORDS:
                return
            num_listed += 1
            yield f"{shard.path}:{lines_before[shard.path] + line}: {what}"
        lines_before[shard.path] += summary.num_lines


def _write_bins(
    workers: Workers,
    shard_tasks: list[ShardTask],
    summaries: list[ShardSummary],
    settings: Settings,
    info: TokenizerInfo,
    run_key: str,
    run_id: str,
    facts: dict[str, Any],
    spec: EncoderSpec,
) -> dict[str, Any]:
    """Deals the documents to bins, has them written, and returns the content of `stats.json`."""
    piece_lengths, num_pieces, strata = _collect_documents(shard_tasks)
    if len(num_pieces) < settings.num_bins:
        raise UserError(
            f"--num_spliced_dataset_bins {settings.num_bins}: there are only {len(num_pieces)} documents; "
            + (f"ask for at most {len(num_pieces)} bins" if len(num_pieces) else "nothing is left to write")
        )
    documents, document_bounds = deal_documents(strata, settings.num_bins, settings.seed)
    plan_dir = settings.cache_dir.absolute() / "plan"
    bounds = _write_plan(plan_dir, piece_lengths, num_pieces, documents, document_bounds)
    shards_file = plan_dir / "shards.json"
    write_json(
        shards_file,
        [(str(t.tokens_path), s.num_tokens) for t, s in zip(shard_tasks, summaries, strict=True)],
    )
    tasks = [
        BinTask(
            index=index,
            first_piece=bounds[index],
            end_piece=bounds[index + 1],
            plan_dir=str(plan_dir),
            shards_file=str(shards_file),
            record_dir=str(settings.cache_dir.absolute() / "bins"),
            arrow_dir=str(settings.data_arrow_output_dir.absolute()),
            jsonl_dir=str(settings.jsonl_dir.absolute()),
            run_file=str(settings.run_file.absolute()),
            run_key=run_key,
            run_id=run_id,
            seed=settings.seed,
            max_length=settings.max_length,
            splice=settings.splice,
            kind=facts["kind"],
            tokenizer_fingerprint=info.fingerprint,
            vocab_size=info.vocab_size,
            end_of_turn_ids=spec.end_of_turn_ids,
        )
        for index in range(settings.num_bins)
    ]
    bins: list[BinCounts | None] = [None] * len(tasks)
    with progress_bar(
        total=int(piece_lengths.sum(dtype=np.int64)), desc="packing", unit="token", unit_scale=True
    ) as bar:
        for index, counts in workers.run(write_bin, tasks):
            bins[index] = counts
            bar.update(counts.tokens)
    _remove_unfinished_parts(settings)
    return make_statistics(
        facts,
        _sum_categories(summaries),
        _sum_input_dirs(shard_tasks, summaries, len(settings.data_input_dirs)),
        sum((summary.bad_records for summary in summaries), Counter()),
        bins,  # type: ignore[arg-type]
        settings.max_length,
        piece_lengths,
    )


def _collect_documents(tasks: list[ShardTask]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reads the shards' tables: lengths of all pieces, pieces of all documents, their strata (int32 arrays).

    A stratum is an input directory with a category; strata are numbered by directory, then by name.
    """
    names: list[set[str]] = []
    tables = []
    for task in tasks:
        table = read_table(task)
        tables.append((task.shard.input_dir, table))
        names += [set() for _ in range(task.shard.input_dir + 1 - len(names))]
        names[task.shard.input_dir].update(table.category_names)
    ordered = [(input_dir, name) for input_dir, found in enumerate(names) for name in sorted(found)]
    stratum_of = {key: index for index, key in enumerate(ordered)}
    strata = [
        np.array([stratum_of[input_dir, name] for name in table.category_names], dtype=np.int32)[
            table.category_ids
        ]
        for input_dir, table in tables
    ]
    return (
        np.concatenate([table.piece_lengths for _, table in tables]),
        np.concatenate([table.num_pieces for _, table in tables]),
        np.concatenate(strata),
    )


def _write_plan(
    plan_dir: Path,
    piece_lengths: np.ndarray,
    num_pieces: np.ndarray,
    documents: np.ndarray,
    document_bounds: np.ndarray,
) -> list[int]:
    """Writes lengths and offsets of the pieces in the order of the deal; returns the bins' boundaries."""
    offsets = np.concatenate(([0], np.cumsum(piece_lengths, dtype=np.int64)[:-1]))
    first_pieces = np.concatenate(([0], np.cumsum(num_pieces, dtype=np.int64)[:-1]))
    sizes = num_pieces[documents].astype(np.int64)
    starts = np.concatenate(([0], np.cumsum(sizes)))
    within = np.arange(starts[-1]) - np.repeat(starts[:-1], sizes)
    pieces = np.repeat(first_pieces[documents], sizes) + within
    plan_dir.mkdir(parents=True, exist_ok=True)
    with naming(plan_dir):
        np.save(plan_dir / "lengths.npy", piece_lengths[pieces])
        np.save(plan_dir / "offsets.npy", offsets[pieces])
    return starts[document_bounds].tolist()


def _sum_categories(summaries: Iterable[ShardSummary]) -> dict[str, Counts]:
    categories: dict[str, Counts] = {}
    for summary in summaries:
        for name, counts in summary.categories.items():
            categories.setdefault(name, Counts()).add(counts)
    return categories


def _sum_input_dirs(
    tasks: list[ShardTask], summaries: list[ShardSummary], num_input_dirs: int
) -> list[Counts]:
    input_dirs = [Counts() for _ in range(num_input_dirs)]
    for task, summary in zip(tasks, summaries, strict=True):
        for counts in summary.categories.values():
            input_dirs[task.shard.input_dir].add(counts)
    return input_dirs


class _TokenMeter:
    """Tokens per second beside a bar that counts bytes."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar
        self.num_tokens = 0
        self.started = time.monotonic()

    def update(self, num_tokens: int, num_bytes: int) -> None:
        self.num_tokens += num_tokens
        speed = self.num_tokens / max(time.monotonic() - self.started, 1e-9)
        self.bar.set_postfix_str(f"{speed:,.0f} tokens/s", refresh=False)
        self.bar.update(num_bytes)

"""The first stage: every shard of the input is encoded by a worker, and what is wrong with it is listed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from colossal_llama.conversation.formats import FORMATS
from colossal_llama.corpus.jsonl import Shard
from colossal_llama.dataset.encoders.base import EncoderSpec
from colossal_llama.dataset.shards import (
    ShardSummary,
    ShardTask,
    distrust_shards,
    encode_shard,
    remove_stale_shards,
)
from colossal_llama.dataset.statistics import Counts, DocumentCounts
from colossal_llama.dataset.workers import Workers
from colossal_llama.utils.console import log, progress_bar
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.messages import MAX_LISTED_PROBLEMS, cap_problems


@dataclass(frozen=True)
class EncodedShards:
    """The shards in the order of the input, and what became of each."""

    tasks: list[ShardTask]
    summaries: list[ShardSummary]

    def count_bad_records(self) -> Counter[str]:
        """Number of bad records by what is wrong with them."""
        return sum((summary.bad_records for summary in self.summaries), Counter())

    def count_formats(self) -> dict[str, int]:
        """Number of files by the format of their records; `UserError` for a file that mixes them."""
        first: dict[str, tuple[str, int]] = {}
        problems = []
        for (path, lines_before), summary in zip(self.places(), self.summaries, strict=True):
            for name, line in sorted(summary.formats.items(), key=lambda item: item[1]):
                found, found_line = first.setdefault(path, (name, lines_before + line))
                if name != found and name in FORMATS:
                    problems.append(
                        f"{path}:{lines_before + line}: a record in the format {FORMATS[name].title}, though "
                        f"line {found_line} is in {FORMATS[found].title}; give each format files of its own"
                    )
        if problems:
            raise UserError(cap_problems(problems, total=len(problems)))
        return dict(sorted(Counter(name for name, _ in first.values()).items()))

    def places(self) -> Iterator[tuple[str, int]]:
        """The file of each shard, and the number of lines in it before the shard."""
        lines_before: Counter[str] = Counter()
        for task, summary in zip(self.tasks, self.summaries, strict=True):
            yield task.shard.path, lines_before[task.shard.path]
            lines_before[task.shard.path] += summary.num_lines

    def count(self, num_input_dirs: int, held_out: bool = False) -> DocumentCounts:
        """Counts of the documents that are held out, or of all others."""
        counted = DocumentCounts({}, [Counts() for _ in range(num_input_dirs)])
        for task, summary in zip(self.tasks, self.summaries, strict=True):
            for name, counts in (summary.held_out if held_out else summary.categories).items():
                counted.categories.setdefault(name, Counts()).add(counts)
                counted.input_dirs[task.shard.input_dir].add(counts)
        return counted


def encode_shards(
    workers: Workers,
    shards: list[Shard],
    spec: EncoderSpec,
    cache_dir: Path,
    skip_bad_records: bool,
    held_out_share: float = 0.0,
) -> EncodedShards:
    """Has all shards encoded into `cache_dir`, where those of an earlier run are taken as they are."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    tasks = [
        ShardTask(shard, spec, str(cache_dir.absolute()), held_out_share=held_out_share) for shard in shards
    ]
    distrust_shards(cache_dir)
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
            only_check |= bool(summary.bad_records) and not skip_bad_records
            meter.update(summary.num_tokens, summary.num_bytes)
    remove_stale_shards(cache_dir, tasks)
    return EncodedShards(tasks, summaries)  # type: ignore[arg-type]


def check_bad_records(encoded: EncodedShards, skip_bad_records: bool) -> None:
    """Raises `UserError` with a list of the bad records, or reports how many were skipped."""
    kinds = encoded.count_bad_records()
    if not kinds:
        return
    by_kind = ", ".join(f"{kind}: {number:,}" for kind, number in sorted(kinds.items()))
    listed = list(_list_bad_records(encoded))
    if skip_bad_records:
        log(f"Skipped {kinds.total():,} bad records ({by_kind}), the first: {listed[0]}")
        return
    raise UserError(
        [
            *cap_problems(listed, total=kinds.total()),
            f"{kinds.total():,} bad records ({by_kind}); fix them, or use --on_bad_record skip",
        ]
    )


def _list_bad_records(encoded: EncodedShards) -> Iterator[str]:
    """The first bad records as `file:line: what is wrong`."""
    num_listed = 0
    for (path, lines_before), summary in zip(encoded.places(), encoded.summaries, strict=True):
        for line, what in summary.listed_bad_records:
            if num_listed == MAX_LISTED_PROBLEMS:
                return
            num_listed += 1
            yield f"{path}:{lines_before + line}: {what}"


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

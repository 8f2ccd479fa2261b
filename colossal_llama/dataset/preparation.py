"""Data preparation from JSONL directories to packed bins, for pre-training and SFT alike.

    input files ─▶ shards ─▶ encode_shard ─▶ cache/shards ─▶ deal to bins ─▶ write_bin ─▶ arrow/, jsonl/

`encode_shard` and `write_bin` run in the workers; what is between them is decided on lengths alone.
`stats.json` is written last: where it is, the output is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama.corpus.jsonl import Shard, find_input_files, make_shards
from colossal_llama.dataset.bin_stage import BinRun, WrittenBins, write_bins
from colossal_llama.dataset.bins import part_name, write_bin
from colossal_llama.dataset.encode_stage import EncodedShards, check_bad_records, encode_shards
from colossal_llama.dataset.encoders import find_encoder
from colossal_llama.dataset.encoders.base import EncoderSpec
from colossal_llama.dataset.engine_choice import find_candidate, packages_of, recall_trial, settle_engine
from colossal_llama.dataset.engines import REFERENCE, load_engine
from colossal_llama.dataset.output import OutputPaths, claim_output
from colossal_llama.dataset.piece_counts import read_piece_counts, summarise_counts
from colossal_llama.dataset.preview import Preview
from colossal_llama.dataset.settings import PathSettings, PreparationSettings, RowSettings
from colossal_llama.dataset.shards import CACHE_FORMAT, encode_shard
from colossal_llama.dataset.statistics import (
    HeldOutCounts,
    draw_lengths,
    format_statistics,
    make_statistics,
    prepare_to_draw,
)
from colossal_llama.dataset.tokenizer_copy import (
    SpecialTokens,
    TokenizerInfo,
    describe_tokenizer,
    find_merged_tokens,
    load_tokenizer,
    save_tokenizer,
)
from colossal_llama.dataset.workers import Workers, open_workers
from colossal_llama.tokenizer.new_rows import find_new_rows
from colossal_llama.utils.console import log
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.files import locked_directory, with_filename_in_errors, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def prepare(settings: PreparationSettings) -> None:
    """Encodes, packs and writes everything that the settings name.

    Raises:
        UserError: bad records, output that is there, fewer documents than bins, …
    """
    started = time.monotonic()
    paths, rows = settings.paths, settings.rows
    output = OutputPaths.of_settings(paths)
    engine = find_candidate(settings.workers.tokenizer_engine)
    workers = open_workers(
        settings.workers.ray_address, settings.workers.num_workers, [encode_shard, write_bin]
    )
    files = find_input_files(paths.data_input_dirs, paths.recursive)
    with contextlib.ExitStack() as stack:
        for directory in sorted({output.directory.resolve(), output.arrow_dir.resolve()}):
            stack.enter_context(locked_directory(directory, "data preparation"))
        stack.enter_context(workers)
        workers.check_storage(
            _output_dirs(output, rows.held_out_share),
            [file for directory in files for file in directory],
            packages_of(engine),
        )
        loaded = load_tokenizer(paths.tokenizer_dir)
        spec = _make_spec(settings, output, loaded)
        trial = recall_trial(engine, spec.tokenizer_json) if find_encoder(spec.kind).uses_engine else None
        known = (engine, trial.engine_json) if trial else (REFERENCE, "")
        workers.preload(load_engine, known[0], spec.tokenizer_json, known[1])
        find_encoder(spec.kind).report(spec, loaded)
        tokenizer = describe_tokenizer(loaded, Path(spec.tokenizer_json))
        _check_special_tokens(workers, loaded, tokenizer)
        new_rows = find_new_rows(paths.tokenizer_dir)
        facts = _facts(settings, tokenizer)
        shards = make_shards(files)
        run_key = _find_run_key(shards, spec, facts, settings, output, new_rows)
        run_id = claim_output(output, run_key, paths.overwrite)
        # While the workers encode. No daemon: after an error, Python would end it inside of C++, and abort.
        drawing_prepared = threading.Thread(target=prepare_to_draw)
        drawing_prepared.start()
        encoded = encode_shards(
            workers,
            shards,
            settle_engine(engine, spec, shards, workers, trial),
            output.cache_dir / "shards",
            settings.skip_bad_records,
            rows.held_out_share,
        )
        formats = encoded.count_formats()
        check_bad_records(encoded, settings.skip_bad_records)
        run = BinRun(
            run_key,
            run_id,
            facts["kind"],
            tokenizer,
            spec.end_of_turn_ids,
            settings.records.splice,
            None if spec.carried is None else spec.carried.as_json(),
            new_rows,
        )
        if facts["kind"] == "sft":
            facts["input_formats"] = formats
        written = write_bins(workers, encoded, output, rows, run)
        node_table = workers.describe_nodes()
        workers.finish()
        drawing_prepared.join()
        stats = _write_statistics(facts, encoded, written, settings, output, new_rows)
    log(format_statistics(stats))
    if paths.preview:
        _show_rows(paths, output, rows)
    if node_table:
        log(f"\n{node_table}\n")
    seconds = time.monotonic() - started
    log(
        f"Data: {output.arrow_dir} ({stats['rows']['tokens']:,} tokens in {seconds:.1f} s, "
        f"{stats['rows']['tokens'] / seconds:,.0f} tokens/s)"
    )


def _output_dirs(output: OutputPaths, held_out_share: float) -> list[Path]:
    """The directories that workers write to."""
    held_out = [output.held_out_dir, output.held_out_arrow_dir] if held_out_share else []
    return [output.cache_dir, output.jsonl_dir, output.arrow_dir, *held_out]


def _make_spec(
    settings: PreparationSettings, output: OutputPaths, tokenizer: PreTrainedTokenizerFast
) -> EncoderSpec:
    """How records are encoded, with the tokenizer's copy for the workers."""
    encoder = find_encoder(settings.records.encoder)
    spec = encoder.make_spec(tokenizer, settings.records, settings.rows.max_length)
    path = save_tokenizer(tokenizer, output.cache_dir, spec.follows_special_tokens)
    return replace(spec, tokenizer_json=str(path))


def _check_special_tokens(workers: Workers, tokenizer: PreTrainedTokenizerFast, info: TokenizerInfo) -> None:
    """Raises `UserError` where plain text could become a special token."""
    special = SpecialTokens.of_tokenizer(tokenizer, info.json_path)
    ((_, merged),) = workers.run(find_merged_tokens, [special])
    if merged:
        token_id, content = merged[0]
        raise UserError(
            f"{tokenizer.name_or_path}: the merges of this tokenizer turn the plain text {content} "
            f"into the special token {token_id}; use a tokenizer that keeps them apart"
        )


def _facts(settings: PreparationSettings, tokenizer: TokenizerInfo) -> dict[str, Any]:
    """The choices that belong in `stats.json`."""
    return {
        **settings.records.facts(),
        "max_length": settings.rows.max_length,
        "num_bins": settings.rows.num_spliced_dataset_bins,
        "seed": settings.rows.seed,
        **({"held_out_share": share} if (share := settings.rows.held_out_share) else {}),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
    }


def _find_run_key(
    shards: list[Shard],
    spec: EncoderSpec,
    facts: dict[str, Any],
    settings: PreparationSettings,
    output: OutputPaths,
    new_rows: range,
) -> str:
    """A digest of everything that decides the output: a run with the same one continues where it stopped."""
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(repr(shard).encode())
    what = {
        **facts,
        "cache_format": CACHE_FORMAT,
        "splice": settings.records.splice,
        "skip": settings.skip_bad_records,
        "spec": spec.as_key(),
        # Parts that lie in another directory are none of this run's.
        "arrow_dir": os.path.relpath(output.arrow_dir.resolve(), output.directory.resolve()),
    }
    if new_rows:  # they are counted
        what["new_rows"] = [new_rows.start, new_rows.stop]
    digest.update(json.dumps(what, sort_keys=True).encode())
    return digest.hexdigest()[:24]


def _show_rows(paths: PathSettings, output: OutputPaths, rows: RowSettings) -> None:
    preview = Preview(load_tokenizer(paths.tokenizer_dir), coloured=sys.stdout.isatty())
    parts = [output.arrow_dir / part_name(index) for index in range(rows.num_spliced_dataset_bins)]
    for text in preview.show(parts, paths.preview, rows.max_length):
        log(f"{text}\n")


def _write_statistics(
    facts: dict[str, Any],
    encoded: EncodedShards,
    written: WrittenBins,
    settings: PreparationSettings,
    output: OutputPaths,
    new_rows: range,
) -> dict[str, Any]:
    """Writes `stats.png`, then `stats.json`; returns its content."""
    num_input_dirs = len(settings.paths.data_input_dirs)
    held_out = new_pieces = None
    if share := settings.rows.held_out_share:
        held_out = HeldOutCounts(share, encoded.count(num_input_dirs, held_out=True), written.held_out)
    if new_rows:
        parts = [output.arrow_dir / part_name(index) for index in range(len(written.bins))]
        counts = read_piece_counts(parts, new_rows)
        assert counts is not None, "a part has no counts"
        new_pieces = summarise_counts(counts)
    stats = make_statistics(
        facts,
        encoded.count(num_input_dirs),
        encoded.count_bad_records(),
        written.bins,
        settings.rows.max_length,
        written.piece_lengths,
        held_out,
        new_pieces,
    )
    with with_filename_in_errors(output.picture_path):
        draw_lengths(stats, output.picture_path)
    write_json(output.stats_path, stats)
    return stats

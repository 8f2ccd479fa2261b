# /// script
# requires-python = ">=3.10"
# dependencies = ["datatrove==0.10.1", "orjson", "regex", "tokenizers", "xxhash<4"]
# ///
"""Removes duplicates, near duplicates, repetitive text and text of benchmarks from JSONL corpora.

What is kept is written line by line as it was, so the output is input for the prepare scripts. What is
removed is written beside it, with file, line and reason. The work is done by datatrove, which needs an
environment of its own: docs/cleaning.md has the commands.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from colossal_llama.conversation.formats import FORMATS, find_format
from colossal_llama.corpus.jsonl import find_input_files, make_shards, read_lines
from colossal_llama.corpus.records import BadRecord, parse_object, take_string
from colossal_llama.utils.arguments import ArgumentParser, directory_list, number, positive_int
from colossal_llama.utils.console import format_table, log
from colossal_llama.utils.errors import UserError, run_command
from colossal_llama.utils.files import write_json
from colossal_llama.utils.messages import MAX_LISTED_PROBLEMS
from colossal_llama.utils.output_checks import why_not_output_directory
from colossal_llama.utils.settings import add_settings, flag, parse_settings

try:
    from datatrove.utils.word_tokenizers import WordTokenizer
except ImportError:  # the parser works without it
    WordTokenizer = object

REASONS = ("duplicate", "repetitive", "contaminated", "near_duplicate")
# Scripts that put no spaces between words: there, each character counts as a word.
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
MIN_NGRAM = 5
HIGHEST_PRIORITY = 65535  # of datatrove


@dataclass(frozen=True)
class CleaningSettings:
    """What is read, what must not be in it, and where the rest goes."""

    data_input_dirs: list[Path] = flag(
        None, "comma list of JSONL directories, cleaned together", type=directory_list, required=True
    )
    output_dir: Path = flag(
        None,
        "new or empty directory: kept/<input directory>/<file>, removed/<reason>.jsonl",
        type=Path,
        required=True,
    )
    reference_dirs: list[Path] | None = flag(
        None,
        "comma list of JSONL directories with text that must not be in the output, held-out text and "
        "benchmarks for instance: every string of their records, whatever its field (default: none)",
        type=directory_list,
    )
    ngram: int = flag(
        13,
        "words in a row that a record must share with a reference to be removed; in Chinese, Japanese, Thai "
        "and other scripts without spaces, characters",
        type=number(int, MIN_NGRAM),
    )
    text_field: str = flag(
        "", "read the text of each record from this field (default: source and target, or messages)", type=str
    )
    keep_near_duplicates: bool = flag(False, "remove exact duplicates only")
    drop_repetitive: bool = flag(False, "also remove records that repeat lines or paragraphs")
    num_workers: int | None = flag(
        None,
        "processes, of which each reads whole files; the output does not depend on it (default: all cores)",
        type=positive_int,
    )
    seed: int = flag(42, "seed of the hash functions of near duplicates", type=number(int, 0))


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="clean_corpus.py", description=__doc__)
    add_settings(parser, CleaningSettings, check=_check_output)
    return parser


def _check_output(settings: CleaningSettings) -> list[str]:
    output_dir = settings.output_dir
    reason = why_not_output_directory(output_dir)
    if reason is None and output_dir.is_dir() and any(output_dir.iterdir()):
        reason = "is not empty; choose another directory, or remove it first"
    problems = [f"--output_dir {output_dir}: {reason}"] if reason else []
    names = Counter(directory.name for directory in settings.data_input_dirs)
    return problems + [
        f"--data_input_dirs {name}: two directories of this name; their outputs would be one"
        for name, count in names.items()
        if count > 1
    ]


@dataclass(frozen=True)
class Corpus:
    """Reads records for a pipeline: a file goes to one task as a whole."""

    files: list[tuple[str, Any]]
    text_field: str

    def __call__(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        from datatrove.data import Document

        for position in range(rank, len(self.files), world_size):
            name, file = self.files[position]
            for number_of_line, line in lines_of(file):
                place = {"position": position, "file": name, "line": number_of_line, "content": line}
                text = text_of(parse_object(line), self.text_field)
                yield Document(text=text, id=f"{name}:{number_of_line}", metadata=place)


@dataclass
class Writer:
    """Writes records below a directory, from the tasks of a pipeline: kept ones as they were, removed ones
    with the reason.
    """

    directory: Path
    reason: str = ""
    files: dict[Path, Any] = field(default_factory=dict)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: Any) -> None:
        for file in self.files.values():
            file.close()
        self.files.clear()

    def write(self, document: Any, rank: int = 0) -> None:
        place = document.metadata
        if not self.reason:
            self.file(self.directory / "kept" / place["file"]).write(place["content"])
            return
        found = {"shared": place["contaminated_ngram"]} if "contaminated_ngram" in place else {}
        record = parse_object(place["content"])
        entry = {
            "file": place["file"],
            "line": place["line"],
            "reason": self.reason,
            **found,
            "record": record,
        }
        line = json.dumps(entry, ensure_ascii=False) + "\n"
        self.file(self.directory / "removed" / self.reason / f"{rank:05d}").write(line.encode())

    def file(self, path: Path) -> Any:
        if path not in self.files:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.files[path] = path.open("wb")
        return self.files[path]

    def __call__(self, data: Iterable[Any], rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        with self:
            for document in data:
                self.write(document, rank)
                yield document


class Words(WordTokenizer):
    """Words for comparisons, without a model of any language."""

    def __init__(self) -> None:
        self.language = None

    def word_tokenize(self, text: str) -> list[str]:
        import regex

        return regex.findall(rf"(?V1)[{UNSPACED}]|[\w--[{UNSPACED}]]+", text)

    def sent_tokenize(self, text: str) -> list[str]:
        return text.splitlines()

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [(0, len(text))]


def lines_of(file: Any) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that hold records, with their numbers; each ends with a line end."""
    lines = (line for shard in make_shards([[file]]) for line in read_lines(shard))
    for position, line in enumerate(lines, start=1):
        if line.strip():
            yield position, line if line.endswith(b"\n") else line + b"\n"


def text_of(record: dict[str, Any], text_field: str) -> str:
    """The text of a pre-training record or of a conversation; raises `BadRecord` when it is of no kind."""
    if text_field:
        return take_string(record, text_field)
    if "target" in record or "source" in record:
        return take_string(record, "source") + take_string(record, "target")
    return "\n".join(message.content for message in FORMATS[find_format(record)].parse(record))


def strings_of(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings_of(item)


def find_files(directories: list[Path]) -> list[tuple[str, Any]]:
    """(name in the output, file) of every input file."""
    found = []
    for directory, files in zip(directories, find_input_files(directories), strict=True):
        for file in files:
            if file.name.endswith(".parquet"):
                raise UserError(f"{file.path}: Parquet is not read here; write its records as JSONL first")
            found.append((f"{directory.name}/{file.name.partition('.jsonl')[0]}.jsonl", file))
    return found


def check_records(files: list[tuple[str, Any]], parse: Callable[[dict[str, Any]], Any]) -> int:
    """The number of records; all that can't be read are reported before anything is removed."""
    problems, count = [], 0
    for _, file in files:
        for number_of_line, line in lines_of(file):
            count += 1
            try:
                parse(parse_object(line))
            except BadRecord as error:
                problems.append(f"{file.path}:{number_of_line}: {error}")
                if len(problems) == MAX_LISTED_PROBLEMS:
                    raise UserError([*problems, "reading stopped after the 20th bad record"]) from None
    if problems:
        raise UserError(problems)
    return count


def write_reference(files: list[tuple[str, Any]], directory: Path, ngram: int) -> None:
    """The n-grams of the references, as datatrove's filter reads them. (Its own indexer reads benchmarks of
    lighteval alone, from the hub.)
    """
    import numpy as np
    from datatrove.pipeline.decont import NGramsDecontConfig
    from datatrove.utils.hashing import create_hash_func
    from datatrove.utils.text import ngrams, simplify_text

    config, words = NGramsDecontConfig(n_grams=ngram), Words()
    hash_of = create_hash_func(config.hash_config)
    hashes = set()
    for _, file in files:
        for _, line in lines_of(file):
            for text in strings_of(parse_object(line)):
                tokens = words.word_tokenize(simplify_text(text, config.norm_config))
                hashes.update(hash_of(" ".join(each)) for each in ngrams(tokens, ngram))
    directory.mkdir()
    np.array(list(hashes), dtype=config.hash_config.np_descr).tofile(directory / "reference.index.hashes")


def clean(settings: CleaningSettings, files: list[tuple[str, Any]], work: Path, output: Path) -> None:
    """Three passes over the corpus: hashes of texts, signatures of what is left of them, and the output."""
    from datatrove.executor.local import LocalPipelineExecutor
    from datatrove.pipeline.decont import NGramsDecontConfig, NGramsDecontFilter
    from datatrove.pipeline.dedup import (
        ExactDedupFilter,
        ExactDedupSignature,
        ExactFindDedups,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.dedup.exact_dedup import ExactDedupConfig
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.filters import GopherRepetitionFilter

    words = Words()
    corpus = Corpus(files, settings.text_field)
    num_tasks = len(files)  # and not the number of workers, so that the output does not depend on it
    exact = ExactDedupConfig(content_getter=text_of_document, document_priority=priority_of_document)
    minhash = MinhashConfig(seed=settings.seed)

    def run(name: str, tasks: int, *pipeline: Any) -> None:
        log(f"{name} ({tasks} tasks)")
        LocalPipelineExecutor(
            list(pipeline),
            tasks=tasks,
            workers=min(tasks, settings.num_workers or len(os.sched_getaffinity(0))),
            logging_dir=str(work / "logs" / name.replace(" ", "_")),
        ).run()

    def filters(write_removed: bool) -> list[Any]:
        def to(reason: str) -> Writer | None:
            return Writer(output, reason) if write_removed else None

        chosen = [ExactDedupFilter(str(work / "duplicates"), exact, exclusion_writer=to("duplicate"))]
        if settings.drop_repetitive:
            # Lines and paragraphs only: short texts without spaces break Gopher's rules of repeated words.
            rules = {"top_n_grams": (), "dup_n_grams": ()}
            chosen.append(GopherRepetitionFilter(**rules, language=words, exclusion_writer=to("repetitive")))
        if settings.reference_dirs:
            config = NGramsDecontConfig(n_grams=settings.ngram)
            chosen.append(
                NGramsDecontFilter(
                    str(work / "reference"), config, language=words, exclusion_writer=to("contaminated")
                )
            )
        return chosen

    run("hashes of texts", num_tasks, corpus, ExactDedupSignature(str(work / "hashes"), exact))
    run("duplicates", 1, ExactFindDedups(str(work / "hashes"), str(work / "duplicates"), exact))
    near = []
    if not settings.keep_near_duplicates:
        signatures = MinhashDedupSignature(str(work / "signatures"), minhash, language=words)
        run("signatures of texts", num_tasks, corpus, *filters(False), signatures)
        places = str(work / "signatures"), str(work / "pairs")
        run("pairs of near duplicates", minhash.num_buckets, MinhashDedupBuckets(*places, config=minhash))
        run("clusters", 1, MinhashDedupCluster(str(work / "pairs"), str(work / "clusters"), config=minhash))
        near = [MinhashDedupFilter(str(work / "clusters"), exclusion_writer=Writer(output, "near_duplicate"))]
    run("output", num_tasks, corpus, *filters(True), *near, Writer(output))


def text_of_document(document: Any) -> str:
    return document.text


def priority_of_document(document: Any) -> int:
    """The first of several equal texts is kept."""
    return max(1, HIGHEST_PRIORITY - document.metadata["position"])


def join_removed(directory: Path) -> dict[str, int]:
    """Makes one file of what the tasks removed, for each reason; returns the numbers of records."""
    counts = {}
    for reason in REASONS:
        parts = sorted((directory / reason).glob("*"))
        counts[reason] = 0
        if parts:
            with (directory / f"{reason}.jsonl").open("wb") as joined:
                for part in parts:
                    with part.open("rb") as file:
                        for line in file:
                            joined.write(line)
                            counts[reason] += 1
            shutil.rmtree(directory / reason)
    return counts


def main() -> None:
    settings = parse_settings(build_parser(), CleaningSettings)
    if WordTokenizer is object:
        raise UserError("datatrove is not installed in this environment: see docs/cleaning.md")
    files = find_files(settings.data_input_dirs)
    num_read = check_records(files, lambda record: text_of(record, settings.text_field))
    reference = find_files(settings.reference_dirs) if settings.reference_dirs else []
    check_records(reference, lambda record: None)
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=settings.output_dir, prefix="work-") as work:
        output = Path(work) / "output"
        if reference:
            write_reference(reference, Path(work) / "reference", settings.ngram)
        clean(settings, files, Path(work), output)
        removed = join_removed(output / "removed")
        counts = {"read": num_read, "kept": num_read - sum(removed.values()), **removed}
        for part in output.iterdir():
            part.rename(settings.output_dir / part.name)
    write_json(settings.output_dir / "cleaning.json", counts)
    log(format_table(["records", "count"], list(counts.items())))
    log(f"Cleaned: {settings.output_dir / 'kept'}")


if __name__ == "__main__":
    run_command(main)

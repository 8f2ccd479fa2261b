"""Learns new vocabulary pieces from JSONL corpora, for init_tokenizer.py.

sentencepiece's BPE trainer finds candidates; those that save the most tokens over the source tokenizer are
kept, and only pieces that the extended tokenizer really produces.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from colossal_llama.utils.arguments import (
    ArgumentParser,
    directory_list,
    existing_directory,
    number,
    positive_int,
    seed_number,
)
from colossal_llama.utils.console import format_table, log, progress_bar, warn
from colossal_llama.utils.errors import UserError, run_command
from colossal_llama.utils.output_checks import why_not_output_file
from colossal_llama.utils.settings import add_settings, flag, parse_settings

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

    from colossal_llama.tokenizer.source import ExtensibleSource

# Stretches of text that pieces may be learned from; everything else separates them.
HAN = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
KANA_AND_HANGUL = "\u3040-\u30ff\u31f0-\u31ff\uac00-\ud7a3"
CHARACTER_FILTERS = {
    "cjk": f"[{HAN}{KANA_AND_HANGUL}]+",
    "han": f"[{HAN}]+",
    "all": r"[^\r\n]+",
}
# The trainer skips longer sentences; longer stretches are cut.
MAX_STRETCH_CHARACTERS = 1000


@dataclass(frozen=True)
class LearningSettings:
    """The corpus and the tokenizer that pieces are learned for, and which pieces are wanted."""

    data_input_dirs: list[Path] = flag(
        None,
        "comma list of directories with JSONL pre-training records or conversations",
        type=directory_list,
        required=True,
    )
    text_field: str = flag(
        "",
        "the field that holds a record's text (default: source and target, messages or text, as found)",
        type=str,
    )
    source_tokenizer_dir: Path = flag(
        None,
        "tokenizer that is to be extended: what it has already is not learned again",
        type=existing_directory,
        required=True,
    )
    output_file: Path = flag(
        None,
        'JSONL file to write, one {"piece": "..."} per line; replaces no other kind of file',
        type=Path,
        required=True,
    )
    num_tokens: int = flag(None, "new pieces to learn", type=positive_int, required=True)
    character_filter: str = flag(
        "cjk",
        "characters that pieces are made of: Chinese, Japanese and Korean ones (cjk), Chinese alone (han), "
        "or all",
        choices=tuple(CHARACTER_FILTERS),
    )
    max_piece_length: int = flag(8, "longest piece, in characters", type=number(int, 1, 64))
    min_frequency: int = flag(
        2, "pieces that occur less often than this in the corpus are not learned", type=positive_int
    )
    max_stretches: int = flag(
        5_000_000,
        "stretches of text to learn from at most, a random sample of the corpus (memory: about 1 KB each)",
        type=positive_int,
    )
    seed: int = flag(42, "seed of every random choice", type=seed_number)


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="learn_pieces.py", description=__doc__)
    add_settings(parser, LearningSettings, check=_check_output)
    return parser


def _check_output(settings: LearningSettings) -> list[str]:
    # Before hours of training, not after.
    reason = why_not_output_file(settings.output_file, lambda line: list(line) == ["piece"])
    return [f"--output_file {settings.output_file}: {reason}"] if reason else []


def read_stretches(texts: Iterable[str], character_filter: str) -> Iterator[str]:
    """The stretches of `texts` that pass the filter, cut where they are too long for the trainer."""
    import re

    pattern = re.compile(CHARACTER_FILTERS[character_filter])
    for text in texts:
        for match in pattern.finditer(text):
            stretch = match.group()
            for start in range(0, len(stretch), MAX_STRETCH_CHARACTERS):
                yield stretch[start : start + MAX_STRETCH_CHARACTERS]


def sample(stretches: Iterable[str], count: int, seed: int) -> list[str]:
    """At most `count` of the stretches, each with the same chance (reservoir sampling)."""
    import random

    generator = random.Random(seed)
    kept: list[str] = []
    for index, stretch in enumerate(stretches):
        if index < count:
            kept.append(stretch)
        elif (place := generator.randrange(index + 1)) < count:
            kept[place] = stretch
    return kept


def train_candidates(stretches: list[str], num_tokens: int, max_length: int) -> SentencePieceProcessor:
    """Trains sentencepiece BPE: all characters of the stretches, up to `num_tokens` joined pieces."""
    import io

    import sentencepiece

    characters = len(set().union(*stretches) | {" "})
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(stretches),
        model_writer=model,
        model_type="bpe",
        vocab_size=characters + num_tokens + 16,
        hard_vocab_limit=False,
        character_coverage=1.0,
        max_sentencepiece_length=max_length,
        max_sentence_length=8 * MAX_STRETCH_CHARACTERS,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        split_digits=True,
        bos_id=-1,
        eos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model.getvalue())
    return processor


def count_uses(trained: SentencePieceProcessor, stretches: list[str]) -> dict[str, int]:
    """How often each trained piece is formed in the stretches, as a token or on the way to a longer one.

    The count of a joined piece is the number of tokens that having it saves.
    """
    from colossal_llama.tokenizer.reachability import last_parts

    scores = {trained.id_to_piece(i): trained.get_score(i) for i in range(len(trained))}
    uses: Counter[str] = Counter()
    for start in range(0, len(stretches), 10_000):
        for pieces in trained.encode(stretches[start : start + 10_000], out_type=str):
            uses.update(pieces)
    # Longer pieces first: each was formed from two shorter ones.
    for piece in sorted(scores, key=len, reverse=True):
        if len(piece) > 1 and uses[piece]:
            for part in last_parts(piece, scores):
                uses[part] += uses[piece]
    return {piece: uses[piece] for piece in scores if uses[piece]}


def rank_candidates(
    uses: Mapping[str, int], trained: SentencePieceProcessor, source: ExtensibleSource, min_frequency: int
) -> list[str]:
    """The trained pieces that can be added to the source, those that save the most tokens first.

    A joined piece saves a token each time it is formed, a character as many as the source needs for it, less
    one. Ties go in the order of training, so a piece never comes before those that it is joined from.
    """
    from colossal_llama.tokenizer.byte_alphabet import byte_token
    from colossal_llama.tokenizer.subtokens import encode_tokens

    rules = source.rules
    spelled = {piece: rules.spell(piece) for piece, count in uses.items() if count >= min_frequency}
    spelled = {piece: text for piece, text in spelled.items() if rules.why_not_a_piece(text) is None}
    single = [text for text in spelled.values() if len(text) == 1]
    tokens = single if source.files.is_sentencepiece else [byte_token(text) for text in single]
    saved = {
        text: len(ids) - 1 for text, ids in zip(single, encode_tokens(source.files, tokens), strict=True)
    }
    gain = {piece: uses[piece] * saved.get(text, 1) for piece, text in spelled.items()}
    order = sorted(
        (piece for piece in spelled if gain[piece]), key=lambda p: (-gain[p], trained.piece_to_id(p))
    )
    return [spelled[piece] for piece in order]


def choose_reachable(
    candidates: list[str], source: ExtensibleSource, num_tokens: int
) -> tuple[list[str], int]:
    """The first `num_tokens` candidates that init_tokenizer.py can make tokens of.

    It is asked itself: what it finds unreachable makes room for the next candidates. A piece whose characters
    are neither in the source nor chosen would bring them along uncounted, so it waits for the next round as
    well.

    Returns:
        The pieces in the order of the candidates, and how many candidates were turned down.
    """
    from colossal_llama.tokenizer.pieces_file import ListedPieces

    rejected: set[str] = set()
    while True:
        usable = [piece for piece in candidates if piece not in rejected]
        chosen = usable[:num_tokens]
        if not chosen:
            return [], len(rejected)
        listed = ListedPieces(
            Path("candidates"), {piece: i for i, piece in enumerate(chosen, start=1)}, len(chosen)
        )
        extension = source.extend(listed, "report")
        missing = set(extension.characters)
        refused = {*extension.present, *extension.unreachable}
        refused |= {piece for piece in extension.added if missing & set(piece)}
        if not refused:
            return chosen, len(rejected)
        rejected |= refused


def main() -> None:
    settings = parse_settings(build_parser(), LearningSettings)

    from colossal_llama.tokenizer.corpus_texts import read_samples
    from colossal_llama.tokenizer.source import open_source
    from colossal_llama.utils.files import write_text_atomically

    source = open_source(settings.source_tokenizer_dir, "--source_tokenizer_dir")
    texts = progress_bar(
        read_samples(settings.data_input_dirs, settings.text_field), unit=" records", desc="reading"
    )
    stretches = sample(
        read_stretches(texts, settings.character_filter), settings.max_stretches, settings.seed
    )
    if not stretches:
        raise UserError(
            f"--character_filter {settings.character_filter}: no such characters in "
            f"{', '.join(map(str, settings.data_input_dirs))}; use all for other scripts, or another corpus"
        )
    trained = train_candidates(stretches, settings.num_tokens, settings.max_piece_length)
    uses = count_uses(trained, stretches)
    candidates = rank_candidates(uses, trained, source, settings.min_frequency)
    pieces, num_rejected = choose_reachable(candidates, source, settings.num_tokens)
    if not pieces:
        raise UserError(
            f"{', '.join(map(str, settings.data_input_dirs))}: nothing to learn: the source has every "
            f"piece that occurs {settings.min_frequency} times or more; use a larger corpus"
        )
    lines = (json.dumps({"piece": piece}, ensure_ascii=False) for piece in pieces)
    write_text_atomically(settings.output_file, "\n".join(lines) + "\n")

    num_characters = sum(len(piece) == 1 for piece in pieces)
    rows = [
        ("stretches of text", len(stretches)),
        ("characters in them", sum(map(len, stretches))),
        ("candidates", len(candidates)),
        ("candidates turned down", num_rejected),
        ("pieces learned", len(pieces)),
        ("of these single characters", num_characters),
    ]
    log(format_table(["pieces", "count"], rows))
    if len(pieces) < settings.num_tokens:
        warn(
            f"--num_tokens {settings.num_tokens}: only {len(pieces):,} pieces could be learned; a larger "
            f"corpus or a lower --min_frequency ({settings.min_frequency}) gives more"
        )
    log(f"Pieces: {settings.output_file}")


if __name__ == "__main__":
    run_command(main)

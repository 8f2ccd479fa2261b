"""Small tokenizers made piece by piece, and the steps that every test of vocabulary extension takes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from colossal_llama.tokenizer.init_tokenizer import TokenizerSettings, extend, write_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def make_proto(
    pieces: Sequence[str] | Sequence[tuple[str, float]],
    model_type: int = 2,
    other: Iterable[tuple[str, int]] = (),
    add_dummy_prefix: bool = True,
) -> Any:
    """A sentencepiece model: unk, BOS, EOS, 256 bytes, then `pieces` with falling (or the given) scores."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.trainer_spec.model_type = model_type
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = add_dummy_prefix
    proto.normalizer_spec.remove_extra_whitespaces = False
    proto.pieces.add(piece="<unk>", type=UNKNOWN, score=0)
    proto.pieces.add(piece="<s>", type=CONTROL, score=0)
    proto.pieces.add(piece="</s>", type=CONTROL, score=0)
    for byte in range(256):
        proto.pieces.add(piece=f"<0x{byte:02X}>", type=BYTE, score=0)
    for rank, piece in enumerate(pieces):
        text, score = piece if isinstance(piece, tuple) else (piece, -float(rank))
        proto.pieces.add(piece=text, score=score)
    for text, kind in other:
        proto.pieces.add(piece=text, score=0, type=kind)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return proto


def write_sentencepiece(directory: Path, proto: Any, **config: Any) -> Path:
    """Writes a LLaMA-2 style tokenizer directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(proto.SerializeToString())
    content = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(content), encoding="utf-8")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
    return directory


def write_pieces(path: Path, pieces: Iterable[str]) -> Path:
    path.write_text(
        "".join(json.dumps({"piece": piece}, ensure_ascii=False) + "\n" for piece in pieces), encoding="utf-8"
    )
    return path


def run_extension(
    source: Path, target: Path, pieces: Iterable[str], unreachable: str = "report"
) -> dict[str, Any]:
    """Runs init_tokenizer.py's steps in this process; returns the report."""
    target.parent.mkdir(parents=True, exist_ok=True)
    file = write_pieces(target.parent / f"{target.name}.jsonl", pieces)
    settings = TokenizerSettings(source, target, file, unreachable)
    write_tokenizer(settings, *extend(settings))
    return json.loads((target / "vocabulary_extension.json").read_text(encoding="utf-8"))


def load_slow(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, use_fast=False)


def load_fast(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)

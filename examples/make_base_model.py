"""Makes a tiny LLaMA and its sentencepiece BPE tokenizer from a JSONL corpus, in place of real base weights.

The tokenizer is trained on the records without Chinese characters, so Chinese text falls back to bytes, as it
mostly does in the real LLaMA-2 tokenizer, and extending the vocabulary has something to win. The weights
are random.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from colossal_llama.tokenizer.corpus_texts import read_samples
from colossal_llama.utils.arguments import ArgumentParser, directory_list, number, positive_int
from colossal_llama.utils.console import format_table, log
from colossal_llama.utils.errors import UserError, run_command
from colossal_llama.utils.files import write_json
from colossal_llama.utils.output_checks import why_not_output_directory
from colossal_llama.utils.settings import add_settings, flag, parse_settings

HAN = re.compile(r"[㐀-鿿]")


@dataclass(frozen=True)
class BaseModelSettings:
    """The corpus, and the sizes of the model that is made for it."""

    data_input_dirs: list[Path] = flag(
        None, "comma list of JSONL directories", type=directory_list, required=True
    )
    output_dir: Path = flag(None, "new or empty directory for model and tokenizer", type=Path, required=True)
    vocab_size: int = flag(2000, "pieces of the tokenizer", type=number(int, 300))
    hidden_size: int = flag(256, "width of the model", type=positive_int)
    num_layers: int = flag(4, "transformer layers", type=positive_int)
    num_heads: int = flag(4, "attention heads", type=positive_int)
    max_positions: int = flag(4096, "context length, in tokens", type=positive_int)
    seed: int = flag(0, "seed of the random weights", type=number(int, 0))


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="make_base_model.py", description=__doc__)
    add_settings(parser, BaseModelSettings, check=_check_output)
    return parser


def _check_output(settings: BaseModelSettings) -> list[str]:
    """A model that is there may be a real one."""
    output_dir = settings.output_dir
    reason = why_not_output_directory(output_dir)
    if reason is None and output_dir.is_dir() and any(output_dir.iterdir()):
        reason = "is not empty; choose another directory, or remove it first"
    return [f"--output_dir {output_dir}: {reason}"] if reason else []


def read_texts(directories: list[Path]) -> list[str]:
    """`source` and `target` of every record, the ones without Chinese characters alone."""
    texts = [text for text in read_samples(directories) if not HAN.search(text)]
    if not texts:
        raise UserError(f"{', '.join(map(str, directories))}: no *.jsonl record without Chinese characters")
    return texts


def make_tokenizer(texts: list[str], output_dir: Path, vocab_size: int) -> None:
    """Trains sentencepiece BPE with LLaMA-2's settings; writes `tokenizer.model` and its
    configuration files.
    """
    import sentencepiece

    output_dir.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(output_dir / "tokenizer"),
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        num_threads=2,
        minloglevel=2,
    )
    (output_dir / "tokenizer.vocab").unlink()
    special = {
        name: {"content": token, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
        for name, token in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))
    }
    write_json(output_dir / "special_tokens_map.json", special)
    write_json(
        output_dir / "tokenizer_config.json",
        {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "legacy": False,
            "model_max_length": 4096,
            **{name: token["content"] for name, token in special.items()},
        },
    )


def make_model(
    output_dir: Path,
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    max_positions: int,
    seed: int,
) -> int:
    """Writes a randomly initialised fp32 `LlamaForCausalLM`; returns the number of parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3 // 16 * 16,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=max(1, num_heads // 2),
        max_position_embeddings=max_positions,
        bos_token_id=1,
        eos_token_id=2,
        torch_dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(output_dir)
    return model.num_parameters()


def main() -> None:
    settings = parse_settings(build_parser(), BaseModelSettings)
    texts = read_texts(settings.data_input_dirs)
    make_tokenizer(texts, settings.output_dir, settings.vocab_size)
    parameters = make_model(
        settings.output_dir,
        settings.vocab_size,
        settings.hidden_size,
        settings.num_layers,
        settings.num_heads,
        settings.max_positions,
        settings.seed,
    )
    rows = [
        ("texts the tokenizer learned from", len(texts)),
        ("pieces", settings.vocab_size),
        ("layers", settings.num_layers),
        ("width", settings.hidden_size),
        ("random parameters", parameters),
    ]
    log(format_table(["base model", "count"], rows))
    log(f"Base model: {settings.output_dir}")


if __name__ == "__main__":
    run_command(main)

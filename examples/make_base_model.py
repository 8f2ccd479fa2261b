"""Makes a tiny LLaMA and its sentencepiece BPE tokenizer from a JSONL corpus, in place of real base weights.

The tokenizer is trained on the records without Chinese characters, so Chinese text falls back to bytes, as it
mostly does in the real LLaMA-2 tokenizer, and extending the vocabulary has something to win. The weights
are random.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from colossal_llama.tokenizer.corpus_texts import read_samples
from colossal_llama.tokenizer.output_directory import objection_to_output
from colossal_llama.utils.arguments import ArgumentParser, directory_list, number, positive_int
from colossal_llama.utils.console import format_table, log
from colossal_llama.utils.errors import UserError, run_command
from colossal_llama.utils.files import write_json

HAN = re.compile(r"[㐀-鿿]")


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="make_base_model.py", description=__doc__)
    parser.add_argument(
        "--data_input_dirs", type=directory_list, required=True, help="comma list of JSONL directories"
    )
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="new or empty directory for model and tokenizer"
    )
    parser.add_argument("--vocab_size", type=number(int, 300), default=2000, help="pieces of the tokenizer")
    parser.add_argument("--hidden_size", type=positive_int, default=256, help="width of the model")
    parser.add_argument("--num_layers", type=positive_int, default=4, help="transformer layers")
    parser.add_argument("--num_heads", type=positive_int, default=4, help="attention heads")
    parser.add_argument("--max_positions", type=positive_int, default=4096, help="context length, in tokens")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="seed of the random weights")
    parser.add_check(_check_output)
    return parser


def _check_output(args: argparse.Namespace) -> list[str]:
    """A model that is there may be a real one."""
    objection = objection_to_output(args.output_dir)
    if objection is None and args.output_dir.is_dir() and any(args.output_dir.iterdir()):
        objection = "is not empty; choose another directory, or remove it first"
    return [f"--output_dir {args.output_dir}: {objection}"] if objection else []


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
    args = build_parser().parse_args()
    texts = read_texts(args.data_input_dirs)
    make_tokenizer(texts, args.output_dir, args.vocab_size)
    parameters = make_model(
        args.output_dir,
        args.vocab_size,
        args.hidden_size,
        args.num_layers,
        args.num_heads,
        args.max_positions,
        args.seed,
    )
    rows = [
        ("texts the tokenizer learned from", len(texts)),
        ("pieces", args.vocab_size),
        ("layers", args.num_layers),
        ("width", args.hidden_size),
        ("random parameters", parameters),
    ]
    log(format_table(["base model", "count"], rows))
    log(f"Base model: {args.output_dir}")


if __name__ == "__main__":
    run_command(main)

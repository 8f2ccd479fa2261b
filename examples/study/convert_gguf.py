"""Converts a LLaMA in GGUF, as llama.cpp reads it, to a Hugging Face directory with its byte-level tokenizer.

Quantised weights are written as what they stand for, in bf16: the model is the quantised one, not the one
that it was made from. Tokenizers with two kinds of pre-tokenization are known: llama.cpp's "smollm" (each
digit by itself) and "gpt-2".
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3  # llama.cpp's LLAMA_TOKEN_TYPE_CONTROL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gguf", type=Path, required=True, help="the model, one file")
    parser.add_argument("--output_dir", type=Path, required=True, help="directory for the model")
    args = parser.parse_args()
    convert(args.gguf, args.output_dir)
    print(f"Model: {args.output_dir}")


def convert(path: Path, directory: Path) -> None:
    from gguf import GGUFReader

    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama" or fields["tokenizer.ggml.model"] != "gpt2":
        raise ValueError(f"{path}: a LLaMA with a byte-level tokenizer is needed")
    directory.mkdir(parents=True, exist_ok=True)
    tensors = read_tensors(reader, fields)
    config = make_config(fields, tied="lm_head.weight" not in tensors)
    write_weights(tensors, directory)
    write_tokenizer(fields, directory)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
    (directory / "generation_config.json").write_text(json.dumps(generation) + "\n", encoding="utf-8")


def make_config(fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    heads = fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "max_position_embeddings": fields["llama.context_length"],
        "rope_theta": fields.get("llama.rope.freq_base", 10000.0),
        "rms_norm_eps": fields["llama.attention.layer_norm_rms_epsilon"],
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
    }


def read_tensors(reader: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """Name in transformers -> values, fp32."""
    from gguf import dequantize

    heads = fields["llama.attention.head_count"]
    kv_heads = fields.get("llama.attention.head_count_kv", heads)
    tensors = {}
    for tensor in reader.tensors:
        stem, _, kind = tensor.name.rpartition(".")
        values = dequantize(tensor.data, tensor.tensor_type)
        layer = ""
        if stem.startswith("blk."):
            _, number, stem = stem.split(".")
            layer = f"model.layers.{number}."
        if stem in ("attn_q", "attn_k"):
            values = undo_rotary_order(values, heads if stem == "attn_q" else kv_heads)
        tensors[f"{layer}{NAMES[stem]}.{kind}"] = values
    return tensors


def undo_rotary_order(weight: Any, num_heads: int) -> Any:
    """GGUF pairs neighbouring dimensions of a head for the rotary embedding, transformers its two halves."""
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def write_weights(tensors: dict[str, Any], directory: Path) -> None:
    import torch
    from safetensors.torch import save_file

    converted = {
        name: torch.from_numpy(values.copy()).to(torch.bfloat16).contiguous()
        for name, values in tensors.items()
    }
    save_file(converted, directory / "model.safetensors", metadata={"format": "pt"})


def write_tokenizer(fields: dict[str, Any], directory: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    kind = fields.get("tokenizer.ggml.pre", "gpt-2")
    if kind not in ("smollm", "gpt-2"):
        raise ValueError(f"pre-tokenization {kind!r} is not known here")
    digits = [pre_tokenizers.Digits(individual_digits=True)] if kind == "smollm" else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    special = [
        AddedToken(token, special=True)
        for token, type in zip(tokens, types, strict=True)
        if type == CONTROL_TOKEN
    ]
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {
        f"{name}_token": tokens[fields[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if f"tokenizer.ggml.{key}_token_id" in fields
    }
    settings = {
        **names,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
    }
    if template := fields.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(
        json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    (directory / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""`config.json` and `generation_config.json` of a model: read and judged in one place, for every script.

transformers takes whatever these files hold: a rotary scaling that it does not know is a KeyError inside the
model, a padding token outside the vocabulary an assertion, a special token outside it a crash hours later.
Here each value that a model is built from is checked first; a problem names file, key, value and remedy.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama.upstream.byte_order_marks import accept_byte_order_marks
from colossal_llama.upstream.newer_model_config import adopt_earlier_names
from colossal_llama.utils.console import warn
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.files import read_json_object

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"

# What LLaMA's configuration class takes for a size that the file does not state.
_DEFAULT_VOCAB_SIZE = 32000
_DTYPES = ("float32", "float16", "bfloat16", "float64", "float", "half", "double")
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
_OPTIONAL_SIZES = ("num_key_value_heads", "head_dim")
_SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias")
# Kind of rotary scaling -> the fields without which it can't be computed.
_ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_ROPE_NUMBERS = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
)
# These kinds of rotary scaling stretch the positions by their factor; the others state the full length.
_STRETCHED_ROPE_TYPES = ("linear", "dynamic")
_MAX_SHOWN_CHARACTERS = 60


def read_model_config(directory: Path, where: str) -> dict[str, Any]:
    """The content of a local model's `config.json`, checked together with its `generation_config.json`.

    A padding token outside the vocabulary counts as none, with a warning.

    Args:
        where: what a message begins with: the flag and its value.

    Raises:
        UserError: naming every value that no LLaMA can have.
    """
    return _read_checked(directory / CONFIG_FILE, directory / GENERATION_CONFIG_FILE, where)


def load_model_config(name: str, where: str, trust_remote_code: bool) -> PretrainedConfig:
    """The configuration of a local model or one of the hub, checked as by `read_model_config`.

    `pad_token_id` is left as it is written; see `outside_vocabulary`.

    Raises:
        UserError: a value is wrong. Errors of transformers itself are passed on.
    """
    from transformers import AutoConfig
    from transformers.activations import ACT2FN

    accept_byte_order_marks()
    config_file = find_model_file(name, CONFIG_FILE)
    if config_file is not None:
        _read_checked(config_file, find_model_file(name, GENERATION_CONFIG_FILE), where)
    config = adopt_earlier_names(AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code))
    if config.model_type == "llama" and config.hidden_act not in ACT2FN:
        raise UserError(
            f"{where}: {CONFIG_FILE}: hidden_act {_shown(config.hidden_act)}: unknown to transformers; "
            'LLaMA has "silu"'
        )
    return config


def find_context_length(config: PretrainedConfig) -> int:
    """Positions that the model's rotary embedding covers."""
    scaling = getattr(config, "rope_scaling", None)
    if not isinstance(scaling, dict):
        return int(config.max_position_embeddings)
    rope_type = scaling.get("rope_type", scaling.get("type"))
    is_stretched = rope_type in _STRETCHED_ROPE_TYPES or (
        rope_type == "yarn" and scaling.get("original_max_position_embeddings") is None
    )
    factor = scaling.get("factor", 1.0) if is_stretched else 1.0
    return int(config.max_position_embeddings * factor)


def outside_vocabulary(token_id: int | None, vocab_size: int | None) -> bool:
    """Whether a token id has no row in the embeddings."""
    return token_id is not None and vocab_size is not None and not 0 <= token_id < vocab_size


def find_model_file(name: str, file_name: str) -> Path | None:
    """A file of a model directory, or of the hub (or its cache); None where there is none."""
    if Path(name).is_dir():
        path = Path(name) / file_name
        return path if path.is_file() else None
    from transformers.utils import cached_file

    found = cached_file(
        name,
        file_name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def _read_checked(config_file: Path, generation_file: Path | None, where: str) -> dict[str, Any]:
    config, problems = _read(config_file, f"{where}: ")
    generation: dict[str, Any] = {}
    if generation_file is not None and generation_file.is_file():
        generation, more = _read(generation_file, f"{where}: ")
        problems += more
    if not problems:
        vocab_size = _vocab_size(config)
        checks = [(CONFIG_FILE, _check_config(config)), (CONFIG_FILE, _check_ids(config, vocab_size))]
        checks.append((GENERATION_CONFIG_FILE, _check_ids(generation, vocab_size)))
        problems = [f"{where}: {file}: {problem}" for file, found in checks for problem in found]
    if problems:
        raise UserError(problems)
    for file, values in ((CONFIG_FILE, config), (GENERATION_CONFIG_FILE, generation)):
        if outside_vocabulary(values.get("pad_token_id"), vocab_size):
            warn(
                f"{where}: {file}: pad_token_id {values['pad_token_id']} is outside the vocabulary of "
                f"{vocab_size:,} and counts as none"
            )
    return config


def _read(path: Path, prefix: str) -> tuple[dict[str, Any], list[str]]:
    try:
        return read_json_object(path, name=path.name), []
    except UserError as error:
        remedy = "; the model cannot be read: copy the file again from where the model comes from"
        return {}, [f"{prefix}{problem}{remedy}" for problem in error.problems]


def _is_llama(config: Mapping[str, Any]) -> bool:
    return config.get("model_type", "llama") == "llama"


def _vocab_size(config: Mapping[str, Any]) -> int | None:
    """Rows of the embeddings; None where the file does not say (models with parts of their own)."""
    size = config.get("vocab_size", _DEFAULT_VOCAB_SIZE if _is_llama(config) else None)
    return size if _is_integer(size) and size > 0 else None


def _check_ids(values: Mapping[str, Any], vocab_size: int | None) -> Iterator[str]:
    """Problems with the special tokens; a padding token outside the vocabulary is none."""
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        given = values.get(key)
        ids = given if key == "eos_token_id" and isinstance(given, list) else [given]
        for token_id in ids:
            if token_id is None and ids is not given:
                continue
            if not _is_integer(token_id):
                kind = "a token id or a list of them" if key == "eos_token_id" else "a token id"
                yield f"{key} {_shown(given)}: is not {kind}; write whole numbers, or null for none"
                break
            if key != "pad_token_id" and outside_vocabulary(token_id, vocab_size):
                yield (
                    f"{key} {_shown(given)}: {token_id} is outside the vocabulary of {vocab_size:,}; write "
                    "the id that the model's tokenizer has for it"
                )
                break


def _check_config(config: Mapping[str, Any]) -> Iterator[str]:
    for key in ("torch_dtype", "dtype"):
        if config.get(key) is not None and config[key] not in _DTYPES:
            yield f"{key} {_shown(config[key])}: unknown; write one of {', '.join(_DTYPES[:3])}"
    if not _is_llama(config):
        return
    for key in (*_SIZES, *_OPTIONAL_SIZES):
        value = config.get(key)
        if key not in config or (value is None and key in _OPTIONAL_SIZES):
            continue
        if not _is_integer(value) or value < 1:
            yield f"{key} {_shown(value)}: is not a whole number above 0; write the model's own"
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if _is_integer(heads) and _is_integer(groups) and groups > 0 and heads % groups:
        yield f"num_key_value_heads {groups}: does not divide num_attention_heads {heads}; write a divisor"
    for key in ("rms_norm_eps", "rope_theta"):
        if key in config and not _is_number(config[key], above=0):
            yield f"{key} {_shown(config[key])}: is not a number above 0; write the model's own"
    dropout = config.get("attention_dropout")
    if dropout is not None and not (_is_number(dropout) and 0 <= dropout < 1):
        yield f"attention_dropout {_shown(dropout)}: is not a number from 0 to 1; write 0.0"
    for key in _SWITCHES:
        if config.get(key) is not None and not isinstance(config[key], (bool, int)):
            yield f"{key} {_shown(config[key])}: is not true or false; write one of them"
    if "hidden_act" in config and not isinstance(config["hidden_act"], str):
        yield f'hidden_act {_shown(config["hidden_act"])}: is not a name; LLaMA has "silu"'
    for key in ("rope_scaling", "rope_parameters"):
        yield from _check_rope(config, key)


def _check_rope(config: Mapping[str, Any], key: str) -> Iterator[str]:
    """Problems with `rope_scaling`, or with what transformers 5 calls `rope_parameters`."""
    rope = config.get(key)
    if rope is None:
        return
    if not isinstance(rope, dict):
        yield f'{key} {_shown(rope)}: is not an object; write null, or {{"rope_type": …}}'
        return
    known = ", ".join(_ROPE_FIELDS)
    kinds = {name: rope[name] for name in ("rope_type", "type") if name in rope}
    if not kinds and key == "rope_scaling":
        yield f"{key} {_shown(rope)}: has no rope_type; add one of {known}, or write null for no scaling"
        return
    for name, kind in kinds.items():
        if not isinstance(kind, str) or kind not in _ROPE_FIELDS:
            yield f"{key}.{name} {_shown(kind)}: unknown; transformers' LLaMA knows {known}"
            return
    if len(set(kinds.values())) > 1:
        yield (
            f"{key}.type {_shown(rope['type'])}: rope_type says {_shown(rope['rope_type'])}; "
            "leave one of the two out"
        )
        return
    kind = next(iter(kinds.values()), "default")
    missing = [field for field in _ROPE_FIELDS[kind] if rope.get(field) is None]
    if kind == "longrope" and config.get("original_max_position_embeddings") is None:
        missing += [] if _is_given(rope, "factor") or _is_given(rope, "attention_factor") else ["factor"]
    if missing:
        yield f"{key}: rope_type {kind} needs {' and '.join(missing)}, which it lacks; add the model's own"
    for field in (*_ROPE_NUMBERS, "rope_theta"):
        least = None if field.startswith("mscale") else 0
        if _is_given(rope, field) and not _is_number(rope[field], above=least):
            what = "a number" if least is None else "a number above 0"
            yield f"{key}.{field} {_shown(rope[field])}: is not {what}; write the model's own"
    for field in ("short_factor", "long_factor"):
        factors = rope.get(field)
        if kind == "longrope" and factors is not None:
            yield from _check_factors(config, f"{key}.{field}", factors)
    low, high = rope.get("low_freq_factor"), rope.get("high_freq_factor")
    if kind == "llama3" and _is_number(low) and _is_number(high) and high <= low:
        yield f"{key}.high_freq_factor {high}: must be above low_freq_factor {low}; write the model's own"


def _check_factors(config: Mapping[str, Any], name: str, factors: Any) -> Iterator[str]:
    if not isinstance(factors, list) or not all(_is_number(factor, above=0) for factor in factors):
        yield f"{name} {_shown(factors)}: is not a list of numbers above 0; write the model's own"
        return
    size = config.get("head_dim")
    width, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if size is None and _is_integer(width) and _is_integer(heads) and heads > 0:
        size = width // heads
    if _is_integer(size) and len(factors) != size // 2:
        yield f"{name}: holds {len(factors)} numbers; each head has {size // 2} frequencies, write that many"


def _is_given(values: Mapping[str, Any], key: str) -> bool:
    return values.get(key) is not None


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any, above: float | None = None) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    is_finite = abs(value) <= sys.float_info.max  # also of whole numbers that no float can hold
    return is_finite and (above is None or value > above)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MAX_SHOWN_CHARACTERS else text[:_MAX_SHOWN_CHARACTERS] + "…"

"""Types of numbers by their three names: of flags (bf16), of safetensors (BF16) and of torch (bfloat16)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Of matrices that can be computed with: name in flags -> name in safetensors.
FLOAT_FLAGS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2,
    "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
# Name in safetensors -> name in torch, which cannot compute with the unsigned types that are missing here.
_TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
_SAFETENSORS_NAMES = {torch_name: name for name, torch_name in _TORCH_NAMES.items()}


def is_float(name: str) -> bool:
    """Whether a safetensors type is one of those that embeddings can have."""
    return name in FLOAT_FLAGS.values()


def torch_name(name: str) -> str | None:
    """`bfloat16` for "BF16" or "bf16"; None for a type that torch cannot compute with."""
    return _TORCH_NAMES.get(FLOAT_FLAGS.get(name, name))


def torch_dtype(name: str) -> Any:
    """`torch.bfloat16` for "BF16" or "bf16"; None for a type that torch cannot compute with."""
    import torch

    found = torch_name(name)
    return found and getattr(torch, found)


def safetensors_name(dtype: torch.dtype) -> str | None:
    """`BF16` for `torch.bfloat16`; None for a type that safetensors files cannot hold."""
    return _SAFETENSORS_NAMES.get(str(dtype).removeprefix("torch."))


def flag_name(dtype: torch.dtype) -> str | None:
    """`bf16` for `torch.bfloat16`; None for a type that no flag has a name for."""
    return next((flag for flag, name in FLOAT_FLAGS.items() if name == safetensors_name(dtype)), None)

"""Two output directories of the same command, compared by what the files hold."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

# Times and speeds in records of training.
_TIMING = re.compile(r"seconds|per_second|tflops|mfu")
# A set in peft's configuration, which it writes in any order.
_UNORDERED = ("target_modules",)
# Pictures, TensorBoard's events (times), locks, the resume cache of data preparation.
_LEFT_OUT = re.compile(r"\.png$|events\.out\.tfevents|/\.lock$|/cache/")


def list_files(directory: Path) -> set[str]:
    """Paths below a directory of the files that are compared."""
    paths = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return {path for path in paths if not _LEFT_OUT.search(f"/{path}")}


def compare_directories(old: Path, new: Path) -> tuple[int, str | None]:
    """Number of files compared, and the first difference."""
    old_files, new_files = list_files(old), list_files(new)
    for name in sorted(old_files ^ new_files):
        return 0, f"{name}: only {'old' if name in old_files else 'new'} has it"
    for number, name in enumerate(sorted(old_files)):
        difference = compare_files(old / name, new / name)
        if difference:
            return number + 1, f"{name}: {difference}"
    return len(old_files), None


def compare_files(old: Path, new: Path) -> str | None:
    """The first difference; safetensors by tensor, JSON by value, other files by bytes."""
    if old.suffix == ".safetensors":
        return _compare_tensors(old, new)
    if old.read_bytes() == new.read_bytes():
        return None
    if old.suffix == ".jsonl":
        texts = [path.read_text(encoding="utf-8").splitlines() for path in (old, new)]
        if len(texts[0]) != len(texts[1]):
            return f"{len(texts[0])} lines in old, {len(texts[1])} in new"
        for number, lines in enumerate(zip(*texts, strict=True), start=1):
            difference = compare_values(*(json.loads(line) for line in lines))
            if difference:
                return f"line {number}: {difference}"
        return None
    if old.suffix == ".json" or old.name in ("lr_scheduler", "COMPLETE"):
        values = [json.loads(path.read_text(encoding="utf-8")) for path in (old, new)]
        if old.name == "COMPLETE":  # sizes and checksums of files that are compared themselves
            values = [sorted(value) for value in values]
        return compare_values(*values)
    return _compare_bytes(old.read_bytes(), new.read_bytes())


def _compare_bytes(old: bytes, new: bytes) -> str:
    if len(old) != len(new):
        return f"{len(old)} bytes in old, {len(new)} in new"
    position = next(index for index, (a, b) in enumerate(zip(old, new, strict=True)) if a != b)
    return f"differs from byte {position} on"


def compare_values(old: Any, new: Any, key: str = "") -> str | None:
    """The first key of two JSON values that differs, times and library versions left out."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(name for name in new if name not in old)]:
            if _TIMING.search(name) or name == "versions":
                continue
            path = f"{key}.{name}" if key else name
            if name not in new or name not in old:
                return f"{path}: only {'old' if name in old else 'new'} has it"
            values = [old[name], new[name]]
            if name in _UNORDERED and all(isinstance(value, list) for value in values):
                values = [sorted(value) for value in values]
            difference = compare_values(*values, path)
            if difference:
                return difference
        return None
    if isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return f"{key}: {len(old)} entries in old, {len(new)} in new"
        pairs = enumerate(zip(old, new, strict=True))
        differences = (compare_values(a, b, f"{key}[{index}]") for index, (a, b) in pairs)
        return next(filter(None, differences), None)
    # As text, for NaN equals itself there and 1 is not 1.0.
    return None if json.dumps(old) == json.dumps(new) else f"{key}: {old!r} in old, {new!r} in new"


def _compare_tensors(old: Path, new: Path) -> str | None:
    import torch
    from safetensors import safe_open

    with safe_open(old, "pt") as a, safe_open(new, "pt") as b:
        if a.metadata() != b.metadata():
            return f"metadata {a.metadata()} in old, {b.metadata()} in new"
        old_names, new_names = set(a.keys()), set(b.keys())
        for name in sorted(old_names ^ new_names):
            return f"{name}: only {'old' if name in old_names else 'new'} has it"
        for name in sorted(old_names):
            x, y = a.get_tensor(name), b.get_tensor(name)
            if x.dtype != y.dtype or x.shape != y.shape:
                return f"{name}: {x.dtype} {list(x.shape)} in old, {y.dtype} {list(y.shape)} in new"
            # By bytes: 0 and -0 differ, NaN equals itself.
            if not torch.equal(
                x.contiguous().view(-1).view(torch.uint8), y.contiguous().view(-1).view(torch.uint8)
            ):
                largest = float((x.double() - y.double()).abs().max())
                return f"{name}: values differ by up to {largest:.3g}"
    return None

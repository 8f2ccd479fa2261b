"""The random number generators of one process, as bytes that hold no pickled objects."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import torch

from colossal_llama.utils.errors import UserError


def random_state() -> bytes:
    """The state of python's, numpy's, torch's and the GPU's generator."""
    kind, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def restore_random_state(path: Path) -> None:
    """Sets the generators to what `random_state` gave.

    Raises:
        UserError: the file holds something else.
    """
    try:
        # A checkpoint may be a stranger's, and pickled objects run code when they are loaded.
        state = torch.load(path, weights_only=True)
        kind, keys, *rest = state["numpy"]
        random.setstate(state["python"])
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
        torch.set_rng_state(state["torch"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
    except Exception:  # whatever unpickling makes of a file of another kind
        raise UserError(
            f"{path}: not the state of random number generators as train.py saves it; "
            "give the checkpoint's modeling directory to start a new stage from its weights"
        ) from None

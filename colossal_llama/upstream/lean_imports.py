"""Importing colossalai and transformers loads much that this suite never uses.

Broken in: transformers 4.51.3: assisted generation and detection losses load sklearn and scipy. torch 2.5.1:
`torch.compile` loads the compiler when it only decorates a function, as colossalai 0.5.0 and bitsandbytes
0.50.2 do at import.
Shows as: every start takes seconds longer.
Cure: what is optional looks absent during the import, and what is decorated stays as it is.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

# Optional to the libraries, which ask whether they are there: detection losses (scipy), assisted generation
# (sklearn), SageMaker (boto3).
_NEVER_USED = ("boto3", "scipy", "sklearn")

_LIBRARIES_THAT_LOOK = ("transformers", "accelerate", "peft")


@contextlib.contextmanager
def lean_imports() -> Iterator[None]:
    """Makes the imports in the block faster, and changes nothing that this suite does.

    Packages that are optional to the libraries look absent, unless they, or libraries that have already seen
    them, were imported before. And functions that are decorated with `torch.compile` stay as they are:
    decorating them loads the whole compiler, and colossalai's and bitsandbytes' few are for fp8, quantisation
    and ring attention.
    """
    import torch

    hidden: list[str] = []
    if not any(library in sys.modules for library in _LIBRARIES_THAT_LOOK):
        hidden = [name for name in _NEVER_USED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # None: `import` fails, `find_spec` finds nothing
    compile_function = torch.compile
    torch.compile = _leave_uncompiled
    try:
        yield
    finally:
        torch.compile = compile_function
        for name in hidden:
            if sys.modules.get(name) is None:
                sys.modules.pop(name, None)


def _leave_uncompiled(model: Callable | None = None, **options: Any) -> Callable:
    """In place of `torch.compile`, plain or as a decorator with options."""
    return (lambda function: function) if model is None else model

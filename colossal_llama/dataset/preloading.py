"""Imported by the server that local workers are forked from: calls the function that an environment variable
names, so that what it loads is loaded once, whatever the number of workers.

The variable holds a JSON list: module, function, arguments. The server must stay a process of one thread.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os

VARIABLE = "COLOSSAL_LLAMA_PRELOAD"


def _preload() -> None:
    module, name, *arguments = json.loads(os.environ.pop(VARIABLE))
    # A worker that needs it meets the same error, and can tell the user.
    with contextlib.suppress(Exception):
        getattr(importlib.import_module(module), name)(*arguments)
    gc.freeze()  # collections in the workers need not look at it, nor copy its pages


if VARIABLE in os.environ:
    _preload()

"""The environment that every host gets from the shell that launches; all else is each host's own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase

from colossal_llama.utils.errors import UserError

PASSED_ON = (
    "PATH",
    "PYTHONPATH",
    "LD_LIBRARY_PATH",
    "NCCL_*",
    "GLOO_*",
    "CUDA_*",
    "OMP_*",
    "HF_*",
    "TORCH_NCCL_*",
    "TOKENIZERS_PARALLELISM",
    "PYTORCH_CUDA_ALLOC_CONF",
    "COLOSSAL_LLAMA_*",
)
# `colossalai run` writes NAME="VALUE" into a shell command and escapes nothing.
_UNSAFE = re.compile(r'["$`\\\n]')


def environment_to_pass_on(environ: Mapping[str, str]) -> dict[str, str]:
    """The part of `environ` that belongs to the run.

    Raises:
        UserError: a value holds a character that `colossalai run` can't hand to a shell.
    """
    chosen = {
        name: value
        for name, value in environ.items()
        if any(fnmatchcase(name, pattern) for pattern in PASSED_ON)
    }
    problems = [
        f"{name}: its value holds a quote, $, `, \\ or a line break, which `colossalai run` can't pass on; "
        "set it on each host itself, or unset it"
        for name, value in chosen.items()
        if _UNSAFE.search(value)
    ]
    if problems:
        raise UserError(problems)
    return chosen

"""Libraries write messages that say nothing about a healthy run.

Broken in: the library that each entry names, in the versions of requirements.txt.
Shows as: warnings on every start, between which those of this suite are lost.
Cure: each message is named here, with the reason; everything else that a library says is passed on. Filters,
not levels, where the logger is known: some libraries set their levels again.
"""

from __future__ import annotations

import logging
import os
import re
import warnings

# (logger, beginning of the message or a pattern of it)
_LOG_MESSAGES = (
    # Said of every LLaMA-2 tokenizer whose configuration does not mention `legacy`: the model was trained
    # with what is then the default, so that is the right one.
    ("transformers.models.llama.tokenization_llama", r"You are using the default legacy behaviour"),
    ("transformers.models.llama.tokenization_llama_fast", r"You are using the default legacy behaviour"),
    # Lengths are checked here, with messages that name the limit.
    ("transformers.tokenization_utils_base", r"Token indices sequence length is longer"),
    # Made once a machine, while the first picture is drawn.
    ("matplotlib.font_manager", r"Matplotlib is building the font cache"),
    # With one data-parallel rank ZeRO only costs a copy; the layout was chosen, and resumes as it is.
    ("colossalai", r".*Use Zero Optimizer when data parallel size is 1"),
    # Its logger prints in front of each message where in its own code that comes from.
    ("colossalai", r"(\S+ - \S+ - \w+: )?\S+:\d+ \S+\s*$"),
)
_WARNINGS = (
    r".*tensornvme.*",  # offloading to NVMe, which no plugin here uses
    r".*install apex from source.*",  # optional; the first log lines say whether it was found
    r"TypedStorage is deprecated",  # Gemini's chunks free and allocate their storage through it
    r"`pad_token_id` should be positive but got",  # a warning of ours names the file
)

# colossalai's optional quantisation: its loggers, of several names, warn where there is no GPU that their
# kernels for it are missing.
_ERRORS_ONLY = ("bitsandbytes",)


def quieten_libraries() -> None:
    """Silences the messages above in this process; may be called before the libraries are imported."""
    for logger in _ERRORS_ONLY:
        logging.getLogger(logger).setLevel(logging.ERROR)
    # Threads of tokenizers do not survive the fork of a data loader's worker; it warns, and does without.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for logger, pattern in _LOG_MESSAGES:
        logging.getLogger(logger).addFilter(_Dropper(pattern))
    for pattern in _WARNINGS:
        warnings.filterwarnings("ignore", message=pattern)


class _Dropper(logging.Filter):
    def __init__(self, pattern: str) -> None:
        super().__init__()
        self.pattern = re.compile(pattern, re.DOTALL)

    def filter(self, record: logging.LogRecord) -> bool:
        return not self.pattern.match(record.getMessage())

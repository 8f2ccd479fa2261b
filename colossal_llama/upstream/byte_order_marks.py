"""Configurations that begin with a byte order mark are not read.

Broken in: transformers 4.51.3, `PretrainedConfig` and `GenerationConfig`: they decode files as plain UTF-8.
Shows as: a `config.json` that some Windows editors have saved is reported as damaged, and a
`generation_config.json` is silently left out.
Cure: read both as UTF-8 with or without a mark.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def accept_byte_order_marks() -> None:
    """Replaces the function that reads the files of both classes; may be called often."""
    from transformers import GenerationConfig, PretrainedConfig

    def read(cls: type, json_file: str) -> Any:
        return json.loads(Path(json_file).read_text(encoding="utf-8-sig"))

    for configuration in (PretrainedConfig, GenerationConfig):
        configuration._dict_from_json_file = classmethod(read)

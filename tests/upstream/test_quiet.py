"""Chosen messages are silenced, their neighbours are not."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from canaries import StillBroken, canary

COLOSSALAI = """
from colossal_llama.upstream.quiet import quieten_libraries
quieten_libraries()
import warnings
from colossalai.logging import get_dist_logger
logger = get_dist_logger()
logger.warning("Use Zero Optimizer when data parallel size is 1 may be slow", ranks=[0])
logger.warning("something else", ranks=[0])
warnings.warn("please install apex from source")
warnings.warn("another warning")
"""
TRANSFORMERS = """
from colossal_llama.upstream.quiet import quieten_libraries
quieten_libraries()
from transformers.utils import logging
logger = logging.get_logger("transformers.tokenization_utils_base")
logger.warning("Token indices sequence length is longer than the specified maximum")
logger.warning("something else")
"""


@pytest.mark.parametrize("script", [COLOSSALAI, TRANSFORMERS])
def test_what_is_silenced_is_chosen(script: str, root) -> None:
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root
    )
    output = result.stdout + result.stderr
    assert "something else" in output
    assert ("another warning" in output) == ("another warning" in script)
    for silenced in ("Zero Optimizer", "<module>", "apex", "Token indices"):
        assert silenced not in output


# Module of a library -> words of its message that is silenced.
MESSAGES = {
    "transformers.models.llama.tokenization_llama": "You are using the default legacy behaviour",
    "transformers.models.llama.tokenization_llama_fast": "You are using the default legacy behaviour",
    "transformers.tokenization_utils_base": "Token indices sequence length is longer",
    "matplotlib.font_manager": "Matplotlib is building the font cache",
    "colossalai.booster.plugin.hybrid_parallel_plugin": "Use Zero Optimizer when data parallel size is 1",
    "colossalai.logging.logger": "def __get_call_info",
    "colossalai.utils.safetensors": "tensornvme",
    "colossalai.shardformer.layer.normalization": "install apex from source",
    "colossalai.zero.gemini.chunk.chunk": "tensor.storage()",
    "bitsandbytes.backends.cpu.ops": "logger.warning(",
}


@pytest.mark.parametrize(
    ("module", "message"),
    [
        pytest.param(module, message, marks=canary(f"{module.partition('.')[0]}: quiet"), id=module)
        for module, message in MESSAGES.items()
    ],
)
def test_no_message_is_left_to_silence(module: str, message: str) -> None:
    """Reads the source alone: what brings each of them about differs."""
    library, _, rest = module.partition(".")
    package = Path(importlib.util.find_spec(library).origin).parent
    if message in (package / (rest.replace(".", "/") + ".py")).read_text(encoding="utf-8"):
        raise StillBroken

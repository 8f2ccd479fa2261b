"""Chosen messages are silenced, their neighbours are not."""

from __future__ import annotations

import subprocess
import sys

import pytest

COLOSSALAI = """
from colossal_llama.utils.quiet import quieten_libraries
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
from colossal_llama.utils.quiet import quieten_libraries
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

"""What lean imports leave out, and that they leave no trace."""

from __future__ import annotations

import subprocess
import sys

import pytest
from canaries import canary, expect_right, run_python
from support import ROOT

PROBE = """
import sys, torch
{first}
from colossal_llama.upstream.lean_imports import lean_imports
compile_function = torch.compile
try:
    with lean_imports():
        {inside}
except RuntimeError as error:
    assert str(error) == "from inside"
assert torch.compile is compile_function
assert not [name for name, module in sys.modules.items() if module is None and name in ("scipy", "sklearn")]
import scipy
print([name for name in ("torch._inductor.compile_fx", "sklearn.metrics") if name in sys.modules])
"""


def loaded(inside: str, first: str = "") -> str:
    code = PROBE.format(inside=inside, first=first)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_the_compiler_is_not_loaded_by_decorating() -> None:
    assert loaded("import transformers.generation.utils, bitsandbytes") == "[]"
    decorated = "f = torch.compile(abs); g = torch.compile(mode='max-autotune')(abs); assert f is g is abs"
    assert loaded(decorated) == "[]"


def test_everything_is_restored_after_an_error() -> None:
    assert loaded('raise RuntimeError("from inside")') == "[]"


@pytest.mark.parametrize("library", ["transformers", "accelerate"])
def test_nothing_is_hidden_from_libraries_that_have_seen_it(library: str) -> None:
    """They remember what was there, and would fail to import it."""
    loaded("import transformers.generation.candidate_generator", first=f"import {library}")


@pytest.fixture(scope="module")
def loaded_without_the_cure() -> str:
    code = """
import sys, torch
torch.compile(mode="max-autotune")(abs)
compiler = "torch._inductor" in sys.modules
import transformers.generation.utils
print("compiler loaded," * compiler, "sklearn loaded" * ("sklearn" in sys.modules))
"""
    return run_python(code, TORCHINDUCTOR_COMPILE_THREADS="1")


@canary("torch 2.5.1: lean_imports")
def test_decorating_loads_no_compiler(loaded_without_the_cure: str) -> None:
    expect_right(loaded_without_the_cure if "compiler" in loaded_without_the_cure else "right", "compiler")


@canary("transformers 4.51.3: lean_imports")
def test_importing_generation_loads_no_optional_package(loaded_without_the_cure: str) -> None:
    expect_right(loaded_without_the_cure if "sklearn" in loaded_without_the_cure else "right", "sklearn")

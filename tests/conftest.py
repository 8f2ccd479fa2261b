"""Tiny real tokenizers and models, made once a session and never changed by a test."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "distributed"), str(ROOT / "tests" / "upstream")]

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

# Started with `&` or nohup, this process ignores signals, and so would the programs that are tested for them:
# what is ignored is inherited, a handler is not.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, lambda *_: None)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

from corpus import sample_texts  # noqa: E402
from support import load_script, make_llama3_tokenizer  # noqa: E402

pytest_plugins = ["parity", "training_inputs", "example_scripts", "hosts"]

# Machines that run tests are shared: how long an example takes says nothing.
settings.register_profile("shared_machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared_machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--run-slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes: run with --run-slow"))


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def llama2_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentencepiece BPE with LLaMA-2's settings, 500 pieces, trained on English: Chinese goes to bytes."""
    directory = tmp_path_factory.mktemp("llama2_tokenizer")
    maker = load_script(ROOT / "examples" / "make_base_model.py")
    maker.make_tokenizer(sample_texts(300, seed=1, chinese=False), directory, vocab_size=500)
    return directory


@pytest.fixture(scope="session")
def llama3_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level BPE in LLaMA-3's shape, 600 pieces."""
    directory = tmp_path_factory.mktemp("llama3_tokenizer")
    make_llama3_tokenizer(sample_texts(300, seed=1, chinese=False), directory, vocab_size=600)
    return directory


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory, llama2_tokenizer_dir: Path) -> Path:
    """A randomly initialised LLaMA (2 layers, width 64, 4 heads, 2 key/value heads) with its tokenizer."""
    import shutil

    directory = tmp_path_factory.mktemp("tiny_model")
    shutil.copytree(llama2_tokenizer_dir, directory, dirs_exist_ok=True)
    maker = load_script(ROOT / "examples" / "make_base_model.py")
    maker.make_model(directory, 500, hidden_size=64, num_layers=2, num_heads=4, max_positions=512, seed=0)
    return directory

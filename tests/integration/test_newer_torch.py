"""Training with a newer PyTorch than colossalai allows, in an environment of its own.

Slow: PyTorch is a download of 190 MB, and both environments train.
"""

from __future__ import annotations

import json
import site
import subprocess
import sys
from pathlib import Path

import pytest
from launch import ROOT, command, environment, train

# The newest that was tried. The CPU's wheel: without 2.5 GB of CUDA.
NEWER = "2.13.0+cpu"
# torch asks for a newer sympy than the one of PyTorch 2.5.
REQUIREMENTS = [f"torch=={NEWER}", "sympy>=1.13.3", "mpmath"]
FLAGS = ["--lr", 1e-3, "--warmup_steps", 2, "--seed", 7, "--batch_size", 2, "--accumulation_steps", 2]
FLAGS += ["--mixed_precision", "fp32", "--save_interval", 3, "--skip_save_each_epoch"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def newer_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python with the newer torch, and everything else from this environment."""
    directory = tmp_path_factory.mktemp("newer_torch") / "environment"
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    python = directory / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", *REQUIREMENTS]
    installed = subprocess.run(install, capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"torch {NEWER} can't be installed here: {installed.stderr.strip().splitlines()[-1]}")
    (own,) = (directory / "lib").glob("python*/site-packages")
    # After its own packages.
    (own / "zz_others.pth").write_text("\n".join(site.getsitepackages()) + "\n", encoding="utf-8")
    found = subprocess.run(
        [python, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == NEWER
    return python


def train_with(python: Path, directory: Path, processes: int, *arguments: object, **options) -> list[dict]:
    directory.mkdir(parents=True, exist_ok=True)
    words = command(directory, processes, [str(argument) for argument in arguments], **options)
    done = subprocess.run([str(python), *words[1:]], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    metrics = directory / "logs" / "metrics.jsonl"
    if not metrics.is_file():
        return []
    return [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    "plugin", ["--plugin ddp", "--plugin zero2", "--plugin 3d --tp 2 --accumulation_steps 4"]
)
def test_it_trains_saves_and_resumes_the_same(plugin, newer_python, training_inputs, tmp_path):
    flags = [*training_inputs.flags(), *FLAGS, *plugin.split()]
    ours = train(tmp_path / "ours", 2, *flags, "--max_steps", 6)
    assert ours.returncode == 0, ours.output[-3000:]
    newer = train_with(newer_python, tmp_path / "newer", 2, *flags, "--max_steps", 6)
    losses = [record["loss"] for record in newer]
    assert losses == pytest.approx(ours.losses(), rel=1e-5)
    # A checkpoint of the older torch is resumed by the newer one.
    checkpoint = tmp_path / "ours" / "checkpoints" / "epoch-0_step-3"
    resumed = train_with(
        newer_python, tmp_path / "resumed", 2, *flags, "--max_steps", 6, "--load_checkpoint", checkpoint
    )
    assert [record["loss"] for record in resumed] == pytest.approx(losses[3:], rel=1e-5)


def test_its_cuda_branch(newer_python, tmp_path):
    """Flash attention by `varlen_attn`, whose kernel is a stand-in."""
    from plugin_cases import make_config
    from transformers import LlamaForCausalLM

    config = make_config(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    config.initializer_range = 0.1
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    script = ROOT / "tests" / "distributed" / "cuda_branch_steps.py"
    flags = ["--pretrained", tmp_path / "model", "--benchmark", "--max_length", 32, "--batch_size", 2]
    train_with(newer_python, tmp_path, 2, *flags, "--deterministic", script=script)
    outcomes = json.loads((tmp_path / "outcomes.json").read_text(encoding="utf-8"))
    cases = {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, dict)}
    assert len(cases) > 10
    assert [outcome["error"] for outcome in cases.values() if "error" in outcome] == []
    expected = pytest.approx(cases["plain"]["losses"], rel=2e-3)
    assert [name for name, outcome in cases.items() if outcome["losses"] != expected] == []
    assert [name for name, outcome in cases.items() if outcome["races"]] == []
    assert "flash attention by torch's varlen_attn" in cases["zero2, torch's kernel"]["kernels"]

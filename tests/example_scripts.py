"""The example launch scripts in a directory that looks like the clone, filled in with small shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import ROOT
from training_inputs import TrainingInputs

SETTINGS = (
    "PROJECT_NAME",
    "PARENT_SAVE_DIR",
    "PARENT_TENSORBOARD_DIR",
    "PARENT_CONFIG_FILE",
    "PRETRAINED_MODEL_PATH",
)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Where scripts can be filled in; directories made by them have spaces in their names."""
    directory = tmp_path / "clone"
    directory.mkdir()
    for name in ("train.py", "examples", "colossal_llama", "version.txt"):
        (directory / name).symlink_to(ROOT / name)
    return directory


def fill_in(
    clone: Path,
    example: str,
    inputs: TrainingInputs,
    settings: dict[str, object] | None = None,
    flags: dict[str, object] | None = None,
) -> None:
    """Writes `train.sh`: the example with its variables set, rows of small length, and `flags` changed."""
    text = (ROOT / example).read_text(encoding="utf-8")
    values = {
        "PROJECT_NAME": "trial",
        "PARENT_SAVE_DIR": clone / "all runs",
        "PARENT_TENSORBOARD_DIR": clone / "all logs",
        "PARENT_CONFIG_FILE": clone / "configs",
        "PRETRAINED_MODEL_PATH": inputs.model,
        **(settings or {}),
    }
    for name, value in values.items():
        assert f'\n{name}=""' in text
        text = text.replace(f'\n{name}=""', f'\n{name}="{value}"')
    text = text.replace("declare -a dataset=(", f'declare -a dataset=("{inputs.data / "part-00000"}"')
    lines = text.splitlines()
    for flag, value in {"max_length": 96, **(flags or {})}.items():
        (number,) = [i for i, line in enumerate(lines) if line.startswith(f"    --{flag} ")]
        lines[number] = f"    --{flag} {value}" + (" \\" if lines[number].endswith("\\") else "")
    (clone / "train.sh").write_text("\n".join(lines) + "\n", encoding="utf-8")

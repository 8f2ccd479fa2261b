"""The pipeline of README.md, copied into a shell and run on the bundled sample.

Only the variables at its beginning are other ones, and sizes that a sample of a few pages does not fill.

Slow: it trains twice in two processes and compares four models (three minutes on two busy cores).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from support import ROOT

SECTION = "## The pipeline with your own data\n"
# What the sample is too small for, and what it gets.
SIZES = {
    "--num_tokens 20000": "--num_tokens 300",
    "--max_length 4096": "--max_length 512",
    "--held_out_share 0.01": "--held_out_share 0.1",
    "--accumulation_steps 8": "--accumulation_steps 1",
}


def pipeline() -> tuple[str, str]:
    """The variables, and all commands after them."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition(SECTION)[2].partition("\n## ")[0]
    variables, *commands = re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return variables, "".join(commands)


def test_every_variable_is_set_and_used() -> None:
    variables, commands = pipeline()
    assert set(re.findall(r"^(\w+)=", variables, flags=re.MULTILINE)) == set(re.findall(r"\$(\w+)", commands))
    assert all(size in commands for size in SIZES)


@pytest.mark.slow
def test_the_pipeline_of_the_readme(tmp_path: Path) -> None:
    new, old, conversations = tmp_path / "new text", tmp_path / "old", tmp_path / "conversations"
    for directory in (new, old):
        directory.mkdir()
    for path in (ROOT / "examples/data/pretrain").glob("*.jsonl"):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        is_new = [bool(re.search("[一-鿿]", line)) for line in lines]
        for directory, wanted in ((new, True), (old, False)):
            chosen = [line for line, chinese in zip(lines, is_new, strict=True) if chinese == wanted]
            (directory / path.name).write_text("".join(chosen), encoding="utf-8")
    shutil.copytree(ROOT / "examples/data/sft", conversations)

    variables, commands = pipeline()
    for size, other in SIZES.items():
        commands = commands.replace(size, other)
    values = {
        "BASE_MODEL": tmp_path / "base",
        "NEW_TEXT": new,
        "OLD_TEXT": old,
        "CONVERSATIONS": conversations,
        "WORK": tmp_path / "work",
        "NUM_GPUS": 2,
    }
    assert set(values) == set(re.findall(r"^(\w+)=", variables, flags=re.MULTILINE))
    settings = "".join(f"{name}='{value}'\n" for name, value in values.items())
    base = f"--data_input_dirs {old} --output_dir $BASE_MODEL --vocab_size 800"
    path = f"{Path(sys.executable).parent}:{sysconfig.get_path('scripts')}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1"}
    done = subprocess.run(
        ["bash", "-e"],
        input=f"{settings}\npython examples/make_base_model.py {base}\n{commands}",
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]

    work = values["WORK"]
    results = json.loads((work / "comparison" / "comparison.json").read_text(encoding="utf-8"))["results"]
    scores = {(each["model"], each["set"]): each["bits_per_byte"] for each in results if not each["category"]}
    models, sets = zip(*scores, strict=True)
    assert (len(set(models)), len(set(sets)), len(scores)) == (4, 2, 8)
    (new_set,) = (name for name in set(sets) if "new" in name)
    assert scores["work/pretrain", new_set] < scores["work/model", new_set] < scores["base", new_set]
    for stage in ("pretrain", "sft"):
        assert (work / stage / "modeling" / "config.json").is_file()
        assert (work / f"{stage}_logs" / "training_curves.png").is_file()

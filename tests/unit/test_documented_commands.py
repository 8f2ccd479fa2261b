"""Every command in README, docs and shell examples goes through the parser of the script that it calls."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
from support import ROOT, load_script

DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "examples/data/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
ARGUMENTS = load_script(ROOT / "docs/make_arguments.py")
# Launchers and the options of theirs that take a value.
LAUNCHERS = {
    "python": (),
    "torchrun": ("--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--master_port"),
    "colossalai": ("--nproc_per_node", "--hostfile", "--host", "--master_addr", "--master_port"),
}
DIRECTORIES = (
    "--source_tokenizer_dir",
    "--source_model_and_tokenizer_path",
    "--target_tokenizer_path",
    "--tokenizer_dir",
    "--pretrained",
    "--dataset",
    "--eval_dataset",
    "--load_checkpoint",
    "--model_path",
    "--base_model",
    "--model",
)
DIRECTORY_LISTS = ("--data_input_dirs", "--tokenizer_dirs", "--models", "--held_out", "--reference_dirs")
FILES = ("--expand_tokens_file",)


def shell_blocks(document: Path) -> list[str]:
    text = document.read_text(encoding="utf-8")
    return re.findall(r"^```(?:bash|sh|shell)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def split_commands(text: str) -> list[list[str]]:
    """Commands of a shell text as words; backslash line ends are joined, comments left out."""
    commands = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words:
            commands.append(words)
    return commands


def script_and_arguments(words: list[str]) -> tuple[str, list[str]] | None:
    """`colossalai run --nproc_per_node 2 train.py --lr 1` -> ("train.py", ["--lr", "1"]); None for others."""
    if words[:2] == ["bash", "examples/launch/torchrun.sh"]:
        return "train.py", words[2:]
    if words[0] not in LAUNCHERS:
        return None
    rest = words[2:] if words[:2] == ["colossalai", "run"] else words[1:]
    while rest and rest[0].startswith("-"):
        if rest[0] in ("-m", "-c"):
            return None
        takes_value = "=" not in rest[0] and rest[0] in LAUNCHERS[words[0]]
        assert takes_value or "=" in rest[0], f"{rest[0]}: unknown option of {words[0]}"
        rest = rest[2:] if takes_value else rest[1:]
    if not rest or not rest[0].endswith(".py") or is_unparsed(words):
        return None
    arguments = rest[1:]
    if words[0] == "colossalai":  # a shell on each host splits what it gets once more
        arguments = shlex.split(" ".join(arguments)) if not any("<" in a for a in arguments) else arguments
    return rest[0], arguments


def create_inputs(arguments: list[str]) -> None:
    """Makes what a command reads, in the current directory, so that parsers that look for it are content."""
    flag = ""
    for word in arguments:
        if word.startswith("--"):
            flag, _, word = word.partition("=")
            if not word:
                continue
        names = [word] if flag in (*DIRECTORIES, *FILES) else []
        if flag in DIRECTORY_LISTS:
            names = [name.strip() for name in word.split(",")]
        for name in names:
            path = Path(name)
            if path.is_absolute() or name == "latest":
                continue
            if flag in FILES:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
            else:
                path.mkdir(parents=True, exist_ok=True)
                (path / "config.json").touch()
                if "new_rows" in arguments:
                    (path / "vocabulary_extension.json").touch()


# Commands of other programs, which nothing here can parse.
UNPARSED = {
    "pip",
    "bash",
    "cp",
    "git",
    "for",
    "ray",
    "sbatch",
    "ssh-copy-id",
    "ssh-keygen",
    "curl",
    "vllm",
    "uv",
    "echo",
    "source",
    "ruff",
    "mkdocs",
} | {
    "./build/bin/llama-quantize",
    "./build/bin/llama-cli",
}
UNPARSED_SCRIPTS = {"convert_hf_to_gguf.py", "convert_lora_to_gguf.py"}


def is_unparsed(words: list[str]) -> bool:
    if words[0] != "python":
        return words[0] in UNPARSED
    if words[1:3] in (["-m", "pytest"], ["-m", "venv"]):
        return True
    return words[1] in UNPARSED_SCRIPTS or words[1].startswith(("benchmarks/", "docs/", "tests/"))


def assert_harness_takes(words: list[str]) -> None:
    """lm-evaluation-harness parses the command and has its tasks."""
    from lm_eval._cli import HarnessCLI

    args = HarnessCLI()._parser.parse_args(words[1:])
    assert set(args.tasks) <= harness_tasks(), words


@cache
def harness_tasks() -> set[str]:
    from lm_eval.tasks import TaskManager

    return set(TaskManager(include_path=str(ROOT / "examples" / "evaluation")).all_tasks)


def assert_tensorboard_takes(words: list[str]) -> None:
    from tensorboard import default, program

    program.TensorBoard(plugins=default.get_plugins()).configure(words)


OTHER_PROGRAMS = {"lm_eval": assert_harness_takes, "tensorboard": assert_tensorboard_takes}


def assert_parses(words: list[str], capsys: pytest.CaptureFixture) -> None:
    found = script_and_arguments(words)
    assert found is not None, words
    script, arguments = found
    assert (ROOT / script).is_file(), f"{script}: no such script"
    if "--help" in arguments:
        return
    create_inputs(arguments)
    try:
        parsed = ARGUMENTS.parser_of(script).parse_args(arguments)
    except SystemExit:
        pytest.fail(f"{shlex.join(words)}\n{capsys.readouterr().err}")
    if script.endswith("preflight.py") and parsed.training:
        assert_parses(["python", *parsed.training], capsys)


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_documents(document: Path, capsys: pytest.CaptureFixture) -> None:
    commands = [words for block in shell_blocks(document) for words in split_commands(block)]
    checked = [words for words in commands if script_and_arguments(words)]
    for words in checked:
        assert_parses(words, capsys)
    for words in commands:
        if words[0] in OTHER_PROGRAMS:
            OTHER_PROGRAMS[words[0]](words)
        else:
            assert words in checked or is_unparsed(words), f"neither parsed nor known: {shlex.join(words)}"
        if words[0] in ("bash", "sbatch") and not words[1].startswith("-"):
            assert (ROOT / words[1]).is_file(), words


def test_every_script_is_shown() -> None:
    commands = [
        words for document in DOCUMENTS for block in shell_blocks(document) for words in split_commands(block)
    ]
    shown = {found[0] for words in commands if (found := script_and_arguments(words))}
    assert set(ARGUMENTS.SCRIPTS) <= shown


@pytest.fixture(scope="module")
def quickstart_commands() -> list[list[str]]:
    result = subprocess.run(
        ["bash", str(ROOT / "quickstart.sh"), "--print_commands"], capture_output=True, text=True, check=True
    )
    return [words[1:] for words in split_commands(result.stdout) if words[0] == "$"]


def test_commands_of_quickstart(quickstart_commands: list[list[str]], capsys: pytest.CaptureFixture) -> None:
    assert [script_and_arguments(words)[0] for words in quickstart_commands[:8]] == [
        "examples/make_base_model.py",
        "colossal_llama/tokenizer/learn_pieces.py",
        "colossal_llama/tokenizer/init_tokenizer.py",
        "colossal_llama/model/init_model.py",
        "prepare_pretrain_dataset.py",
        "train.py",
        "prepare_sft_dataset.py",
        "train.py",
    ]
    assert script_and_arguments(quickstart_commands[-1])[0] == "colossal_llama/evaluation/compare_models.py"
    assert len(quickstart_commands) >= 8 + 3 + 1
    for words in quickstart_commands:
        assert_parses(words, capsys)


def test_what_quickstart_says_to_try_next(capsys: pytest.CaptureFixture) -> None:
    report = load_script(ROOT / "examples/report_quickstart.py")
    for _, words in report.next_commands("an output/directory"):
        if words[0] in OTHER_PROGRAMS:
            OTHER_PROGRAMS[words[0]](words)
        else:
            assert shlex.split(report.shown(words)) == words
            assert_parses(words, capsys)


def test_the_walk_through_has_the_commands_of_quickstart(quickstart_commands: list[list[str]]) -> None:
    page = ROOT / "docs/quickstart.md"
    documented = [words for block in shell_blocks(page) for words in split_commands(block)]
    for words in quickstart_commands:
        assert words in documented, f"not in docs/quickstart.md as quickstart.sh runs it: {shlex.join(words)}"


def test_the_readme_is_short_and_has_every_step() -> None:
    """The pipeline with one's own paths has every step, in its order."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") < 350
    commands = [words for block in shell_blocks(ROOT / "README.md") for words in split_commands(block)]
    scripts = [found[0] for words in commands if (found := script_and_arguments(words))]
    order = [script for i, script in enumerate(scripts) if script not in scripts[:i]]
    assert order == [
        "colossal_llama/tokenizer/learn_pieces.py",
        "colossal_llama/tokenizer/init_tokenizer.py",
        "colossal_llama/tokenizer/compare_tokenizers.py",
        "colossal_llama/model/init_model.py",
        "colossal_llama/model/calibrate_output.py",
        "prepare_pretrain_dataset.py",
        "train.py",
        "prepare_sft_dataset.py",
        "colossal_llama/evaluation/compare_models.py",
        "inference_example.py",
    ]


@pytest.mark.parametrize("example", ["train.example.sh", "train_sft.example.sh"])
def test_shell_examples(example: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The example with its variables filled in, and its command printed."""
    text = (ROOT / example).read_text(encoding="utf-8")
    for name in (
        "PROJECT_NAME",
        "PARENT_SAVE_DIR",
        "PARENT_TENSORBOARD_DIR",
        "PARENT_CONFIG_FILE",
        "PRETRAINED_MODEL_PATH",
    ):
        text, count = re.subn(rf'^{name}=""', f'{name}="a {name.lower()}"', text, flags=re.MULTILINE)
        assert count == 1
    text = text.replace(
        "declare -a dataset=(\n", 'declare -a dataset=(\n"data 1/arrow" "data 2/arrow/part-00000"\n'
    )
    text = re.sub(r"^supervise ", r"printf '%s\\0' ", text, flags=re.MULTILINE)
    (tmp_path / example).write_text(text, encoding="utf-8")
    shutil.copytree(ROOT / "examples/launch", tmp_path / "examples/launch")
    result = subprocess.run(["bash", example], capture_output=True, text=True, check=True)
    words = result.stdout.split("\0")[:-1]
    script = words.index("train.py")
    assert words[:script] == [
        *(
            "colossalai",
            "run",
            "--nproc_per_node",
            "",
            "--hostfile",
            "",
            "--master_port",
            "",
            "--ssh-port",
            "",
        )
    ]
    assert "data 2/arrow/part-00000" in words
    assert_parses(["python", *words[script:]], capsys)


def test_examples_name_everything_that_is_missing() -> None:
    for example in ("train.example.sh", "train_sft.example.sh"):
        result = subprocess.run(["bash", str(ROOT / example)], capture_output=True, text=True)
        assert result.returncode == 2
        assert result.stderr.count("error: ") == 6
        assert result.stdout == ""


def test_hostfile_example_holds_names_only() -> None:
    for line in (ROOT / "hostfile.example").read_text().splitlines():
        assert re.fullmatch(r"[A-Za-z0-9.-]+", line)


def anchors_of(document: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    }


def test_layout_tables_are_those_of_the_memory_model() -> None:
    """A failure after a change of the model: run benchmarks/layout_table.py, and copy what it prints."""
    tables = load_script(ROOT / "benchmarks/layout_table.py")
    text = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    written = text.partition("<!-- python benchmarks/layout_table.py -->\n")[2]
    written = written.partition("<!-- end of the tables -->")[0].strip()
    memories = tables.build_parser().get_default("gpu_memory_gib")
    assert written == "\n\n".join(tables.format_layouts(memory) for memory in memories)


def test_layouts_of_the_tables_are_ones_that_train() -> None:
    tables = load_script(ROOT / "benchmarks/layout_table.py")
    for memory in (80, 40):
        for model in tables.SHAPES:
            for num_gpus in tables.NUM_GPUS:
                choice = tables.choose_layout(model, num_gpus, memory)
                if choice is not None:
                    plugin = choice[0].plugin_on(num_gpus)
                    assert plugin.model_conflicts(tables.make_config(model)) == []


SBATCH = ROOT / "examples/launch/slurm.sbatch"


def test_slurm_directives() -> None:
    text = SBATCH.read_text(encoding="utf-8")
    directives = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", text, flags=re.MULTILINE))
    assert len(directives) == text.count("#SBATCH")
    assert "requeue" in directives
    assert directives["open-mode"] == "append", "a requeued job keeps its log"
    assert directives["ntasks-per-node"] == "1", "a torchrun each"
    assert re.fullmatch(r"B:TERM@\d+", directives["signal"]), "to the batch script, in time for a save"
    first_command = re.search(r"^[^#\n]", text, flags=re.MULTILINE).start()
    assert text.rfind("#SBATCH") < first_command, "Slurm reads no directive after the first command"


def test_slurm_example(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The flags of train.py, with variables filled in."""
    text = SBATCH.read_text(encoding="utf-8")
    empty = subprocess.run(["bash", str(SBATCH)], capture_output=True, text=True)
    assert empty.returncode == 2
    assert empty.stderr.count("error: ") == 5
    for name in ("SAVE_DIR", "TENSORBOARD_DIR", "CONFIG_FILE", "PRETRAINED_MODEL_PATH"):
        text, count = re.subn(rf'^{name}=""', f'{name}="a {name.lower()}"', text, flags=re.MULTILINE)
        assert count == 1
    text = text.replace("declare -a dataset=(\n", 'declare -a dataset=(\n"data 1/arrow" "data 2/arrow"\n')
    text = text.partition("# Slurm runs a copy")[0] + "printf '%s\\0' \"${flags[@]}\"\n"
    result = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True)
    assert_parses(["python", "train.py", *result.stdout.split("\0")[:-1]], capsys)


def test_slurm_example_takes_the_first_of_many_nodes(tmp_path: Path) -> None:
    """`head` would end before scontrol has printed them all, and the job with it, by SIGPIPE."""
    (line,) = re.findall(r"^MASTER_ADDR=.*", SBATCH.read_text(encoding="utf-8"), flags=re.MULTILINE)
    script = f"""
        set -euo pipefail
        scontrol() {{ seq --format node%g 100000; }}
        SLURM_JOB_NODELIST=
        {line}
        echo "$MASTER_ADDR"
    """
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "node1\n")


def test_links_of_documents_lead_somewhere() -> None:
    for document in DOCUMENTS:
        text = re.sub(
            r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
        )
        anchors = anchors_of(document)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith("http"):
                continue
            path, _, anchor = target.partition("#")
            if path:
                assert os.path.exists(document.parent / path), f"{document.name}: {target}"
            if anchor and (not path or path.endswith(".md")):
                linked = anchors_of(document.parent / path) if path else anchors
                assert anchor in linked, f"{document.name}: {target}"

"""train.py's command line: names, defaults, booleans, contradictions found before anything starts."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from colossal_llama.training.arguments import build_parser, parse_settings
from colossal_llama.training.layout import Layout

REQUIRED = ["--pretrained", "some/model", "--benchmark"]


def parse(flags: str = "") -> argparse.Namespace:
    return build_parser().parse_args([*REQUIRED, *flags.split()])


def layout(flags: str, world_size: int) -> Layout:
    return parse_settings([*REQUIRED, *flags.split()]).layout.on(world_size)


def problems_of(capsys: pytest.CaptureFixture[str], flags: str = "", required: bool = True) -> list[str]:
    with pytest.raises(SystemExit) as caught:
        build_parser().parse_args([*(REQUIRED if required else []), *flags.split()])
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    *errors, hint = captured.err.splitlines()
    assert hint == "train.py --help lists every argument"
    assert all(line.startswith("error: ") for line in errors)
    return [line.removeprefix("error: ") for line in errors]


DEFAULTS = {
    "dataset": None,
    "eval_dataset": None,
    "dataset_weights": None,
    "max_repeats": 4,
    "eval_interval": 0,
    "eval_at_start": False,
    "max_length": 4096,
    "isolate_documents": True,
    "bucketed": False,
    "padding_mode": "max_length",
    "pad_token": "eos",
    "num_workers": 2,
    "trust_remote_code": False,
    "plugin": "gemini",
    "tp": 1,
    "pp": 1,
    "sp": 1,
    "zero_stage": 1,
    "sp_mode": "split_gather",
    "enable_sequence_parallelism": False,
    "zero_cpu_offload": False,
    "microbatch_size": 1,
    "mixed_precision": "fp16",
    "use_grad_checkpoint": False,
    "use_flash_attn": False,
    "compile": False,
    "num_epochs": 1,
    "max_steps": -1,
    "batch_size": 1,
    "accumulation_steps": 8,
    "lr": 3e-4,
    "weight_decay": 0.1,
    "grad_clip": 1.0,
    "warmup_steps": None,
    "lr_schedule": "cosine",
    "min_lr_ratio": 0.1,
    "decay_steps": None,
    "decay_start": None,
    "decay_shape": "sqrt",
    "rope_theta": None,
    "rope_scaling": None,
    "max_position_embeddings": None,
    "keep_optimizer": False,
    "freeze_non_embeds_params": False,
    "lr_embeddings": None,
    "no_decay": None,
    "lora_rank": 0,
    "lora_embeddings": None,
    "merge_lora": False,
    "use_neft": False,
    "neft_alpha": 5.0,
    "seed": 42,
    "deterministic": False,
    "load_checkpoint": None,
    "save_dir": Path("checkpoint_dir"),
    "save_interval": 1000,
    "save_total_limit": 0,
    "async_save": True,
    "skip_save_each_epoch": False,
    "tensorboard_dir": Path("logs_dir"),
    "config_file": Path("config_file"),
    "dry_run": False,
    "benchmark": False,
    "num_samples": 500,
    "assume_mfu": 0.4,
    "device_name": None,
    "price_per_hour": None,
}


def test_defaults_are_those_of_the_description(tmp_path: Path) -> None:
    args = vars(build_parser().parse_args(["--pretrained", "some/model", "--dataset", str(tmp_path)]))
    assert args.pop("pretrained") == "some/model"
    assert args == {**DEFAULTS, "dataset": [tmp_path]}


@pytest.mark.parametrize(
    ("names", "value", "expected"),
    [
        (("--grad_clip", "--gradient_clipping"), "0.5", 0.5),
        (("--zero_stage", "--zero"), "0", 0),
        (("--batch_size", "--micro_batch_size"), "7", 7),
    ],
)
def test_aliases(names: tuple[str, str], value: str, expected: float) -> None:
    dest = names[0].removeprefix("--")
    for name in names:
        assert getattr(parse(f"{name} {value}"), dest) == expected
        assert getattr(parse(f"{name}={value}"), dest) == expected


# Benchmarks continue nothing.
NOT_HERE = ("benchmark", "keep_optimizer")
FLAGS = [name for name, default in DEFAULTS.items() if default is False and name not in NOT_HERE]
# What a flag needs beside it to be accepted.
COMPANIONS = {
    "merge_lora": "--plugin zero2 --lora_rank 8",
    "eval_at_start": "--eval_dataset .",
    "zero_cpu_offload": "--plugin 3d",
    "compile": "--plugin zero2",
    "enable_sequence_parallelism": "--plugin 3d --tp 2",
}


@pytest.mark.parametrize("flag", FLAGS)
def test_flags_are_booleans(flag: str) -> None:
    companions = COMPANIONS.get(flag, "")
    assert getattr(parse(f"{companions} --{flag}"), flag) is True
    for word in ("True", "true", "1", "yes"):
        assert getattr(parse(f"{companions} --{flag} {word}"), flag) is True
    for word in ("False", "false", "0", "no"):
        assert getattr(parse(f"--{flag} {word}"), flag) is False


def test_isolation_is_switched_off_in_each_form() -> None:
    assert parse("--no-isolate_documents").isolate_documents is False
    assert parse("--isolate_documents False").isolate_documents is False
    assert parse("--isolate_documents").isolate_documents is True


@pytest.mark.parametrize("plugin", ["ddp", "gemini", "gemini_auto", "zero2", "zero2_cpu", "3d"])
def test_every_plugin_is_accepted(plugin: str) -> None:
    assert parse(f"--plugin {plugin}").plugin == plugin


def test_full_pipeline_layout_is_accepted() -> None:
    flags = "--plugin 3d --tp 2 --pp 4 --batch_size 8 --microbatch_size 2 --mixed_precision bf16"
    assert layout(flags, 64).dp_size == 8


def test_data_parallel_size() -> None:
    assert layout("--plugin zero2", 6).dp_size == 6
    flags = "--plugin 3d --tp 2 --sp 2 --enable_sequence_parallelism --sp_mode all_to_all"
    assert layout(flags, 16).dp_size == 4


# Contradictions: (arguments, what the message names, the remedy that it gives).
CONTRADICTIONS = [
    ("--mixed_precision fp32", "--mixed_precision fp32", "use zero2, ddp or 3d"),
    ("--plugin gemini_auto --lora_rank 4", "--lora_rank 4", "use zero2 or ddp"),
    ("--plugin zero2 --tp 2", "--tp 2", "add --plugin 3d"),
    ("--plugin zero2 --pp 2", "--pp 2", "add --plugin 3d"),
    ("--plugin zero2 --sp 2", "--sp 2", "add --plugin 3d"),
    ("--plugin ddp --enable_sequence_parallelism", "--enable_sequence_parallelism", "--plugin 3d"),
    ("--plugin zero2 --zero_cpu_offload", "--zero_cpu_offload", "zero2_cpu"),
    ("--plugin 3d --pp 2 --batch_size 5 --microbatch_size 2", "--batch_size 5", "must be a multiple"),
    ("--plugin 3d --pp 4 --batch_size 2", "--batch_size 2", "use --batch_size 4 or more"),
    ("--plugin 3d --pp 2 --batch_size 2 --zero_stage 2", "--zero_stage 2", "use --zero_stage 1"),
    ("--plugin 3d --zero_stage 0 --zero_cpu_offload", "--zero_cpu_offload", "--zero_stage 1 or 2"),
    ("--plugin 3d --tp 2 --lora_rank 4", "--lora_rank", "use --tp 1 --pp 1"),
    ("--plugin 3d --sp 2", "--sp 2", "--enable_sequence_parallelism"),
    ("--plugin 3d --enable_sequence_parallelism", "--sp_mode split_gather", "--tp 2"),
    (
        "--plugin 3d --tp 2 --sp 2 --enable_sequence_parallelism --sp_mode ring",
        "--sp 2",
        "leave --sp at 1",
    ),
    (
        "--plugin 3d --enable_sequence_parallelism --sp_mode ring_attn",
        "--sp_mode ring_attn",
        "use all_to_all or split_gather",
    ),
    ("--plugin 3d --enable_sequence_parallelism --sp_mode all_to_all", "--sp 1", "use --sp 2"),
    ("--plugin ddp --lora_rank 4 --freeze_non_embeds_params", "--freeze_non_embeds_params", "choose one"),
    (
        "--plugin ddp --lora_rank 4 --freeze_non_embeds_params",
        "--lora_rank and --freeze_non_embeds_params",
        "--lora_embeddings train",
    ),
    ("--plugin ddp --merge_lora", "--merge_lora", "--lora_rank above 0"),
    ("--plugin ddp --lora_embeddings train", "--lora_embeddings train", "--lora_rank above 0"),
    ("--plugin ddp --lora_embeddings freeze", "--lora_embeddings freeze", "--lora_rank above 0"),
    ("--use_neft --neft_alpha 0", "--neft_alpha 0", "leave --use_neft out"),
    ("--load_checkpoint latest", "--load_checkpoint latest", "leave it out"),
    ("--load_checkpoint /no/such/place", "--load_checkpoint /no/such/place", "no such directory"),
    ("--plugin ddp --eval_at_start", "--eval_at_start", "needs --eval_dataset"),
    ("--dataset /no/such/place", "--dataset /no/such/place", "no such directory"),
    ("--eval_dataset /no/such/place", "--eval_dataset /no/such/place", "no such directory"),
]


@pytest.mark.parametrize(("flags", "names", "remedy"), CONTRADICTIONS)
def test_a_contradiction_names_flag_value_and_remedy(
    flags: str, names: str, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (problem,) = problems_of(capsys, flags)
    assert names in problem
    assert remedy in problem.replace(names, "", 1)


def test_contradictions_are_reported_together(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--plugin 3d --pp 4 --batch_size 2 --zero_stage 2 --merge_lora --use_neft --neft_alpha 0"
    problems = problems_of(capsys, flags + " --eval_interval 9")
    for name in ("--batch_size 2", "--zero_stage 2", "--merge_lora", "--neft_alpha 0", "--eval_interval 9"):
        assert sum(problem.startswith(name) for problem in problems) == 1
    assert len(problems) == 5


@pytest.fixture
def extended(tmp_path: Path) -> Path:
    """A model directory that says that its vocabulary was extended."""
    for name in ("config.json", "vocabulary_extension.json"):
        (tmp_path / name).write_text("{}")
    return tmp_path


@pytest.mark.parametrize("mode", ["", "--dry_run"])
@pytest.mark.parametrize("flag", ["--pretrained", "--load_checkpoint"])
def test_lora_on_an_extended_model_asks_for_its_embeddings(
    flag: str, mode: str, extended: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--pretrained", "some/model", "--dataset", str(extended), *mode.split()]
    words += [flag, str(extended), "--plugin", "ddp"]
    parser = build_parser()
    parser.parse_args(words)
    words += ["--lora_rank", "8"]
    with pytest.raises(SystemExit) as caught:
        parser.parse_args([*words, "--eval_interval", "9"])
    assert caught.value.code == 2
    first, second, _ = sorted(capsys.readouterr().err.splitlines())
    assert first.startswith("error: --eval_interval 9"), "all at once"
    for part in ("--lora_embeddings", f"{flag} {extended}", "`train`", "`freeze`"):
        assert part in second
    for choice in ("train", "freeze"):
        assert parser.parse_args([*words, "--lora_embeddings", choice]).lora_embeddings == choice


def test_embeddings_of_any_model_may_train_beside_lora() -> None:
    assert parse("--plugin zero2 --lora_rank 8 --lora_embeddings train").lora_embeddings == "train"
    assert parse("--plugin zero2 --lora_rank 8").lora_embeddings is None


def test_bad_values_are_reported_together(capsys: pytest.CaptureFixture[str]) -> None:
    bad = ("--tp 0", "--lr nan", "--plugin zero3", "--max_length x", "--use_neft maybe", "--zero_stage 3")
    problems = problems_of(capsys, " ".join([*bad, "--nosuch 1"]))
    assert len(problems) == len(bad) + 1
    for part in (*bad, "--nosuch"):
        assert sum(part in problem for problem in problems) == 1


def test_data_and_model_are_required(capsys: pytest.CaptureFixture[str]) -> None:
    (problem,) = problems_of(capsys, required=False)
    assert problem == "--pretrained: required, but not given"
    (problem,) = problems_of(capsys, "--pretrained some/model", required=False)
    assert problem.startswith("--dataset: required")


def test_a_local_model_directory_without_config_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (problem,) = problems_of(capsys, f"--pretrained {tmp_path}")
    assert problem.startswith(f"--pretrained {tmp_path}: no config.json")


def parse_run(directory: Path, *flags: object) -> argparse.Namespace:
    required = ["--pretrained", "some/model", "--dataset", str(directory), "--plugin", "ddp"]
    return build_parser().parse_args([*required, *map(str, flags)])


def test_latest_is_no_directory(tmp_path: Path) -> None:
    assert parse_run(tmp_path, "--load_checkpoint", "latest").load_checkpoint == "latest"


def test_outputs_that_can_not_be_written_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    outputs = {
        "--save_dir": tmp_path / "file",
        "--tensorboard_dir": tmp_path / "file" / "logs",
        "--config_file": tmp_path,
    }
    with pytest.raises(SystemExit) as caught:
        parse_run(tmp_path, *(word for pair in outputs.items() for word in pair))
    assert caught.value.code == 2
    *problems, _ = capsys.readouterr().err.splitlines()
    assert len(problems) == 3
    for (flag, path), problem in zip(outputs.items(), problems, strict=True):
        assert problem.startswith(f"error: {flag} {path}: ")
    good = {"--save_dir": tmp_path / "new", "--tensorboard_dir": tmp_path, "--config_file": tmp_path / "file"}
    parse_run(tmp_path, *(word for pair in good.items() for word in pair))


@pytest.mark.parametrize(
    ("content", "is_ours"),
    [
        ('{"arguments": {"pretrained": "m"}, "layout": {}}', True),
        ('{"pretrained": "m", "dataset": []}', True),  # the original's
        ("", True),
        ('{"model_type": "llama"}', False),
        ('{"arguments": 5}', False),
        ("[host]\nname = 1\n", False),
    ],
)
def test_a_configuration_replaces_no_other_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, is_ours: bool
) -> None:
    path = tmp_path / "config_file"
    path.write_text(content)
    if is_ours:
        parse_run(tmp_path, "--config_file", path)
        return
    with pytest.raises(SystemExit):
        parse_run(tmp_path, "--config_file", path)
    assert f"--config_file {path}: is there already" in capsys.readouterr().err


def test_other_ranks_stay_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as caught:
        parse("--plugin nothing")
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", "")


def test_every_argument_has_a_help_text_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    parser = build_parser()
    assert all(action.help for action in parser._actions)
    assert {action.dest for action in parser._actions} == {*DEFAULTS, "pretrained", "help"}
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["--help"])
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "2.5 % of the steps" in shown
    assert "(default: 4096)" in shown

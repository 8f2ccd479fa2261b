"""From the command line of the prepare scripts to their settings."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import ROOT, load_script

from colossal_llama.dataset.arguments import parse_settings
from colossal_llama.dataset.settings import PretrainSettings, RowSettings, SftSettings, WorkerSettings


def test_the_defaults_of_the_flags_are_those_of_the_settings(tmp_path: Path) -> None:
    parser = load_script(ROOT / "prepare_sft_dataset.py").build_parser()
    flags = ["--data_input_dirs", str(tmp_path / "in"), "--tokenizer_dir", str(tmp_path)]
    (tmp_path / "in").mkdir()
    settings = parse_settings(parser, SftSettings, [*flags, "--data_output_dirs", str(tmp_path / "out")])
    assert (settings.records, settings.rows, settings.workers) == (
        SftSettings(),
        RowSettings(),
        WorkerSettings(),
    )
    assert settings.paths.arrow_dir == tmp_path / "out" / "arrow"
    assert not settings.skip_bad_records
    assert settings.records.facts() == {
        "kind": "sft",
        "template": "colossal",
        "llama_version": 3,
        "splice": False,
    }
    flags += ["--chat_template", "--on_bad_record", "skip", "--data_arrow_output_dir", str(tmp_path / "x")]
    settings = parse_settings(parser, SftSettings, flags)
    assert settings.skip_bad_records
    assert settings.paths.arrow_dir == tmp_path / "x"
    assert (settings.records.encoder, settings.records.facts()["template"]) == ("chat_template", "tokenizer")


def test_directories_and_urls_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    parser = load_script(ROOT / "prepare_pretrain_dataset.py").build_parser()

    def parse(text: str) -> list[Path | str]:
        flags = ["--data_input_dirs", text, "--tokenizer_dir", str(tmp_path)]
        return parse_settings(parser, PretrainSettings, flags).paths.data_input_dirs

    one = tmp_path / "one"
    one.mkdir()
    assert parse(f"s3://bucket/x, {one},file://{one},hf://datasets/a/b") == [
        "s3://bucket/x",
        one,
        one,
        "hf://datasets/a/b",
    ]
    for text, problem in ((f"s3://b,{tmp_path}/two", "no such directory"), (" , ", "at least one directory")):
        with pytest.raises(SystemExit):
            parse(text)
        assert problem in capsys.readouterr().err


@pytest.mark.parametrize("name", ["prepare_pretrain_dataset.py", "prepare_sft_dataset.py"])
def test_output_below_an_input_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """With `--recursive` it would be input."""
    parser = load_script(ROOT / name).build_parser()
    flags = ["--data_input_dirs", str(tmp_path), "--tokenizer_dir", str(tmp_path)]
    flags += ["--data_output_dirs", str(tmp_path / "a" / "out")]
    assert not parser.parse_args(flags).recursive
    with pytest.raises(SystemExit):
        parser.parse_args([*flags, "--recursive"])
    assert f"would write into the input directory {tmp_path}" in capsys.readouterr().err

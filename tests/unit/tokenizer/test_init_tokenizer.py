"""init_tokenizer.py replaces what it made, and nothing else unless it is told to."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support import ROOT, load_script
from tokenizer_cases import run_extension, write_pieces

from colossal_llama.tokenizer import compare_tokenizers, learn_pieces
from colossal_llama.tokenizer.init_tokenizer import TokenizerSettings, build_parser, extend, write_tokenizer
from colossal_llama.utils.settings import parse_settings


def read_all(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def run(source: Path, target: Path, *more: str) -> None:
    pieces = write_pieces(target.parent / "pieces.jsonl", ["人工"])
    flags = (f"--source_tokenizer_dir={source}", f"--target_tokenizer_dir={target}")
    arguments = [*flags, f"--expand_tokens_file={pieces}", *more]
    settings = parse_settings(build_parser(), TokenizerSettings, arguments)
    write_tokenizer(settings, *extend(settings))


@pytest.mark.parametrize("kind", ["llama3", "tokenizer.model alone", "added tokens", "template", "code"])
def test_a_tokenizer_of_others_is_replaced_only_when_told(
    llama2_tokenizer_dir: Path,
    llama3_tokenizer_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    kind: str,
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(llama2_tokenizer_dir, source)
    config = (source / "tokenizer_config.json").read_text()
    (source / "tokenizer_config.json").write_text(config.replace("{", '{"auto_map": {"a": []},', 1))
    (source / "own.py").write_text("x = 1")
    target.mkdir()
    name = {
        "llama3": "tokenizer_config.json",
        "tokenizer.model alone": "tokenizer.model",
        "added tokens": "added_tokens.json",
        "template": "additional_chat_templates/theirs.jinja",
        "code": "own.py",
    }[kind]
    if kind == "llama3":
        shutil.copytree(llama3_tokenizer_dir, target, dirs_exist_ok=True)
        (target / "vocabulary_extension.json").write_text("[]")  # not a report of ours
    else:
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_text('{"<stale>": 7}')
    (target / "notes.txt").write_text("mine")
    before = read_all(target)
    with pytest.raises(SystemExit):
        run(source, target)
    error = capsys.readouterr().err
    assert f"--target_tokenizer_dir {target}: holds a tokenizer that this script did not make" in error
    assert name in error
    assert "or --overwrite" in error
    assert read_all(target) == before

    run(source, target, "--overwrite")
    run(source, target)  # its own, now
    run(source, tmp_path / "fresh")
    assert read_all(target) == {**read_all(tmp_path / "fresh"), "notes.txt": b"mine"}


def test_the_source_is_never_the_target(
    llama2_tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """By whatever way it is named, and with the flag too."""
    source = tmp_path / "source"
    shutil.copytree(llama2_tokenizer_dir, source)
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "link_to_link").symlink_to(tmp_path / "link")
    before = read_all(source)
    for target in (source, tmp_path / "link", tmp_path / "link_to_link", source / ".." / "source"):
        for one, other in ((source, target), (target, source)):
            with pytest.raises(SystemExit):
                run(one, other, "--overwrite")
            assert "is the source directory; the source is never changed" in capsys.readouterr().err
    assert read_all(source) == before


def test_a_directory_of_links_to_the_source(llama2_tokenizer_dir: Path, tmp_path: Path) -> None:
    """`ln -s source/* target/`: the links are replaced, not what they lead to."""
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(llama2_tokenizer_dir, source)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}")
    before = read_all(source)
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).symlink_to(path)
    with pytest.raises(SystemExit):
        run(source, target)
    run(source, target, "--overwrite")
    assert read_all(source) == before
    assert not any(path.is_symlink() for path in target.rglob("*"))
    assert (target / "additional_chat_templates" / "tool.jinja").read_text() == "{{ tools }}"


def test_a_killed_run_can_be_repeated(
    llama2_tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report, by which its own is known again, is there before anything else and gone after it."""
    import os

    from colossal_llama.tokenizer import output_directory

    target = tmp_path / "target"
    run_extension(llama2_tokenizer_dir, target, ["智能"])
    replace, left = os.replace, 3

    def dying_replace(*paths: Path) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr(output_directory.os, "replace", dying_replace)
    with pytest.raises(KeyboardInterrupt):
        run(llama2_tokenizer_dir, target)
    monkeypatch.undo()
    assert "tokenizer.json" not in read_all(target)
    run(llama2_tokenizer_dir, target)


@pytest.mark.parametrize(
    ("content", "is_ours"),
    [
        (b"", True),
        (b'{"piece": "a"}\n{"piece": "b"}\n', True),
        (b'{"source": "", "target": "a"}\n', False),
        (b"5\n", False),
        (b"# notes\n", False),
        (b"\xff\xfe", False),
    ],
)
def test_learn_pieces_replaces_lists_of_pieces_alone(
    llama2_tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture, content: bytes, is_ours: bool
) -> None:
    output = tmp_path / "pieces.jsonl"
    output.write_bytes(content)
    flags = [f"--data_input_dirs={tmp_path}", f"--source_tokenizer_dir={llama2_tokenizer_dir}"]
    flags += [f"--output_file={output}", "--num_tokens=1"]
    if is_ours:
        learn_pieces.build_parser().parse_args(flags)
        return
    with pytest.raises(SystemExit):
        learn_pieces.build_parser().parse_args(flags)
    assert f"--output_file {output}: is there already" in capsys.readouterr().err


def test_compare_tokenizers_replaces_its_own_figures_alone(
    llama2_tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, output = tmp_path / "data", tmp_path / "figures.json"
    data.mkdir()
    (data / "a.jsonl").write_text('{"source": "", "target": "a text", "category": "x"}\n')
    flags = [f"--tokenizer_dirs={llama2_tokenizer_dir}", f"--data_input_dirs={data}"]
    monkeypatch.setattr("sys.argv", ["script", *flags, f"--output_file={output}"])
    compare_tokenizers.main()
    compare_tokenizers.main()
    for content in ('{"a": 1}', "[[1]]", "[5]", "text"):
        output.write_text(content)
        with pytest.raises(SystemExit):
            compare_tokenizers.main()
        assert f"--output_file {output}: is there already" in capsys.readouterr().err
        assert output.read_text() == content
    monkeypatch.setattr("sys.argv", ["script", *flags, f"--output_file={tmp_path}"])
    with pytest.raises(SystemExit):
        compare_tokenizers.main()
    assert "is a directory" in capsys.readouterr().err


def test_the_tiny_base_model_replaces_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    parser = load_script(ROOT / "examples" / "make_base_model.py").build_parser()
    parser.parse_args([f"--data_input_dirs={tmp_path}", f"--output_dir={tmp_path / 'new'}"])
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(SystemExit):
        parser.parse_args([f"--data_input_dirs={tmp_path}", f"--output_dir={tmp_path}"])
    assert f"--output_dir {tmp_path}: is not empty" in capsys.readouterr().err

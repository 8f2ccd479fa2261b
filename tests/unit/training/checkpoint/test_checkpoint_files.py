"""Files of a checkpoint: bytes, checksums, failures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from colossal_llama.training.checkpoint.files import (
    BackgroundWrite,
    CopyBuffers,
    FileJobs,
    is_disk_error,
    write_safetensors,
)
from colossal_llama.training.checkpoint.modeling_files import cut_into_files, hf_shard_names


def test_written_tensors_are_read_by_safetensors(tmp_path):
    tensors = {
        "bf16": torch.randn(3, 5).bfloat16(),
        "transposed": torch.randn(4, 6).t(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 7),
        "int64": torch.arange(9),
        "bool": torch.tensor([True, False]),
    }
    file = write_safetensors(tmp_path / "x.safetensors", tensors, {"note": "a"})
    content = (tmp_path / "x.safetensors").read_bytes()
    assert (file.num_bytes, file.checksum) == (len(content), xxhash.xxh3_64_hexdigest(content))
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    with safe_open(tmp_path / "x.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt", "note": "a"}


def test_a_copying_plan_writes_what_was_there_when_it_was_made(tmp_path):
    buffers = CopyBuffers()
    for value, shape in ((1, (1000,)), (2, (1000,)), (3, (10, 10))):
        tensor = torch.full(shape, float(value))
        buffers.start()
        plan = FileJobs(tmp_path, buffers)
        plan.add_tensors("x.safetensors", {"x": plan.hold(tensor)}, {})
        tensor.zero_()
        write = BackgroundWrite(plan, inline=False)
        write.wait()
        assert write.is_done
        assert write.failure is None
        assert torch.equal(load_file(tmp_path / "x.safetensors")["x"], torch.full(shape, float(value)))
    content = (tmp_path / "x.safetensors").read_bytes()
    assert write.listing == {"x.safetensors": (len(content), xxhash.xxh3_64_hexdigest(content))}


def test_library_files_are_listed_and_others_are_not(tmp_path):
    (tmp_path / "modeling").mkdir()
    (tmp_path / "modeling" / "theirs").write_text("half writ")
    plan = FileJobs(tmp_path, CopyBuffers())
    plan.add_library_files("modeling", lambda directory: (directory / "config.json").write_text("{}"))
    assert plan.run() == {"modeling/config.json": (2, xxhash.xxh3_64_hexdigest(b"{}"))}
    assert sorted(path.name for path in (tmp_path / "modeling").iterdir()) == ["config.json", "theirs"]
    assert [path.name for path in tmp_path.iterdir()] == ["modeling"]


@pytest.mark.parametrize("inline", [True, False])
def test_a_failure_names_the_file(tmp_path, inline):
    plan = FileJobs(tmp_path / "missing", None)
    plan.add_bytes("x", b"abc")
    write = BackgroundWrite(plan, inline=inline)
    write.wait()
    assert isinstance(write.failure, OSError)
    assert write.failure.filename == str(tmp_path / "missing" / "x")


def test_bytes_may_go_into_a_directory_of_their_own(tmp_path):
    plan = FileJobs(tmp_path, None)
    plan.add_bytes("templates/x", b"abc")
    assert plan.run() == {"templates/x": (3, xxhash.xxh3_64_hexdigest(b"abc"))}


def failing(error: Exception):
    def write_files(directory: Path) -> None:
        raise error

    return write_files


@pytest.mark.parametrize(
    ("error", "is_disk"),
    [
        (ValueError("GenerationConfig is invalid"), False),
        (TypeError("Object of type Thing is not JSON serializable"), False),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), True),
        (
            SafetensorError(
                'I/O error: Os { code: 28, kind: StorageFull, message: "No space left on device" }'
            ),
            True,
        ),
        (OSError(28, "No space left on device", "/x"), True),
    ],
)
def test_a_failure_has_its_own_cause(tmp_path, error, is_disk):
    plan = FileJobs(tmp_path, None)
    plan.add_library_files("", failing(error))
    write = BackgroundWrite(plan, inline=True)
    write.wait()
    assert str(getattr(error, "strerror", error)) in str(write.failure)
    if not isinstance(error, OSError):
        assert type(error).__name__ in str(write.failure)
    assert is_disk_error(write.failure) == is_disk


def test_a_full_disk_is_an_error_that_names_the_file():
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        write_safetensors(Path("/dev/full"), {"x": torch.zeros(10)}, {})


def test_weights_are_shared_out_in_files_of_a_fair_size(monkeypatch):
    monkeypatch.setattr("colossal_llama.training.checkpoint.modeling_files.MIN_FILE_BYTES", 100)
    monkeypatch.setattr("colossal_llama.training.checkpoint.modeling_files.MAX_FILE_BYTES", 1000)
    assert cut_into_files([30, 30, 30], 8) == [[0, 1, 2]]
    assert cut_into_files([100] * 8, 4) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert cut_into_files([5000, 10, 600, 600], 1) == [[0], [1, 2], [3]]
    assert hf_shard_names({"a": ("f2", 1), "b": ("f1", 1), "c": ("f1", 1)}) == {
        "f1": "model-00001-of-00002.safetensors",
        "f2": "model-00002-of-00002.safetensors",
    }
    assert hf_shard_names({"a": ("f", 1)}) == {"f": "model.safetensors"}

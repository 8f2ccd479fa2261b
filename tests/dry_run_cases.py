"""Settings with which `train.py` and `train.py --dry_run` must give the same answer, run in one process.

    python tests/dry_run_cases.py MODEL DATA WORKSPACE

prints a JSON object a case: its name, both exit codes, and what both said.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = "model.safetensors"
STEP = "epoch-0_step-1"


class Workspace:
    """Directories to spoil, and two runs of one step that are there to resume.

    Attributes:
        run: `save_dir` of the first run; `lora_run` of the one with adapters.
    """

    def __init__(self, model: Path, data: Path, directory: Path) -> None:
        self.source, self.data, self.directory = model, data, directory
        self.run, self.lora_run = directory / "run", directory / "lora_run"
        self.cleanup = contextlib.ExitStack()

    def model(self) -> Path:
        target = self.directory / "model"
        shutil.rmtree(target, ignore_errors=True)
        return Path(shutil.copytree(self.source, target))

    def copy(self, save_dir: Path) -> Path:
        target = self.directory / "copy"
        shutil.rmtree(target, ignore_errors=True)
        return Path(shutil.copytree(save_dir, target))

    def foreign_data(self, column: str, value: int) -> Path:
        """Bins as other programs write them, with a value of each row changed."""
        import datasets

        rows = {"input_ids": [[5, 6, 7]] * 64, "labels": [[5, 6, 7]] * 64, "document_lengths": [[3]] * 64}
        rows[column] = [[value, *row[1:]] for row in rows[column]]
        target = self.directory / "bins" / "part-00000"
        shutil.rmtree(target, ignore_errors=True)
        datasets.Dataset.from_dict(rows).save_to_disk(str(target))
        return target.parent


Case = Callable[[Workspace], list[Any]]
CASES: dict[str, tuple[int, Case]] = {}


def case(code: int) -> Callable[[Case], Case]:
    def add(make: Case) -> Case:
        CASES[make.__name__] = (code, make)
        return make

    return add


def with_model(code: int, name: str, spoil: Callable[[Path], Any], *flags: str) -> None:
    def make(space: Workspace) -> list[Any]:
        model = space.model()
        spoil(model)
        return ["--pretrained", model, *flags]

    CASES[name] = (code, make)


def set_values(file: str, **values: Any) -> Callable[[Path], Any]:
    def change(model: Path) -> None:
        path = model / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def write(file: str, content: str | bytes) -> Callable[[Path], Any]:
    content = content.encode() if isinstance(content, str) else content
    return lambda model: (model / file).write_bytes(content)


def change_tensors(change: Callable[[dict], Any], fmt: str = "pt") -> Callable[[Path], Any]:
    def spoil(model: Path) -> None:
        tensors = load_file(model / WEIGHTS)
        change(tensors)
        save_file(tensors, model / WEIGHTS, metadata={"format": fmt})

    return spoil


def cut_rows(tensors: dict) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name][:-1].clone()


def index_of_missing_shard(model: Path) -> None:
    (model / WEIGHTS).unlink()
    (model / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))


def broken_index(model: Path) -> None:
    (model / WEIGHTS).unlink()
    (model / f"{WEIGHTS}.index.json").write_text("[1]")


def broken_bin(model: Path) -> None:
    (model / WEIGHTS).rename(model / "pytorch_model.bin")


def without_prefix(tensors: dict) -> None:
    for name in list(tensors):
        if name != "lm_head.weight":
            tensors[name.removeprefix("model.")] = tensors.pop(name)


def tied_without_head_and_prefix(model: Path) -> None:
    set_values("config.json", tie_word_embeddings=True)(model)
    change_tensors(lambda tensors: (tensors.pop("lm_head.weight"), without_prefix(tensors)))(model)


def add_token(model: Path) -> None:
    set_values("config.json", vocab_size=500)(model)


@case(0)
def healthy(space: Workspace) -> list[Any]:
    return []


@case(2)
def save_dir_not_writable(space: Workspace) -> list[Any]:
    return ["--save_dir", "/proc/checkpoints"]


@case(2)
def tensorboard_dir_not_writable(space: Workspace) -> list[Any]:
    return ["--tensorboard_dir", "/proc/logs"]


@case(2)
def config_file_not_writable(space: Workspace) -> list[Any]:
    return ["--config_file", "/proc/config.json"]


@case(2)
def save_dir_of_an_earlier_run(space: Workspace) -> list[Any]:
    return ["--save_dir", space.run]


@case(2)
def save_dir_in_use(space: Workspace) -> list[Any]:
    from colossal_llama.utils.files import locked_directory

    space.cleanup.enter_context(locked_directory(space.directory / "locked", "a test"))
    return ["--save_dir", space.directory / "locked"]


@case(0)
def nothing_saved_yet(space: Workspace) -> list[Any]:
    return ["--save_dir", space.directory / "nothing", "--load_checkpoint", "latest"]


@case(0)
def resumed(space: Workspace) -> list[Any]:
    return ["--save_dir", space.copy(space.run), "--load_checkpoint", "latest"]


@case(0)
def resumed_at_its_end(space: Workspace) -> list[Any]:
    return ["--save_dir", space.copy(space.run), "--load_checkpoint", "latest", "--max_steps", 1]


@case(2)
def resumed_with_another_rate(space: Workspace) -> list[Any]:
    return ["--load_checkpoint", space.run / STEP, "--lr", 1]


@case(2)
def resumed_with_a_shorter_warm_up(space: Workspace) -> list[Any]:
    return ["--load_checkpoint", space.run / STEP, "--warmup_steps", 1]


@case(2)
def decay_after_the_data(space: Workspace) -> list[Any]:
    return ["--lr_schedule", "wsd", "--decay_start", 10**6]


@case(2)
def rows_longer_than_the_positions(space: Workspace) -> list[Any]:
    return ["--max_position_embeddings", 95]


@case(0)
def longer_context(space: Workspace) -> list[Any]:
    return ["--rope_scaling", "yarn:2", "--rope_theta", 5e5]


@case(0)
def new_stage_with_the_same_optimizer(space: Workspace) -> list[Any]:
    return ["--load_checkpoint", space.run / STEP, "--keep_optimizer", "--dataset", space.data / "part-00000"]


@case(2)
def new_stage_with_adapters_optimizer(space: Workspace) -> list[Any]:
    return ["--load_checkpoint", space.lora_run / STEP, "--keep_optimizer"]


@case(2)
def optimizer_of_weights_alone(space: Workspace) -> list[Any]:
    return ["--load_checkpoint", space.run / STEP / "modeling", "--keep_optimizer"]


@case(2)
def resumed_on_other_data(space: Workspace) -> list[Any]:
    return ["--load_checkpoint", space.run / STEP, "--dataset", space.data / "part-00000"]


@case(2)
def resumed_with_another_model(space: Workspace) -> list[Any]:
    model = space.model()
    set_values("config.json", rms_norm_eps=1e-3)(model)
    return ["--load_checkpoint", space.run / STEP, "--pretrained", model]


@case(2)
def checkpoint_damaged(space: Workspace) -> list[Any]:
    checkpoint = space.copy(space.run) / STEP
    (checkpoint / "modeling" / "config.json").write_text("{}")
    return ["--load_checkpoint", checkpoint]


@case(2)
def every_checkpoint_damaged(space: Workspace) -> list[Any]:
    save_dir = space.copy(space.run)
    for path in save_dir.glob("epoch-*/lr_scheduler"):
        path.unlink()
    return ["--load_checkpoint", "latest", "--save_dir", save_dir]


@case(2)
def list_of_files_is_an_array(space: Workspace) -> list[Any]:
    checkpoint = space.copy(space.run) / STEP
    (checkpoint / "COMPLETE").write_text("[1]")
    return ["--load_checkpoint", checkpoint]


@case(2)
def checkpoint_unfinished(space: Workspace) -> list[Any]:
    checkpoint = space.copy(space.run) / STEP
    (checkpoint / "COMPLETE").unlink()
    return ["--load_checkpoint", checkpoint]


@case(2)
def neither_checkpoint_nor_weights(space: Workspace) -> list[Any]:
    return ["--load_checkpoint", space.data]


@case(2)
def adapter_for_weights(space: Workspace) -> list[Any]:
    return ["--load_checkpoint", space.lora_run / STEP / "modeling"]


@case(0)
def new_stage(space: Workspace) -> list[Any]:
    return ["--load_checkpoint", space.run / STEP / "modeling"]


@case(2)
def new_stage_with_broken_weights(space: Workspace) -> list[Any]:
    model = space.model()
    change_tensors(lambda tensors: tensors.pop("model.norm.weight"))(model)
    return ["--load_checkpoint", model]


@case(0)
def adapters_resumed(space: Workspace) -> list[Any]:
    return ["--load_checkpoint", "latest", "--save_dir", space.copy(space.lora_run), "--lora_rank", 2]


@case(2)
def adapters_on_other_weights(space: Workspace) -> list[Any]:
    model = space.model()
    change_tensors(lambda tensors: tensors["model.norm.weight"].mul_(1.5))(model)
    return ["--load_checkpoint", space.lora_run / STEP, "--lora_rank", 2, "--pretrained", model]


@case(2)
def more_processes_than_were_started(space: Workspace) -> list[Any]:
    return ["--plugin", "3d", "--tp", 2]


@case(2)
def too_few_rows(space: Workspace) -> list[Any]:
    return ["--accumulation_steps", 10**6]


@case(2)
def token_outside_the_model(space: Workspace) -> list[Any]:
    return ["--dataset", space.foreign_data("input_ids", 501)]


@case(2)
def documents_of_other_lengths(space: Workspace) -> list[Any]:
    return ["--dataset", space.foreign_data("document_lengths", 2)]


@case(0)
def bins_of_other_programs(space: Workspace) -> list[Any]:
    return ["--dataset", space.foreign_data("input_ids", 9)]


with_model(2, "weights_missing", lambda model: (model / WEIGHTS).unlink())
with_model(2, "weights_cut_short", lambda model: write(WEIGHTS, (model / WEIGHTS).read_bytes()[:9000])(model))
with_model(2, "tensor_missing", change_tensors(lambda tensors: tensors.pop("model.norm.weight")))
with_model(2, "tensor_of_another_shape", change_tensors(cut_rows))
with_model(2, "weights_of_another_library", change_tensors(lambda tensors: None, fmt="numpy"))
with_model(2, "weights_half_without_a_prefix", change_tensors(without_prefix))
with_model(0, "tied_weights_without_head_and_prefix", tied_without_head_and_prefix)
with_model(
    0, "unknown_tensor", change_tensors(lambda tensors: tensors.update(extra=tensors["lm_head.weight"] + 1))
)
with_model(2, "index_of_missing_shard", index_of_missing_shard)
with_model(2, "broken_index", broken_index)
with_model(2, "broken_bin", broken_bin)
with_model(2, "other_width", set_values("config.json", hidden_size=128, head_dim=32))
with_model(2, "unknown_activation", set_values("config.json", hidden_act="sulu"))
with_model(2, "unknown_scaling", set_values("config.json", rope_scaling={"type": "su"}))
with_model(2, "end_outside_the_vocabulary", set_values("config.json", eos_token_id=501))
with_model(
    2,
    "end_outside_the_vocabulary_when_generating",
    set_values("generation_config.json", eos_token_id=[2, 501]),
)
with_model(0, "padding_outside_the_vocabulary", set_values("config.json", pad_token_id=501))
with_model(0, "padding_in_old_uploads", set_values("config.json", pad_token_id=-1))
with_model(2, "configuration_is_an_array", write("config.json", "[]"))
with_model(2, "generation_configuration_is_an_array", write("generation_config.json", "[]"))
with_model(2, "tokenizer_configuration_is_an_array", write("tokenizer_config.json", "[]"))
with_model(2, "tokenizer_broken", write("tokenizer.json", '{"version": 1}'))
with_model(2, "tokenizer_larger_than_the_model", add_token)
with_model(
    0, "speed_of_a_shape", lambda model: (model / WEIGHTS).unlink(), "--benchmark", "--num_samples", "12"
)
with_model(2, "speed_of_broken_weights", change_tensors(cut_rows), "--benchmark", "--num_samples", "12")


def main() -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from support import load_script

    train = load_script(ROOT / "train.py")
    from colossal_llama.training.arguments import parse_settings
    from colossal_llama.training.process import start_process
    from colossal_llama.upstream.quiet import quieten_libraries
    from colossal_llama.utils.errors import UserError

    space = Workspace(*map(Path, sys.argv[1:]))
    outputs = space.directory / "outputs"
    common = ["--pretrained", space.source, "--dataset", space.data, "--max_length", 96, "--plugin", "ddp"]
    common += ["--mixed_precision", "fp32", "--accumulation_steps", 1, "--batch_size", 4, "--num_workers", 0]
    common += [
        "--max_steps",
        2,
        "--save_interval",
        1,
        "--skip_save_each_epoch",
        "--save_dir",
        outputs / "saved",
    ]
    common += ["--tensorboard_dir", outputs / "logs", "--config_file", outputs / "config.json"]
    quieten_libraries()
    stop = start_process(parse_settings(list(map(str, common))).optimizer)
    from colossal_llama.training.run import Run

    def answer(action: Callable, *flags: Any) -> tuple[int, str]:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                code = action(parse_settings(list(map(str, [*common, *flags]))))
            except UserError as error:
                return error.exit_code, str(error)
            except SystemExit as error:
                return error.code, said.getvalue()
            except Exception:
                return 1, traceback.format_exc()
        return code, said.getvalue()

    def run(settings: Any) -> int:
        Run.prepare(settings, world_size=1).train(stop)
        return 0

    for flags in (["--save_dir", space.run], ["--save_dir", space.lora_run, "--lora_rank", 2]):
        code, said = answer(run, *flags, "--max_steps", 1)
        assert code == 0, said
    for name, (_, make) in CASES.items():
        with space.cleanup:
            flags = make(space)
            before = {path: path.stat().st_mtime_ns for path in space.directory.rglob("*")}
            dry = answer(train.dry_run, *flags, "--dry_run")
            after = {path: path.stat().st_mtime_ns for path in space.directory.rglob("*")}
            real = answer(run, *flags)
        shutil.rmtree(outputs, ignore_errors=True)
        touched = sorted(str(path) for path in before.keys() ^ after.keys())
        print(json.dumps({"name": name, "dry": dry, "run": real, "touched": touched}), flush=True)


if __name__ == "__main__":
    main()

"""The commands whose outputs are stored (`outputs.json`) and compared between commits.

They run in a working directory that `make_working_directory` fills, and name all files relative to it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launch import environment, free_port
from support import ROOT

INPUTS = ROOT / "tests" / "golden" / "inputs"
CHECKPOINT = ROOT / "tests" / "golden" / "checkpoint"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' "
    "+ message['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
# Pieces of several characters among them whose parts are no pieces: nothing yields those.
UNREACHABLE_PIECES = ["春江花月夜", "造纸术与指南针", "zqxj"]


class Command:
    """A script of the clone with its arguments.

    Args:
        processes: above 0 it is started with torchrun.
        world_size: of a run that a single process pretends to belong to.
        streams: what of "stdout" and "stderr" is compared between commits.
        fails: a user's mistake: an exit code other than 0 is expected.
    """

    def __init__(
        self,
        script: str,
        *arguments: object,
        processes: int = 0,
        stdin: str = "",
        world_size: int = 0,
        streams: Sequence[str] = (),
        fails: bool = False,
    ) -> None:
        self.script, self.processes, self.stdin, self.world_size = script, processes, stdin, world_size
        self.streams, self.fails = streams, fails
        self.arguments = [str(argument) for argument in arguments]

    def __str__(self) -> str:
        launcher = f"torchrun --nproc_per_node={self.processes} " if self.processes else "python "
        return launcher + " ".join([self.script, *self.arguments])

    def run(
        self, directory: Path, env: dict[str, str], code: Path = ROOT, timeout: float = 600
    ) -> subprocess.CompletedProcess[str]:
        words = [sys.executable]
        if self.world_size:
            env = {**env, "WORLD_SIZE": str(self.world_size), "RANK": "0"}
        if self.processes:
            words += ["-m", "torch.distributed.run", f"--nproc_per_node={self.processes}"]
            words += [f"--master_port={free_port()}"]
        return subprocess.run(
            [*words, str(code / self.script), *self.arguments],
            cwd=directory,
            env=env,
            input=self.stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )


@dataclass
class Case:
    """Commands that run one after the other and write below `<working directory>/<name>`.

    Args:
        needs: names of cases whose outputs these commands read.
    """

    name: str
    commands: Sequence[Command]
    needs: Sequence[str] = field(default_factory=tuple)


def script_environment(code: Path = ROOT) -> dict[str, str]:
    """For scripts that take the package from `code`."""
    return {
        **environment(),
        "PYTHONPATH": str(code),
        "PYTHONWARNINGS": "ignore",
        "TOKENIZERS_PARALLELISM": "false",
        "MPLBACKEND": "Agg",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "110",
    }


def write_jsonl(path: Path, records: Iterable[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")


def _first_lines(path: Path, count: int) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:count]]


def make_working_directory(directory: Path) -> None:
    """Writes `directory/inputs`: the stored tokenizers, and slices of the bundled sample data."""
    inputs, sample = directory / "inputs", ROOT / "examples" / "data"
    shutil.copytree(INPUTS, inputs)
    for name, count in (("history", 30), ("science", 24)):
        records = _first_lines(sample / "pretrain" / f"{name}.jsonl", count)
        # Sources, so that rows differ in their number of labels.
        for number, record in enumerate(records):
            if number % 3 == 0 and not record["source"]:
                cut = len(record["target"]) // 2
                record.update(source=record["target"][:cut], target=record["target"][cut:])
            record["category"] = f"{name}-{number % 2}"
        write_jsonl(inputs / name / "records.jsonl", records)
    write_jsonl(
        inputs / "conversations" / "records.jsonl", _first_lines(sample / "sft" / "conversations.jsonl", 40)
    )
    faulty = [
        *_first_lines(sample / "pretrain" / "history.jsonl", 8),
        {"source": 1, "target": "x"},
        {},
        "text",
    ]
    write_jsonl(inputs / "faulty" / "records.jsonl", faulty)
    pieces = [record["piece"] for record in _first_lines(sample / "pieces.jsonl", 60)]
    write_jsonl(inputs / "pieces.jsonl", [{"piece": piece} for piece in pieces + UNREACHABLE_PIECES])
    shutil.copytree(inputs / "llama3", inputs / "llama3-chat")
    shutil.copytree(CHECKPOINT / "model", inputs / "small-model")
    settings = inputs / "llama3-chat" / "tokenizer_config.json"
    with_template = {**json.loads(settings.read_text(encoding="utf-8")), "chat_template": CHAT_TEMPLATE}
    settings.write_text(json.dumps(with_template, indent=2, ensure_ascii=False), encoding="utf-8")


def _tokenizer(kind: str, unreachable: str) -> Case:
    name = f"tokenizers/{kind}-{unreachable}"
    flags = [
        *("--source_tokenizer_dir", f"inputs/{kind}", "--target_tokenizer_dir", name),
        *("--expand_tokens_file", "inputs/pieces.jsonl", "--unreachable", unreachable),
    ]
    return Case(name, [Command("colossal_llama/tokenizer/init_tokenizer.py", *flags)])


def prepare_case(name: str, script: str, tokenizer: str, inputs: str, *flags: object) -> Case:
    name = f"data/{name}"
    command = Command(
        f"prepare_{script}_dataset.py",
        *("--data_input_dirs", inputs, "--tokenizer_dir", tokenizer, "--data_output_dirs", name),
        *flags,
    )
    return Case(name, [command], [tokenizer] if tokenizer.startswith("tokenizers/") else [])


TWO_DIRS = "inputs/history,inputs/science"
LLAMA2 = "tokenizers/llama2-report"
SMALL = ("--max_length", 96, "--num_spliced_dataset_bins", 3)
ONE, TWO = ("--num_workers", 1), ("--num_workers", 2)
TALKS = "inputs/conversations"
SFT = ("--max_length", 640, "--num_spliced_dataset_bins", 2)
ROWS = ("--max_length", 512, "--num_spliced_dataset_bins", 3)
DDP = ("--plugin", "ddp", "--mixed_precision", "fp32")


def preparation_cases() -> list[Case]:
    """Tokenizers and data: integers alone, the same on every machine."""
    compared = "tokenizers/compared"
    learned = "tokenizers/learned"
    return [
        *(_tokenizer(kind, way) for kind in ("llama2", "llama3") for way in ("report", "add", "drop")),
        Case(
            learned,
            [
                Command(
                    "colossal_llama/tokenizer/learn_pieces.py",
                    *("--data_input_dirs", f"{TWO_DIRS},{TALKS}", "--source_tokenizer_dir", "inputs/llama2"),
                    *("--output_file", f"{learned}/pieces.jsonl", "--num_tokens", 50),
                )
            ],
        ),
        Case(
            compared,
            [
                Command(
                    "colossal_llama/tokenizer/compare_tokenizers.py",
                    *("--tokenizer_dirs", f"inputs/llama2,{LLAMA2}", "--data_input_dirs", TWO_DIRS),
                    *("--output_file", f"{compared}/comparison.json"),
                )
            ],
            [LLAMA2],
        ),
        prepare_case("pretrain-chunk", "pretrain", LLAMA2, TWO_DIRS, *SMALL, *ONE),
        prepare_case("pretrain-chunk-2-workers", "pretrain", LLAMA2, TWO_DIRS, *SMALL, *TWO),
        prepare_case(
            *("pretrain-truncate", "pretrain", "tokenizers/llama3-add", TWO_DIRS, *SMALL, *TWO),
            *("--long_documents", "truncate", "--seed", 7),
        ),
        prepare_case(
            *("pretrain-faulty", "pretrain", "tokenizers/llama2-drop", "inputs/faulty", *SMALL, *ONE),
            *("--on_bad_record", "skip"),
        ),
        prepare_case("sft-llama2", "sft", LLAMA2, TALKS, "--max_length", 512, "--llama_version", 2, *ONE),
        prepare_case("sft-llama3-splice", "sft", "tokenizers/llama3-report", TALKS, *SFT, "--splice", *TWO),
        prepare_case("sft-llama3", "sft", "inputs/llama3", TALKS, *SFT, *ONE),
        prepare_case("rows", "sft", "inputs/llama2", TALKS, *ROWS, "--llama_version", 2, *ONE),
        prepare_case("sft-chat-template", "sft", "inputs/llama3-chat", TALKS, *SFT, "--chat_template", *ONE),
    ]


def order_cases() -> list[Case]:
    """Runs whose count of tokens so far says which row each step used: one a step, of many lengths."""
    cases = []
    for name, flags in (
        ("training/order", ["--num_epochs", 2, "--max_steps", 60, "--seed", 11]),
        ("training/order-bucketed", ["--bucketed"]),
    ):
        flags += [*DDP, "--batch_size", 1, "--accumulation_steps", 1, "--max_length", 512]
        flags += ["--save_interval", 0, "--skip_save_each_epoch"]
        run = Command("train.py", *training_flags(name, ["data/rows/arrow"], "inputs/small-model"), *flags)
        cases.append(Case(name, [run], ["data/rows"]))
    return cases


def training_flags(name: str, data: Sequence[str], model: str = "inputs/model") -> list[object]:
    """Where a run reads and writes."""
    return [
        *("--pretrained", model, "--dataset", *data),
        *("--save_dir", f"{name}/checkpoints", "--tensorboard_dir", f"{name}/logs"),
        *("--config_file", f"{name}/config.json", "--num_workers", 0),
    ]


def make_model(
    source: Path,
    target: Path,
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    initializer_range: float = 0.02,
    tied: bool = False,
) -> None:
    """A tokenizer with a random model: no script of the clone takes part."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.copytree(source, target)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=initializer_range,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).save_pretrained(target)
    os.chmod(target / "model.safetensors", 0o644)

"""Which plugin and layout a model needs on how many GPUs: the tables of docs/cluster.md.

The figures are those of the memory model behind `train.py --dry_run`. Layouts are tried from the one that
communicates least; the first whose fullest process fits is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from colossal_llama.utils.arguments import ArgumentParser, positive_int
from colossal_llama.utils.errors import run_command

if TYPE_CHECKING:
    from transformers import LlamaConfig

    from colossal_llama.training.plugins.base import Plugin

# Kernels' workspaces, CUDA itself and fragmentation need the rest.
USABLE = 0.9
NUM_GPUS = (1, 2, 4, 8, 16, 32, 64)
VOCAB_SIZE = 69104  # LLaMA-2's 32,000 pieces and the 37,104 of the reference models
SHAPES = {
    "LLaMA-2 7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
    "LLaMA-3 8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "LLaMA-2 13B": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
    "LLaMA-2 70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
COMMON_FLAGS = "--benchmark --dry_run --mixed_precision bf16 --use_flash_attn --max_length 4096"


@dataclass(frozen=True)
class Candidate:
    """A name for the table, and the flags of train.py that make it."""

    name: str
    flags: str

    def plugin_on(self, num_gpus: int) -> Plugin | None:
        """The plugin with this layout; None where the layout takes another number of GPUs."""
        from colossal_llama.training.arguments import parse_settings
        from colossal_llama.training.plugins import find_plugin

        words = ["--pretrained", "any/model", *COMMON_FLAGS.split(), *self.flags.split()]
        settings = parse_settings(words)
        if num_gpus % settings.layout.model_parallel_size:
            return None
        return find_plugin(settings.layout.plugin)(settings, num_gpus)


def _layouts() -> list[Candidate]:
    checkpointing = "--use_grad_checkpoint"
    layouts = [
        Candidate("zero2", "--plugin zero2"),
        Candidate("zero2, checkpointing", f"--plugin zero2 {checkpointing}"),
    ]
    layouts += [Candidate(f"3d, tp {tp}", f"--plugin 3d --tp {tp} {checkpointing}") for tp in (2, 4, 8)]
    layouts += [
        Candidate(f"3d, tp 8, pp {pp}", f"--plugin 3d --tp 8 --pp {pp} --batch_size {4 * pp} {checkpointing}")
        for pp in (2, 4, 8)
    ]
    layouts.append(Candidate("gemini", f"--plugin gemini {checkpointing}"))
    layouts.append(Candidate("zero2_cpu", f"--plugin zero2_cpu {checkpointing}"))
    return layouts


LAYOUTS = _layouts()


def make_config(model: str) -> LlamaConfig:
    from transformers import LlamaConfig

    shape = {"vocab_size": VOCAB_SIZE, "num_attention_heads": 32, "max_position_embeddings": 4096}
    return LlamaConfig(**{**shape, **SHAPES[model]})


def choose_layout(model: str, num_gpus: int, gpu_memory_gib: int) -> tuple[Candidate, int, int] | None:
    """(layout, GiB of the fullest process, its GiB of CPU memory) of the first layout that fits, if any."""
    from colossal_llama.training.memory import estimate_memory
    from colossal_llama.training.plan import GIB

    config = make_config(model)
    for layout in LAYOUTS:
        plugin = layout.plugin_on(num_gpus)
        if plugin is None:
            continue
        stages = [estimate_memory(plugin, config, stage) for stage in range(plugin.layout.pp)]
        peak = max(stage.peak for stage in stages)
        if peak <= USABLE * gpu_memory_gib * GIB:
            return layout, round(peak / GIB), round(max(stage.host for stage in stages) / GIB)
    return None


def format_layouts(gpu_memory_gib: int) -> str:
    """A Markdown table: a row for each model, a column for each number of GPUs."""
    header = f"| {gpu_memory_gib} GiB a GPU | " + " | ".join(_count(number) for number in NUM_GPUS) + " |"
    lines = [header, "| --- |" + " --- |" * len(NUM_GPUS)]
    for model in SHAPES:
        cells = [_cell(choose_layout(model, number, gpu_memory_gib)) for number in NUM_GPUS]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _count(number: int) -> str:
    return f"{number} GPU" + ("s" if number > 1 else "")


def _cell(choice: tuple[Candidate, int, int] | None) -> str:
    if choice is None:
        return "–"
    layout, peak, host = choice
    return f"{layout.name}: {peak}" + (f" (+ {host} CPU)" if host else "")


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="layout_table.py", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--gpu_memory_gib",
        nargs="+",
        type=positive_int,
        default=[80, 40],
        help="memory of a GPU, a table each",
    )
    return parser


def main(words: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(words)
    print("\n\n".join(format_layouts(memory) for memory in args.gpu_memory_gib))


if __name__ == "__main__":
    run_command(main)

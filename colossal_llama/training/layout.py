"""Layout: how the model and the rows of an optimizer step are spread over the processes of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from colossal_llama.training.plugins import PLUGINS
from colossal_llama.utils.arguments import positive_int
from colossal_llama.utils.settings import OnResume, flag

if TYPE_CHECKING:
    from transformers import LlamaConfig

SEQUENCE_PARALLEL_MODES = ("split_gather", "ring", "all_to_all", "ring_attn")
# Modes that split the sequence over the tensor parallel ranks.
TENSOR_GROUP_MODES = ("split_gather", "ring")
# What tells one layout from another, beside the number of processes.
_RECORDED = ("plugin", "tp", "pp", "sp", "sp_mode", "enable_sequence_parallelism", "zero_stage")
WITH_LAYOUT = OnResume.WITH_LAYOUT


@dataclass(frozen=True)
class LayoutSettings:
    """The layout as the user asks for it, for any number of processes."""

    plugin: str = flag("gemini", "booster plugin", choices=tuple(PLUGINS), on_resume=WITH_LAYOUT)
    tp: int = flag(1, "tensor parallel size (3d)", type=positive_int, on_resume=WITH_LAYOUT)
    pp: int = flag(1, "pipeline parallel size (3d)", type=positive_int, on_resume=WITH_LAYOUT)
    sp: int = flag(1, "sequence parallel size (3d, all_to_all)", type=positive_int, on_resume=WITH_LAYOUT)
    zero_stage: int = flag(
        1, "ZeRO stage (3d)", type=int, choices=(0, 1, 2), also=("--zero",), on_resume=WITH_LAYOUT
    )
    sp_mode: str = flag(
        "split_gather", "sequence parallelism (3d)", choices=SEQUENCE_PARALLEL_MODES, on_resume=WITH_LAYOUT
    )
    enable_sequence_parallelism: bool = flag(
        False, "switch sequence parallelism on (3d)", on_resume=WITH_LAYOUT
    )
    zero_cpu_offload: bool = flag(False, "optimizer state in CPU memory (3d)", on_resume=WITH_LAYOUT)
    batch_size: int = flag(
        1,
        "rows per process and pass; with --pp > 1, rows per pipeline pass",
        type=positive_int,
        also=("--micro_batch_size",),
        on_resume=WITH_LAYOUT,
    )
    accumulation_steps: int = flag(8, "passes per optimizer step", type=positive_int, on_resume=WITH_LAYOUT)
    microbatch_size: int = flag(
        1, "rows per pipeline microbatch (3d with --pp > 1)", type=positive_int, on_resume=WITH_LAYOUT
    )
    mixed_precision: str = flag("fp16", "arithmetic; fp32 not with Gemini", choices=("fp16", "bf16", "fp32"))
    use_grad_checkpoint: bool = flag(
        False,
        "recompute activations in the backward pass: less memory, about a third more work",
        on_resume=WITH_LAYOUT,
    )
    use_flash_attn: bool = flag(
        False,
        "flash attention on a GPU: flash-attn, or torch's own kernel without that package",
        on_resume=WITH_LAYOUT,
    )
    compile: bool = flag(
        False,
        "compile the decoder layers by torch.compile (ddp, zero2, zero2_cpu): the first steps take minutes",
        on_resume=WITH_LAYOUT,
    )

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one copy of the model between them."""
        return self.tp * self.pp * self.sp

    def on(self, world_size: int) -> Layout:
        """This layout on so many processes."""
        return Layout(**asdict(self), world_size=world_size)


@dataclass(frozen=True)
class Layout(LayoutSettings):
    """A layout of `world_size` processes."""

    world_size: int = 1

    @property
    def dp_size(self) -> int:
        """Data-parallel size: processes that see different rows."""
        return self.world_size // self.model_parallel_size

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step, over all processes and accumulated passes."""
        return self.batch_size * self.accumulation_steps * self.dp_size

    @property
    def is_pipeline(self) -> bool:
        return self.pp > 1

    @property
    def rows_of_pass(self) -> int:
        """Rows that go through the model together."""
        return self.microbatch_size if self.is_pipeline else self.batch_size

    @property
    def num_microbatches(self) -> int:
        return self.batch_size // self.microbatch_size

    @property
    def splits_norms(self) -> bool:
        """Whether tensor parallel ranks hold a part of the sequence each between their linear layers."""
        return self.enable_sequence_parallelism and self.sp_mode in TENSOR_GROUP_MODES

    @property
    def uses_ulysses(self) -> bool:
        """Whether ranks exchange parts of the sequence for parts of the heads (`all_to_all`)."""
        return self.enable_sequence_parallelism and self.sp_mode == "all_to_all"

    @property
    def norm_parts(self) -> int:
        """Parts that the norms' sequence is cut into, within what `sp` cuts."""
        return self.tp if self.splits_norms else 1

    @property
    def length_multiple(self) -> int:
        """The lengths of padded rows are a multiple of this: each sequence parallel rank gets as much."""
        return self.sp * self.norm_parts

    def padded_length(self, max_length: int) -> int:
        """Tokens of the longest padded row."""
        return next_multiple(max_length, self.length_multiple)

    def layers_of_stages(self, num_layers: int) -> list[int]:
        """Layers of each pipeline stage, as colossalai deals them: middle stages get what is left over."""
        layers = [num_layers // self.pp] * self.pp
        remainder = num_layers % self.pp
        first = self.pp // 2 - remainder // 2
        for stage in range(first, first + remainder):
            layers[stage] += 1
        return layers

    def problems(self, config: LlamaConfig) -> list[str]:
        """Sizes that do not divide the processes or the model, each with its remedy."""
        problems = []
        if self.world_size % self.model_parallel_size:
            problems.append(
                f"--tp {self.tp} --pp {self.pp} --sp {self.sp}: a copy of the model takes "
                f"{self.model_parallel_size} processes, but {self.world_size} were started, which is no "
                f"multiple of it; start {next_multiple(self.world_size, self.model_parallel_size)} processes "
                "or change the layout"
            )
        # all_to_all deals out whole heads: first to tensor parallel ranks, then to sequence parallel ones.
        heads_parts = self.tp * self.sp
        flags = f"--tp {self.tp}" + (f" --sp {self.sp}" if self.sp > 1 else "")
        for name, count in (
            ("attention heads", config.num_attention_heads),
            ("key/value heads", config.num_key_value_heads),
        ):
            if count % heads_parts:
                problems.append(
                    f"{flags}: the model's {count} {name} can't be dealt evenly to {heads_parts} processes; "
                    f"choose sizes whose product divides {count}"
                )
        if config.intermediate_size % self.tp:
            problems.append(
                f"--tp {self.tp}: the model's MLP width {config.intermediate_size} is no multiple of it; "
                "choose a divisor"
            )
        if self.pp > config.num_hidden_layers:
            problems.append(
                f"--pp {self.pp}: the model has only {config.num_hidden_layers} layers and each stage needs "
                f"one; use --pp {config.num_hidden_layers} or less"
            )
        return problems

    def as_json(self) -> dict[str, Any]:
        """What the record of a run has of it."""
        return {"world_size": self.world_size, **{name: getattr(self, name) for name in _RECORDED}}

    def changes_since(self, recorded: Mapping[str, Any]) -> list[str]:
        """What differs from the layout that a record has, as "tp 1 -> 2"."""
        return [
            f"{name} {recorded.get(name)} -> {value}"
            for name, value in self.as_json().items()
            if recorded.get(name) != value
        ]


def next_multiple(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple

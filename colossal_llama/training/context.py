"""Longer context: how many positions the model has, and how the rotary embedding spreads over them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from colossal_llama.utils.arguments import number, positive_int
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.settings import OnResume, flag

if TYPE_CHECKING:
    from transformers import LlamaConfig

ROPE_TYPES = ("linear", "dynamic", "yarn", "llama3")
# Those of LLaMA 3.1: wavelengths below a quarter of the original positions stay, those above are stretched.
_LLAMA3_BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


def _rope_scaling(text: str) -> str:
    kind, _, factor = text.partition(":")
    if kind not in ROPE_TYPES or not factor:
        raise ValueError(f"give TYPE:FACTOR, TYPE being one of {', '.join(ROPE_TYPES)}")
    try:
        number(float, minimum=1)(factor)
    except ValueError:
        raise ValueError("FACTOR has to be a number of at least 1") from None
    return text


@dataclass(frozen=True)
class ContextSettings:
    """Changes to the configuration that the model is trained and saved with."""

    rope_theta: float | None = flag(
        None,
        "base of the rotary frequencies (default: as in the model's configuration)",
        type=number(float, above=0),
        on_resume=OnResume.FREE,  # what they change is compared: the record has the configuration
    )
    rope_scaling: str | None = flag(
        None,
        "TYPE:FACTOR, stretches the rotary embedding over FACTOR times the positions that the model was "
        "first trained with; linear, dynamic, yarn or llama3 (default: as in the model's configuration)",
        type=_rope_scaling,
        on_resume=OnResume.FREE,
    )
    max_position_embeddings: int | None = flag(
        None,
        "positions of the model, in tokens; those that linear and dynamic scaling add do not count "
        "(default: as in the model's configuration; with yarn and llama3, FACTOR times the original)",
        type=positive_int,
        on_resume=OnResume.FREE,
    )

    @property
    def is_changed(self) -> bool:
        return (self.rope_theta, self.rope_scaling, self.max_position_embeddings) != (None, None, None)

    def conflicts(self, lora_rank: int, merge_lora: bool) -> list[str]:
        """An adapter alone can't carry a changed configuration."""
        if not (self.is_changed and lora_rank) or merge_lora:
            return []
        given = [f"--{name}" for name in vars(self) if getattr(self, name) is not None]
        return [
            f"{' and '.join(given)}: with --lora_rank {lora_rank}, only the adapter would be saved, which is "
            "loaded onto a model with the configuration of before; add --merge_lora"
        ]

    def apply(self, config: LlamaConfig) -> None:
        """Changes a model's configuration.

        Raises:
            UserError: the flags contradict each other for this model.
        """
        if self.rope_theta is not None:
            config.rope_theta = self.rope_theta
        if self.rope_scaling is not None:
            self._scale(config, *self.rope_scaling.split(":"))
        elif self.max_position_embeddings is not None:
            config.max_position_embeddings = self.max_position_embeddings

    def _scale(self, config: LlamaConfig, kind: str, factor_text: str) -> None:
        factor, given = float(factor_text), self.max_position_embeddings
        scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
        positions = config.max_position_embeddings
        if kind in ("yarn", "llama3"):
            before = config.rope_scaling or {}
            original = before.get("original_max_position_embeddings") or positions
            scaling["original_max_position_embeddings"] = original
            stretched = round(original * factor)
            if kind == "llama3":
                scaling |= _LLAMA3_BANDS
                positions = max(positions, stretched)
            elif given not in (None, stretched):
                # transformers computes with the ratio of the two numbers of positions.
                raise UserError(
                    f"--max_position_embeddings {given}: --rope_scaling {self.rope_scaling} gives the model "
                    f"{factor:g} x {original} = {stretched} positions; leave this out, or give another FACTOR"
                )
            else:
                positions = stretched
        config.rope_scaling = scaling
        config.max_position_embeddings = given or positions

"""What a run takes and costs, before it starts: FLOPs, hours, price; from assumptions that are printed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from colossal_llama.utils.arguments import number
from colossal_llama.utils.console import format_table
from colossal_llama.utils.devices import TERA, known_device, peak_flops
from colossal_llama.utils.llama_size import flops_per_token
from colossal_llama.utils.settings import OnResume, flag

if TYPE_CHECKING:
    from transformers import LlamaConfig

    from colossal_llama.training.adaptation import AdaptationSettings
    from colossal_llama.training.plan import RunPlan
    from colossal_llama.training.settings import RunSettings

PETA = 1e15


@dataclass(frozen=True)
class CostSettings:
    """What `--dry_run` assumes of the devices; nothing here changes a run."""

    assume_mfu: float = flag(
        0.4,
        "share of the devices' peak that --dry_run assumes the run to reach, above 0 to 1",
        type=number(float, above=0, maximum=1),
        on_resume=OnResume.FREE,
    )
    device_name: str | None = flag(
        None,
        "device that --dry_run plans for, by the driver's name, as 'H100 80GB HBM3' (default: the one found)",
        type=known_device,
        on_resume=OnResume.FREE,
    )
    price_per_hour: float | None = flag(
        None,
        "price of one device for an hour, in any currency; off: --dry_run names no price",
        type=number(float, minimum=0),
        on_resume=OnResume.FREE,
    )


@dataclass(frozen=True)
class RunCost:
    """What a run computes, and how long that takes.

    Attributes:
        tokens: of the run, padding not counted.
        flops_per_token: of the model with all weights trained; see `flops_per_token`.
        frozen_flops_per_token: of these, what is not computed for weights that are frozen.
        peak: of a device, in FLOP/s; None when it is not known.
    """

    tokens: float
    flops_per_token: float
    frozen_flops_per_token: float
    num_devices: int
    peak: float | None
    mfu: float

    @property
    def flops(self) -> float:
        return self.tokens * (self.flops_per_token - self.frozen_flops_per_token)

    @property
    def hours(self) -> float | None:
        if self.peak is None:
            return None
        return self.flops / (self.peak * self.mfu * self.num_devices) / 3600


def estimate_cost(
    plan: RunPlan, config: LlamaConfig, length_sums: tuple[float, float], settings: RunSettings
) -> RunCost:
    """The cost of the planned steps.

    Args:
        length_sums: of the documents' lengths, and of their squares; see `flops_per_token`.
    """
    costs = settings.costs
    whole = flops_per_token(config, *length_sums)
    device = costs.device_name or find_device()
    return RunCost(
        plan.tokens_per_step * plan.planned_steps,
        whole,
        2 * _frozen_matrices(plan, config, settings.adaptation),
        plan.world_size,
        peak_flops(device, settings.layout.mixed_precision) if device else None,
        costs.assume_mfu,
    )


def _frozen_matrices(plan: RunPlan, config: LlamaConfig, adaptation: AdaptationSettings) -> int:
    """Parameters of linear layers that get no gradients of their own: 2 of their 6 FLOPs are not computed."""
    frozen = plan.parameters.total - plan.parameters.trainable
    embedding_is_frozen = adaptation.lora_rank and not adaptation.trains_embeddings_beside_lora
    if embedding_is_frozen and not config.tie_word_embeddings:
        frozen -= config.vocab_size * config.hidden_size  # the input embedding multiplies nothing
    return frozen


def find_device() -> str | None:
    """The name of this machine's GPU; None without one."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def format_cost(cost: RunCost, costs: CostSettings, precision: str) -> str:
    """The bill as a table, with its assumptions below."""
    rows: list[tuple[str, object]] = [
        ("FLOPs per token", f"{cost.flops_per_token - cost.frozen_flops_per_token:.4g}"),
        ("FLOPs of the run", f"{cost.flops:.4g} ({cost.flops / PETA / 86400:,.4g} PFLOP/s-days)"),
    ]
    device = costs.device_name or find_device()
    if cost.hours is None:
        why = f"no vendor's peak is known for {device} in {precision}" if device else "no GPU found"
        rows.append(("time", f"not given: {why}; choose a device with --device_name"))
    else:
        assert cost.peak is not None
        speed = cost.tokens / (cost.hours * 3600) if cost.hours else 0.0
        rows += [
            ("devices", f"{cost.num_devices:,} x {device}"),
            ("tokens/s at this speed", f"{speed:,.0f}"),
            ("time", _duration(cost.hours)),
            ("device hours", f"{cost.hours * cost.num_devices:,.2f}"),
        ]
        if costs.price_per_hour is not None:
            price = cost.hours * cost.num_devices * costs.price_per_hour
            rows.append(("price", f"{price:,.2f} (at {costs.price_per_hour:g} for a device and hour)"))
    notes = []
    if cost.peak is not None:
        notes += [
            f"Assumed: {cost.mfu:.0%} of {cost.peak / TERA:,.1f} TFLOP/s ({precision}, dense) in every step",
            "(--assume_mfu; train.py --benchmark measures it). Loading, evaluating, saving are not counted.",
        ]
    if cost.frozen_flops_per_token:
        notes.append("Frozen weights: 4 FLOPs for each and token instead of 6, as they need no gradients.")
    return "\n".join([format_table(("cost", "estimated"), rows), *notes])


def _duration(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:,.1f} seconds"
    if hours < 1:
        return f"{hours * 60:,.1f} minutes"
    return f"{hours:,.1f} hours" + (f" ({hours / 24:,.1f} days)" if hours >= 48 else "")

"""Parameter groups: which weights have a learning rate of their own, and which have no weight decay.

Groups are found by the names of parameters, so every plugin and layout has the same ones. A checkpoint needs
no more than the flags and those names: its optimizer state is stored by name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from colossal_llama.training.adaptation import AdaptationSettings
from colossal_llama.training.llama.adapters import is_embedding

# Key of a group whose learning rate is that of `--lr_embeddings`.
IS_EMBEDDINGS = "is_embeddings"


def is_norm(name: str) -> bool:
    """Whether a parameter of this name is the weight of a norm; in a PEFT model too."""
    return name.endswith("norm.weight")


def parameter_groups(model: nn.Module, adaptation: AdaptationSettings) -> list[dict[str, Any]]:
    """The parameters that train, in the groups that an optimizer takes; one group where nothing differs.

    Every process makes the same groups, from the whole model: a pipeline stage may hold none of a group's
    parameters, but the stages compute each group's gradient norm together.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            embeddings = is_embedding(name)
            decays = adaptation.decays("norms") or not is_norm(name)
            if embeddings:
                # New rows alone: the optimizer knows no rows, so their decay is added to its steps.
                decays = adaptation.decays("embeddings") and not adaptation.trains_new_rows_alone
            is_apart = embeddings and adaptation.lr_embeddings is not None
            groups.setdefault((is_apart, decays), []).append(parameter)
    return [
        {
            "params": parameters,
            **({IS_EMBEDDINGS: True} if is_apart else {}),
            **({} if decays else {"weight_decay": 0.0}),
        }
        for (is_apart, decays), parameters in groups.items()
    ]


def set_learning_rates(
    optimizer: torch.optim.Optimizer, learning_rate: float, embeddings_rate: float | None
) -> None:
    """Sets the rates of a step.

    Args:
        embeddings_rate: None where the embeddings have no rate of their own.
    """
    for group in optimizer.param_groups:
        apart = group.get(IS_EMBEDDINGS) and embeddings_rate is not None
        group["lr"] = embeddings_rate if apart else learning_rate

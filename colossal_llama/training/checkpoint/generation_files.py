"""`generation_config.json` of what training saves: the source's, made fit for that, and ends of answers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from colossal_llama.model.model_config import GENERATION_CONFIG_FILE
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.files import read_json
from colossal_llama.utils.messages import one_line

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig

# Defaults of sampling and beam search. transformers loads them in any combination, ignores those that the
# mode has no use for, and then refuses to save them. They may go back to their default, in this order.
RESETTABLE = (
    "temperature",
    "top_p",
    "min_p",
    "typical_p",
    "top_k",
    "epsilon_cutoff",
    "eta_cutoff",
    "early_stopping",
    "diversity_penalty",
    "num_beam_groups",
    "length_penalty",
    "constraints",
    "force_words_ids",
    "num_return_sequences",
    "num_beams",
    "do_sample",
    "dola_layers",
    "return_legacy_cache",
    "cache_config",
    "cache_implementation",
    "output_scores",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "pad_token_id",  # -1 in old uploads: none
)


def load_generation_config(
    directory: Path | None, config: PretrainedConfig, where: str
) -> tuple[GenerationConfig, list[str]]:
    """The generation configuration of a model, such that it can be saved.

    Args:
        directory: with the model's files; its `generation_config.json` may be missing.
        config: of the model: what holds where there is no file.
        where: how a message about the model begins.

    Returns:
        The configuration, and a sentence on each value that had to be given up.

    Raises:
        UserError: the file is damaged, or holds what could never be saved, and is no mere default.
    """
    from transformers import GenerationConfig

    path = None if directory is None else directory / GENERATION_CONFIG_FILE
    has_file = path is not None and path.is_file()
    origin = str(path) if has_file else f"{where}: config.json"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the same is found, and said, below
            if has_file:
                content = read_json(path)
                if not isinstance(content, dict):
                    raise UserError(f"{path}: not a JSON object")
                found = GenerationConfig.from_dict(content)
            else:
                found = GenerationConfig.from_model_config(config)
    except UserError:
        raise
    except Exception as error:  # values of the wrong type fail in any way
        raise UserError(
            f"{origin}: not a generation configuration that transformers takes ({one_line(error)}); "
            "correct or remove that value"
        ) from None
    for token_id in end_token_ids(found):
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise UserError(
                f"{origin}: eos_token_id {found.eos_token_id!r} is neither a number nor a list of numbers"
            )
    return found, [f"{origin}: {note}" for note in make_saveable(found, origin)]


def make_saveable(config: GenerationConfig, origin: str) -> list[str]:
    """Resets what keeps `config` from being saved, in place; returns a note for each value given up.

    Raises:
        UserError: what is wrong is none of `RESETTABLE`.
    """
    from transformers import GenerationConfig

    default, notes = GenerationConfig(), []
    while problem := _first_problem(config):
        for name in RESETTABLE:
            value = getattr(config, name, None)
            if value == getattr(default, name, None):
                continue
            changed = copy.deepcopy(config)
            setattr(changed, name, getattr(default, name, None))
            if _first_problem(changed) != problem:
                setattr(config, name, getattr(default, name, None))
                notes.append(
                    f"{name} {value!r} has no meaning beside the other settings, and transformers refuses to "
                    "save it; saved without it"
                )
                break
        else:
            raise UserError(f"{origin}: transformers refuses to save it: {problem}; correct or remove that")
    if notes:
        # Else `generate` would make the configuration anew from config.json.
        config._from_model_config = False
    return notes


def _first_problem(config: GenerationConfig) -> str | None:
    """What `save_pretrained` would stumble over first."""
    tried = copy.deepcopy(config)  # `validate` changes some values
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            tried.validate()
        except Exception as error:
            caught_first = str(caught[0].message) if caught else None
            return caught_first or one_line(error)
    return str(caught[0].message) if caught else None


def end_token_ids(config: GenerationConfig) -> list[int]:
    """`eos_token_id` as a list."""
    found = config.eos_token_id
    return list(found) if isinstance(found, (list, tuple)) else [] if found is None else [found]


def add_end_token_ids(config: GenerationConfig, end_ids: Sequence[int], model_eos: int | list | None) -> None:
    """Makes `generate` stop at `end_ids` too; nothing changes where it does already.

    Args:
        model_eos: `eos_token_id` of the model's configuration: the source's EOS where `config` has none.
    """
    ends = end_token_ids(config)
    if set(end_ids) <= set(ends):
        return
    if not ends and model_eos is not None:
        ends = list(model_eos) if isinstance(model_eos, list) else [model_eos]
    merged = list(dict.fromkeys([*ends, *end_ids]))
    config.eos_token_id = merged if len(merged) > 1 else merged[0]
    config._from_model_config = False  # as above

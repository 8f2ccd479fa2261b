"""Whether weights are complete: on disk, after a plugin took over the model, and by the first loss."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from colossal_llama.model.weight_files import find_shards, iterate_chunks, open_shard
from colossal_llama.training.llama.adapters import is_embedding
from colossal_llama.upstream.padding_row import without_padding_row
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.messages import cap_problems, first_line

if TYPE_CHECKING:
    from transformers import LlamaConfig


def check_weights(
    weights: str, config: LlamaConfig, flag: str, dtype: torch.dtype | None = None
) -> dict[str, float] | None:
    """What `load_causal_lm` would say of local weights, from the headers of their files alone.

    Args:
        dtype: also read all tensors, in this dtype.

    Returns:
        The sum of each tensor's values by name where `dtype` is given.
    """
    from transformers import LlamaForCausalLM

    if not Path(weights).is_dir():
        return None  # of the hub: the run loads it
    try:
        with without_padding_row(config), torch.device("meta"):
            model = LlamaForCausalLM(config)
    except Exception as error:
        raise UserError(f"{flag} {weights}: the model cannot be built ({first_line(error)})") from None
    expected = {name: tuple(tensor.shape) for name, tensor in model.named_parameters(remove_duplicate=False)}
    found: dict[str, tuple[int, ...]] = {}
    sums: dict[str, float] = {}
    for path in find_shards(Path(weights), flag):
        try:
            found |= _read_shapes(path, dtype, sums)
        except UserError as error:
            raise UserError([f"{flag} {problem}" for problem in error.problems]) from None
    if not any(name.startswith(("model.", "lm_head.")) for name in found):  # of a model without a head
        found = {f"model.{name}": shape for name, shape in found.items()}
        sums = {f"model.{name}": value for name, value in sums.items()}
    sums = {name: value for name, value in sums.items() if name in expected}
    missing = expected.keys() - found.keys()
    if config.tie_word_embeddings:  # one matrix under either name, counted once
        tied = [name for name in ("model.embed_tokens.weight", "lm_head.weight") if name in found]
        if tied:
            missing -= {"model.embed_tokens.weight", "lm_head.weight"}
        for name in tied[1:]:
            sums.pop(name, None)
    problems = [f"{flag} {weights}: tensor {name} is missing" for name in sorted(missing)]
    problems += [
        f"{flag} {weights}: tensor {name} has another shape, {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    if problems:
        raise UserError(cap_problems(problems, "such tensors"))
    return sums if dtype is not None else None


def _read_shapes(path: Path, dtype: torch.dtype | None, sums: dict[str, float]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a file of weights; with `dtype`, their sums go into `sums`."""
    shard = open_shard(path)
    try:
        metadata = getattr(shard, "metadata", None)
        if metadata and metadata.get("format") not in ("pt", "mlx"):  # other libraries' own
            raise UserError(
                f"{path}: its header says format {metadata.get('format')!r}; save it again with "
                'metadata={"format": "pt"}'
            )
        if dtype is not None:
            for name, tensor in shard.tensors.items():
                chunks = (shard.read(name, c.start, c.stop) for c in iterate_chunks(tensor))
                sums[name] = math.fsum(float(chunk.to(dtype).double().sum()) for chunk in chunks)
        return {name: tensor.shape for name, tensor in shard.tensors.items()}
    finally:
        shard.close()


def weight_sums(model: nn.Module) -> dict[str, float]:
    """The sum of each parameter in fp64, by name, to recognise it after boosting."""
    return {name: float(parameter.detach().double().sum()) for name, parameter in model.named_parameters()}


def check_weights_survived(
    model: nn.Module, sums: dict[str, float], tensor_parallel_group: Any, compute_dtype: torch.dtype
) -> None:
    """Compares the boosted model's parameters with `weight_sums` of the loaded one.

    Sharded tensors are summed over the tensor parallel group. Embeddings are left out: they may be padded.

    Raises:
        RuntimeError: a parameter lost its loaded values, which would train a random model without a word.
    """
    from colossalai.tensor.d_tensor.api import is_distributed_tensor

    for name, parameter in model.named_parameters():
        if is_embedding(name) or name not in sums:
            continue
        total = parameter.detach().double().sum()
        magnitude = parameter.detach().double().abs().sum()
        if tensor_parallel_group is not None and is_distributed_tensor(parameter):
            both = torch.stack([total, magnitude])
            dist.all_reduce(both, group=tensor_parallel_group)
            total, magnitude = both
        check_sum(name, float(total), float(magnitude), sums[name], compute_dtype)


def check_sum(name: str, total: float, magnitude: float, expected: float, compute_dtype: torch.dtype) -> None:
    """Compares a boosted parameter's sum with that of the loaded one.

    Args:
        magnitude: sum of the absolute values.

    Raises:
        RuntimeError: they differ by more than the rounding of the dtype.
    """
    tolerance = 1e-6 if compute_dtype == torch.float32 else 1e-2
    if abs(total - expected) > tolerance * max(1.0, magnitude):
        raise RuntimeError(f"parameter {name} lost its values while the plugin took over the model")


def looks_untrained(loss: float, vocab_size: int) -> bool:
    """Whether a first loss is what random weights give: within 5 % of ln(vocabulary), or above it."""
    return loss > 0.95 * math.log(vocab_size)

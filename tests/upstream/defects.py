"""What colossalai and torch do without a cure and with it, on two gloo processes: `defects.py DIRECTORY`.

Each function below looks at one defect with tiny objects and returns "right" or what was seen instead; what
it raises is noted as well. Cures of other defects may be on. `outcomes.json` in DIRECTORY receives rank 0's.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from colossal_llama.training.llama.attention import install_attention
from colossal_llama.upstream.cpu_training import enable_cpu_training
from colossal_llama.upstream.lean_imports import lean_imports
from colossal_llama.upstream.loss_scale import BackwardLossScale
from colossal_llama.upstream.pickled_code import refuse_pickled_code
from colossal_llama.upstream.ring_sequence_parallelism import working_mode
from colossal_llama.upstream.split_gather_gradients import sum_partial_gradients_once
from colossal_llama.upstream.zero_fp32 import allow_fp32

RIGHT = "right"


# ---------------------------------------------------------------------- before any cure


def reduce_scatter_on_gloo(directory: Path) -> str:
    received = [torch.zeros(1), torch.zeros(1)]
    dist.reduce_scatter_tensor(received[0], torch.ones(2))
    dist.reduce_scatter(received[1], [torch.ones(1), torch.ones(1)])
    return RIGHT if received == [2, 2] else f"received {received}"


def all_to_all_on_gloo(directory: Path) -> str:
    dist.all_to_all([torch.zeros(1), torch.zeros(1)], [torch.ones(1), torch.ones(1)])
    return RIGHT


def cpu_accelerator(directory: Path) -> str:
    from colossalai.accelerator import get_accelerator

    accelerator = get_accelerator()
    calls: dict[str, Callable] = {
        "synchronize": accelerator.synchronize,
        "empty_cache": accelerator.empty_cache,
        "manual_seed": lambda: accelerator.manual_seed(torch.initial_seed()),
        "get_rng_state": lambda: accelerator.get_rng_state(torch.device("cpu")),
        "max_memory_allocated": accelerator.max_memory_allocated,
        "Stream": accelerator.Stream,
    }
    missing = []
    for name, call in calls.items():
        try:
            call()
        except (RuntimeError, TypeError):
            missing.append(name)
    return f"raises: {missing}" if missing else RIGHT


def pipeline_names(directory: Path) -> str:
    from colossalai.pipeline.p2p import _check_for_nccl_hccl_backend

    _check_for_nccl_hccl_backend(None)
    return RIGHT


def zero_on_a_cpu(directory: Path) -> str:
    from colossalai.zero.low_level import LowLevelZeroOptimizer

    LowLevelZeroOptimizer(torch.optim.AdamW([torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))]))
    return RIGHT


def adam_without_a_compiler(directory: Path) -> str:
    from colossalai.nn.optimizer import HybridAdam

    parameter = torch.nn.Parameter(torch.ones(4))
    parameter.grad = torch.ones(4)
    HybridAdam([parameter]).step()
    return RIGHT


def launcher_quotes_arguments(directory: Path) -> str:
    from colossalai.cli.launcher.run import get_launch_command

    command = get_launch_command("127.0.0.1", 1234, 1, "train.py", ["--dataset", "two words"], 0, 1, False)
    return RIGHT if shlex.split(command)[-1] == "two words" else command


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (open, (self.path, "w"))


def pickled_code(directory: Path, cured: bool = False) -> str:
    from colossalai.checkpoint_io.utils import load_state_dict

    if dist.get_rank():
        return RIGHT
    mark, file = directory / f"ran_{cured}", directory / "optimizer.bin"
    torch.save({"state": Touch(str(mark))}, file)
    if cured:
        refuse_pickled_code()
    try:
        load_state_dict(str(file))
    except Exception as error:  # refused
        refusal = f"{type(error).__name__}: {error}"
        return RIGHT if "Weights only load failed" in refusal and not mark.exists() else refusal
    finally:
        os.environ.pop("TORCH_FORCE_WEIGHTS_ONLY_LOAD", None)
    return "code ran" if mark.exists() else "nothing was refused"


# ---------------------------------------------------------------------- on a CPU that is made to work


def zero_with_an_empty_group(directory: Path) -> str:
    from colossalai.zero.low_level import LowLevelZeroOptimizer

    weight = torch.nn.Parameter(torch.ones(4))
    LowLevelZeroOptimizer(torch.optim.AdamW([{"params": []}, {"params": [weight]}]))
    return RIGHT


def norm_without_clipping(directory: Path) -> str:
    _, boosted, optimizer = boost(hybrid_plugin(max_norm=0), make_model())
    gradients(boosted, optimizer, 1)
    optimizer.step()
    return RIGHT if optimizer.get_grad_norm() else f"norm {optimizer.get_grad_norm()}"


def growing_loss_scale(directory: Path, cured: bool = False) -> str:
    from colossalai.amp.naive_amp.mixed_precision_mixin.fp16 import FP16MixedPrecisionMixin

    class Scaling(FP16MixedPrecisionMixin):
        def check_local_overflow(self) -> bool:
            return False

    scaling = Scaling(initial_scale=8.0, growth_interval=1)
    if cured:
        BackwardLossScale(scaling)
    scaled = scaling.pre_backward(torch.tensor(1.0))
    scaling.should_skip_step()
    divisor = scaling.get_grad_div_scale()
    return RIGHT if divisor == scaled.item() else f"scaled by {scaled.item()}, divided by {divisor}"


def make_model(vocab_size: int = 128) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        attn_implementation="sdpa",
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def make_ids() -> torch.Tensor:
    return torch.arange(3, 19)[None]


def boost(plugin: Any, model: Any) -> tuple[Any, Any, Any]:
    from colossalai.booster import Booster

    booster = Booster(plugin=plugin)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    boosted, optimizer, *_ = booster.boost(model, optimizer)
    return booster, boosted, optimizer


def hybrid_plugin(**options: Any) -> Any:
    from colossalai.booster.plugin import HybridParallelPlugin

    settings = {"tp_size": 1, "pp_size": 1, "precision": "fp32", "zero_stage": 0, **options}
    return HybridParallelPlugin(**{"enable_flash_attention": False, "parallel_output": False, **settings})


def ddp_without_mixed_precision(directory: Path) -> str:
    from colossalai.booster.plugin import TorchDDPPlugin

    plugin = TorchDDPPlugin()
    return RIGHT if plugin.control_precision() else f"supports {plugin.supported_precisions()}"


def zero_in_fp32(directory: Path, cured: bool = False) -> str:
    plugin = hybrid_plugin(zero_stage=1)
    if cured:
        allow_fp32(plugin)
    boost(plugin, make_model())
    return RIGHT


def norms_without_apex(directory: Path) -> str:
    boost(hybrid_plugin(enable_fused_normalization=True), make_model())
    return RIGHT


def rotary_frequencies(directory: Path) -> str:
    model = make_model()
    boost(hybrid_plugin(precision="bf16"), model)
    dtype = model.model.rotary_emb.inv_freq.dtype
    return RIGHT if dtype == torch.float32 else str(dtype)


def masters_in_a_checkpoint(directory: Path) -> str:
    from colossalai.booster.plugin import LowLevelZeroPlugin

    model = make_model()
    booster, boosted, optimizer = boost(LowLevelZeroPlugin(stage=1, precision="bf16"), model)
    gradients(boosted, optimizer, 1)
    optimizer.step()
    optimizer.zero_grad()
    masters = optimizer.working_to_master_param
    before = {name: masters[id(p)].clone() for name, p in model.named_parameters()}
    booster.save_model(boosted, str(directory / "zero_model"), shard=True, use_safetensors=True)
    booster.save_optimizer(optimizer, str(directory / "zero_optimizer"), shard=True)
    dist.barrier()
    booster.load_model(boosted, str(directory / "zero_model"))
    booster.load_optimizer(optimizer, str(directory / "zero_optimizer"))
    changed = sum(
        not torch.equal(before[name], masters[id(parameter)]) for name, parameter in model.named_parameters()
    )
    return f"{changed} masters changed" if changed else RIGHT


def future_under_sequence_parallelism(directory: Path, cured: bool = False) -> str:
    """Changes the last token: what comes before must not see it."""
    plugin = hybrid_plugin(
        sp_size=2, enable_sequence_parallelism=True, sequence_parallelism_mode="all_to_all"
    )
    model = make_model()
    _, boosted, _ = boost(plugin, model)
    if cured:
        install_attention(model, ulysses_group=plugin.sp_group)
    ids, others = make_ids(), make_ids()
    others[0, -1] = 50
    # As the collator's `document_index` it says the same: one document.
    mask = torch.ones_like(ids)
    with torch.no_grad():
        logits, other = (boosted(i, attention_mask=mask).logits for i in (ids, others))
    change = float((logits - other)[0, : ids.size(1) // 2].abs().max())
    return RIGHT if change < 1e-4 else f"earlier tokens change by {change:.3f}"


def gradients(boosted: Any, optimizer: Any, passes: int) -> None:
    for _ in range(passes):
        ids = make_ids()
        loss = boosted(ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        optimizer.backward(loss)


def compare_gradients(mode: str, names: tuple[str, ...], passes: int, cured: bool = False) -> str:
    """Against those of one process."""
    whole = make_model()
    for _ in range(passes):
        whole(make_ids(), labels=make_ids()).loss.backward()
    model = make_model()
    plugin = hybrid_plugin(tp_size=2, enable_sequence_parallelism=True, sequence_parallelism_mode=mode)
    _, boosted, optimizer = boost(plugin, model)
    # The defect of the mask, which these are not about.
    install_attention(model)
    if cured:
        sum_partial_gradients_once(model, plugin.tp_group)
    gradients(boosted, optimizer, passes)
    expected = dict(whole.named_parameters())
    worst = 0.0
    for name, parameter in model.named_parameters():
        if name.endswith(names):
            wanted = expected[name].grad
            if wanted.shape != parameter.grad.shape:
                dim = next(d for d in (0, 1) if wanted.size(d) != parameter.grad.size(d))
                wanted = wanted.chunk(2, dim)[dist.get_rank()]
            worst = max(worst, float((parameter.grad - wanted).norm() / wanted.norm()))
    return RIGHT if worst < 1e-3 else f"gradients off by {worst:.3f}"


SHARDED = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "down_proj.weight")


def ring_gradients(directory: Path, cured: bool = False) -> str:
    return compare_gradients(working_mode("ring") if cured else "ring", SHARDED, passes=1)


def accumulated_norm_gradients(directory: Path, cured: bool = False) -> str:
    return compare_gradients("split_gather", ("norm.weight",), passes=2, cured=cured)


def padded_vocabulary_model(directory: Path) -> str:
    booster, boosted, _ = boost(hybrid_plugin(), make_model(vocab_size=101))
    booster.save_model(boosted, str(directory / "padded_model"), shard=True, use_safetensors=True)
    return RIGHT


def padded_vocabulary_optimizer(directory: Path) -> str:
    booster, boosted, optimizer = boost(hybrid_plugin(tp_size=2), make_model(vocab_size=101))
    gradients(boosted, optimizer, 1)
    optimizer.step()
    booster.save_optimizer(optimizer, str(directory / "padded_optimizer"), shard=True)
    return RIGHT


CPU_CURES = (reduce_scatter_on_gloo, all_to_all_on_gloo, cpu_accelerator, pipeline_names, zero_on_a_cpu)
BEFORE = (
    *CPU_CURES,
    adam_without_a_compiler,
    launcher_quotes_arguments,
    pickled_code,
)
CURES = (
    pickled_code,
    growing_loss_scale,
    zero_in_fp32,
    future_under_sequence_parallelism,
    ring_gradients,
    accumulated_norm_gradients,
)
AFTER = (
    zero_with_an_empty_group,
    norm_without_clipping,
    growing_loss_scale,
    ddp_without_mixed_precision,
    zero_in_fp32,
    norms_without_apex,
    rotary_frequencies,
    masters_in_a_checkpoint,
    future_under_sequence_parallelism,
    ring_gradients,
    accumulated_norm_gradients,
    padded_vocabulary_model,
    padded_vocabulary_optimizer,
)


def main() -> None:
    directory = Path(sys.argv[1])
    outcomes: dict[str, str] = {}

    def look(functions: tuple[Callable[..., str], ...], suffix: str = "", **options: Any) -> None:
        for function in functions:
            name = function.__name__ + suffix
            try:
                outcomes[name] = function(directory, **options)
            except Exception as error:
                outcomes[name] = f"{type(error).__name__}: {error}"
            if dist.get_rank() == 0:
                (directory / "outcomes.json").write_text(json.dumps(outcomes, indent=1), encoding="utf-8")

    with lean_imports():
        import colossalai.booster.plugin  # noqa: F401
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    look(BEFORE)
    enable_cpu_training()
    look(CPU_CURES, " cured")
    look(CURES, " cured", cured=True)
    look(AFTER)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()

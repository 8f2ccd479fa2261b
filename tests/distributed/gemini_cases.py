"""Gemini on two gloo processes, beside zero2 in the same precision: `gemini_cases.py DIRECTORY [more]`.

Each case trains tiny models with the suite's own plugins, and returns "right" or what was seen instead; what
it raises is noted as well. `outcomes.json` in DIRECTORY receives the first rank's that is not "right". `more`
runs the rest of the matrix, another word the cases that have it in their names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Collection, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from colossal_llama.training.arguments import parse_settings
from colossal_llama.training.checkpoint import optimizer_files
from colossal_llama.training.checkpoint.files import CopyBuffers, FileJobs
from colossal_llama.training.checkpoint.modeling_files import _add_weights
from colossal_llama.training.llama.adapters import freeze_all_but_embeddings
from colossal_llama.training.llama.embedding_noise import EmbeddingNoise
from colossal_llama.training.plugins import base, find_plugin
from colossal_llama.upstream.cpu_training import enable_cpu_training
from colossal_llama.upstream.gemini_on_cpu import let_gemini_run_on_cpus, pretend_device_memory
from colossal_llama.upstream.lean_imports import lean_imports

RIGHT = "right"
ROWS, LENGTH, VOCABULARY, STEPS = 8, 24, 211, 6
LEARNING_RATE = 3e-3
# Adam with its usual eps of 1e-8 hardly feels the scale of gradients: clipping too little, or dividing by
# another loss scale, would not show.
ADAM_EPS = 1e-3
CLIP = 0.5
# Room for all chunks at once, and for half of them.
DEVICE_BYTES, FEW_DEVICE_BYTES = 400_000, 70_000

GEMINI = ("gemini", "gemini_auto")


# ---------------------------------------------------------------------- a run in this process


def make_model(tied: bool = False) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
        tie_word_embeddings=tied,
        attn_implementation="sdpa",
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def boost(
    name: str,
    precision: str = "bf16",
    passes: int = 1,
    flags: str = "",
    model: Any = None,
    device_bytes: int = DEVICE_BYTES,
    **kwargs: Any,
) -> Any:
    """A plugin with a boosted model.

    Args:
        device_bytes: of the GPU that Gemini believes in.
    """
    words = f"--pretrained some/model --benchmark --plugin {name} --mixed_precision {precision} --lr "
    words += f"{LEARNING_RATE} --grad_clip {CLIP} --accumulation_steps {passes} {flags}"
    plugin = find_plugin(name)(parse_settings(words.split()), dist.get_world_size())
    assert not plugin.conflicts(), plugin.conflicts()
    plugin.start()
    if name == "gemini_auto":
        pretend_device_memory(device_bytes)
        plugin.booster_plugin.gemini_config["warmup_non_model_data_ratio"] = 0.5
    model = make_model(**kwargs) if model is None else model
    adaptation = plugin.settings.adaptation
    noise = EmbeddingNoise(adaptation.neft_alpha, seed=3) if adaptation.use_neft else None
    plugin.boost(model.to(plugin.parameter_dtype), model, noise)
    return plugin


def batches_of(plugin: Any, step: int) -> tuple[list[base.Batch], int]:
    """This rank's passes of a step, and the tokens with loss of all; rows of two documents and padding."""
    generator = torch.Generator().manual_seed(step % 3)
    ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=generator)
    cut, end = LENGTH // 3, LENGTH - 2
    positions = torch.cat([torch.arange(cut), torch.arange(LENGTH - cut)]).expand(ROWS, -1)
    documents = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    documents[:, cut:], documents[:, end:] = 1, -1
    labels = ids.roll(-1, dims=1)
    labels[:, cut - 1], labels[:, end - 1 :] = -100, -100
    labels[0] = -100  # ranks and passes differ in their tokens
    tensors = {
        "input_ids": ids,
        "position_ids": positions,
        "labels": labels,
        "attention_mask": documents,
    }
    mine = {key: value.chunk(plugin.layout.dp_size)[plugin.dp_rank] for key, value in tensors.items()}
    passes = plugin.layout.accumulation_steps
    cut_up = {key: value.chunk(passes) for key, value in mine.items()}
    batches = [{key: parts[number] for key, parts in cut_up.items()} for number in range(passes)]
    return batches, int((labels != -100).sum())


@dataclasses.dataclass
class Step:
    """What a step reported."""

    loss: float
    norm: float
    skipped: bool
    scale: float | None


def train(plugin: Any, steps: range, overflows: Collection[tuple[int, int]] = ()) -> list[Step]:
    """Trains; the gradients of each (step, pass) in `overflows` are made infinite."""
    done = []
    for step in steps:
        batches, num_labels = batches_of(plugin, step)
        passes = iter(range(len(batches)))
        plugin.scale_loss = lambda loss, step=step, passes=passes: (
            loss * (1e30 if (step, next(passes)) in overflows else 1.0)
        )
        loss = plugin.run_passes(batches, num_labels, step)
        del plugin.scale_loss
        total = plugin.sum_losses(loss[None]).item() / num_labels
        norm, skipped = plugin.optimizer_step(LEARNING_RATE)
        done.append(Step(total, norm, skipped, plugin.loss_scale_state().get("scale")))
    return done


def save(plugin: Any, directory: Path, in_background: bool = False) -> Path:
    """The optimizer's files and the weights, as a checkpoint has them."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "optimizer").mkdir(exist_ok=True)
    plan = FileJobs(directory, CopyBuffers() if in_background else None)
    optimizer_files.add_optimizer(plan, plugin)
    _add_weights(plan, plugin, "")
    dist.barrier()
    plan.run()
    dist.barrier()
    return directory


def resume(name: str, directory: Path, other_layout: bool, *args: Any, **kwargs: Any) -> Any:
    """A new model with saved weights and optimizer state, the way a run resumes."""
    from safetensors.torch import load_file

    model = make_model(**kwargs)
    weights: dict[str, torch.Tensor] = {}
    for file in directory.glob("model-*.safetensors"):
        weights |= load_file(file)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.startswith("lm_head") for name in missing)
    plugin = boost(name, *args, model=model)
    read = optimizer_files.read_other_layout if other_layout else optimizer_files.read_own_shard
    read(directory / "optimizer", plugin)
    return plugin


def state_in(directory: Path) -> dict[str, torch.Tensor]:
    """Masters and moments of a checkpoint by name and kind, whole and without padded rows."""
    saved = optimizer_files.SavedOptimizer(directory / "optimizer")
    whole = {}
    for name, kind in itertools.product(saved._files, optimizer_files._KINDS):
        if saved.has(name, kind):
            tensor = saved.whole(name, kind)
            is_embedding = name.endswith(("embed_tokens.weight", "lm_head.weight"))
            whole[f"{name}/{kind}"] = tensor[:VOCABULARY] if is_embedding else tensor
    whole |= {f"{name}/step": torch.tensor(steps) for name, steps in saved.steps.items()}
    return whole


def weight_bytes(directory: Path) -> dict[str, bytes]:
    """Every weight that was exported, with its dtype."""
    from safetensors.torch import load_file

    found = {}
    for file in directory.glob("model-*.safetensors"):
        for name, tensor in load_file(file).items():
            found[name] = str(tensor.dtype).encode() + tensor.view(torch.uint8).numpy().tobytes()
    return found


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """What is not the same, bit for bit."""
    wrong = sorted(found.keys() ^ expected.keys())
    for name in found.keys() & expected.keys():
        ours, theirs = found[name], expected[name]
        same = torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
        if not same:
            wrong.append(name)
    return wrong


def close(ours: list[Step], expected: list[Step], tolerance: float = 2e-3) -> list[str]:
    """How two runs differ, beyond the rounding of half precision."""
    wrong = []
    for number, (a, b) in enumerate(zip(ours, expected, strict=True)):
        if not math.isclose(a.loss, b.loss, rel_tol=tolerance):
            wrong.append(f"loss of step {number}: {a.loss} instead of {b.loss}")
        if (a.skipped, a.scale) != (b.skipped, b.scale):
            wrong.append(f"step {number}: {a} instead of {b}")
        if not a.skipped and not math.isclose(a.norm, b.norm, rel_tol=2e-2):
            wrong.append(f"norm of step {number}: {a.norm} instead of {b.norm}")
    return wrong


def verdict(problems: list[str]) -> str:
    return "; ".join(problems[:3]) or RIGHT


def is_spread(plugin: Any) -> list[str]:
    """What of the model is not in several chunks, each sharded."""
    chunks = plugin.model.chunk_manager.get_chunks(plugin.model.fp16_params)
    whole = [chunk for chunk in chunks if chunk.keep_gathered or chunk.shard_size == chunk.chunk_size]
    return ["nothing is spread"] if len(chunks) < 2 or whole else []


def count_moves() -> list[int]:
    """Counts moves of chunks between the two memories from now on."""
    from colossalai.zero.gemini.chunk import Chunk

    let_gemini_run_on_cpus()  # replaces the same method, once
    count, original = [0], Chunk.shard_move

    def shard_move(self: Any, *args: Any, **kwargs: Any) -> None:
        count[0] += 1
        original(self, *args, **kwargs)

    Chunk.shard_move = shard_move
    return count


# ---------------------------------------------------------------------- the cases


def parity(directory: Path, name: str, precision: str, passes: int, flags: str = "", **kwargs: Any) -> str:
    """Clipping acts in every step, so this sees it; weights are exported after each, so that sees them."""
    reference = boost("zero2", precision, passes, flags, **kwargs)
    expected = train(reference, range(STEPS))
    plugin = boost(name, precision, passes, flags, **kwargs)
    problems = is_spread(plugin)
    moves = count_moves()
    ours = train(plugin, range(STEPS))
    if name == "gemini_auto" and not moves[0]:
        problems.append("no chunk was moved")
    if not all(step.norm > CLIP for step in ours):
        problems.append("clipping did not act")
    problems += close(ours, expected)
    sums = [each.evaluate_pass(batches_of(each, 1)[0][0]).item() for each in (plugin, reference)]
    if not math.isclose(*sums, rel_tol=2e-3):
        problems.append(f"evaluation: {sums[0]} instead of {sums[1]}")
    return verdict(problems)


def crowded(directory: Path, precision: str, passes: int, flags: str = "") -> str:
    """Chunks that have to go to the host in the middle of a pass change nothing; evaluations in between."""
    runs, moves = [], count_moves()
    for device_bytes in (DEVICE_BYTES, FEW_DEVICE_BYTES):
        plugin = boost("gemini_auto", precision, passes, flags, device_bytes=device_bytes)
        manager, most, before = plugin.model.chunk_manager, 0, moves[0]
        steps: list[Any] = []
        original = manager.access_chunk

        def access(*args: Any, original: Any = original, manager: Any = manager, **kwargs: Any) -> Any:
            nonlocal most
            result = original(*args, **kwargs)
            most = max(most, manager.total_mem["cuda"])
            return result

        manager.access_chunk = access
        for step in range(4):
            steps += train(plugin, range(step, step + 1))
            steps.append(plugin.evaluate_pass(batches_of(plugin, step)[0][0]).item())
        runs.append((steps, state_in(save(plugin, directory / str(device_bytes))), moves[0] - before, most))
    problems = ["steps differ"] if runs[0][0] != runs[1][0] else []
    problems += differences(runs[1][1], runs[0][1])
    if runs[1][2] <= runs[0][2]:
        problems.append(f"{runs[1][2]} moves instead of {runs[0][2]}")
    if runs[1][3] > FEW_DEVICE_BYTES or runs[0][3] < FEW_DEVICE_BYTES:
        problems.append(f"{runs[1][3]} bytes at most, {runs[0][3]} with room")
    return verdict(problems)


@contextlib.contextmanager
def pinned_chunks() -> Iterator[None]:
    """Chunks on the host follow the rules of pinned ones, which only GPUs have: their place there stays."""
    from colossalai.zero.gemini.chunk import Chunk

    originals = Chunk.__init__, torch.empty

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        originals[0](self, *args, **{**kwargs, "pin_memory": True})

    Chunk.__init__ = init
    torch.empty = lambda *args, pin_memory=False, **kwargs: originals[1](*args, **kwargs)
    try:
        yield
    finally:
        Chunk.__init__, torch.empty = originals


def pinned(directory: Path, precision: str, passes: int) -> str:
    """With chunks that keep their place on the host, everything is as without, bit for bit."""
    runs = []
    for pin in (False, True):
        with pinned_chunks() if pin else contextlib.nullcontext():
            plugin = boost("gemini_auto", precision, passes)
            steps = train(plugin, range(4), {(1, 0)} if precision == "fp16" else ())
            chunks = plugin.model.chunk_manager.get_chunks(plugin.model.fp16_params)
            if pin and any(chunk.cpu_shard is None for chunk in chunks):
                return "a place on the host was given up"
            steps += train(plugin, range(4, 6))
            saved = save(plugin, directory / str(pin))
        runs.append((steps, state_in(saved), weight_bytes(saved)))
    problems = ["steps differ"] if runs[0][0] != runs[1][0] else []
    problems += differences(runs[1][1], runs[0][1]) + differences(runs[1][2], runs[0][2])
    return verdict(problems)


def frozen(directory: Path, name: str) -> str:
    """Embeddings alone: what is frozen keeps its bits, in the export too."""

    def make() -> Any:
        model = make_model()
        freeze_all_but_embeddings(model)
        return model

    flags = "--freeze_non_embeds_params"
    expected = train(boost("zero2", "bf16", 2, flags, model=make()), range(STEPS))
    plugin = boost(name, "bf16", 2, flags, model=make())
    problems = close(train(plugin, range(STEPS)), expected)
    before = make_model().to(torch.bfloat16).state_dict()
    names = [name for name, _ in plugin.causal_lm.named_parameters()]
    tensors = plugin.gather_weights([parameter for _, parameter in plugin.causal_lm.named_parameters()])
    for name, tensor in zip(names, tensors, strict=True):
        is_embedding = name in ("model.embed_tokens.weight", "lm_head.weight")
        if torch.equal(tensor, before[name]) == is_embedding:
            problems.append(f"{name} {'is as it was' if is_embedding else 'has changed'}")
    saved = state_in(save(plugin, directory / "state"))
    if {key.split("/")[0] for key in saved} != {"model.embed_tokens.weight", "lm_head.weight"}:
        problems.append(f"optimizer state of {sorted(saved)}")
    return verdict(problems)


def overflow(directory: Path, name: str, passes: int) -> str:
    """Two steps in a row, then in the first and in the last pass of a window; the scale halves each time but
    the first.
    """
    overflows = {(1, 0), (2, 0), (4, 0), (6, passes - 1)}
    expected = train(boost("zero2", "fp16", passes), range(9), overflows)
    plugin = boost(name, "fp16", passes)
    ours = train(plugin, range(9), overflows)
    problems = close(ours, expected)
    if [number for number, step in enumerate(ours) if step.skipped] != [1, 2, 4, 6]:
        problems.append(f"left out: {[step.skipped for step in ours]}")
    if ours[-1].scale != 2.0**13:
        problems.append(f"scale {ours[-1].scale}")
    return verdict(problems)


def growing_scale(directory: Path, name: str) -> str:
    """The scale doubles after every second step: gradients are divided by the one that they were multiplied
    with. Without clipping, which would make up for another divisor.
    """
    expected = train(boost("zero2", "fp16", flags="--grad_clip 0"), range(STEPS))
    plugin = boost(name, "fp16", flags="--grad_clip 0")
    plugin.loss_scale._scaling.grad_scaler._growth_interval = 2
    ours = train(plugin, range(STEPS))
    scales = [step.scale for step in ours]
    problems = close([dataclasses.replace(step, scale=expected[0].scale) for step in ours], expected)
    if scales[-1] != 2.0 ** (16 + STEPS // 2):
        problems.append(f"scales {scales}")
    return verdict(problems)


def current_weights(directory: Path, name: str, precision: str, passes: int, offload: bool = False) -> str:
    """Exported weights are the masters of this very step, in half precision."""
    plugin_class = find_plugin(name)
    original = plugin_class.make_booster_plugin
    if offload:  # some optimizer states on the host with the static placement

        def with_offloading(self: Any) -> Any:
            made = original(self)
            made.gemini_config["offload_optim_frac"] = 0.5
            return made

        plugin_class.make_booster_plugin = with_offloading
    try:
        plugin = boost(name, precision, passes)
    finally:
        plugin_class.make_booster_plugin = original
    problems = []
    for step in range(3):
        train(plugin, range(step, step + 1))
        saved = save(plugin, directory / f"step-{step}", in_background=True)
        masters = {key[: -len("/master")]: t for key, t in state_in(saved).items() if key.endswith("/master")}
        dtype = plugin.parameter_dtype
        expected = {
            n: str(dtype).encode() + t.to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
            for n, t in masters.items()
        }
        problems += [f"step {step}: {n}" for n in differences(weight_bytes(saved), expected)]
    return verdict(problems)


def exact_resume(directory: Path, name: str, precision: str, passes: int, **kwargs: Any) -> str:
    """Stopped after four of eight steps; overflows before and after, since the scale halves at the second one
    only if the scaler still knows of the first.
    """
    overflows = {(2, 0), (5, 0)} if precision == "fp16" else set()
    plugin = boost(name, precision, passes, **kwargs)
    train(plugin, range(4), overflows)
    stopped = save(plugin, directory / "stopped")
    expected = train(plugin, range(4, 8), overflows)
    whole = save(plugin, directory / "whole")
    plugin = resume(name, stopped, False, precision, passes, **kwargs)
    if name == "gemini_auto":  # as a resumed run does whose evaluation was due
        plugin.evaluate_pass(batches_of(plugin, 0)[0][0])
    ours = train(plugin, range(4, 6), overflows)
    plugin.evaluate_pass(batches_of(plugin, 1)[0][0])
    ours += train(plugin, range(6, 8), overflows)
    problems = [f"{a} instead of {b}" for a, b in zip(ours, expected, strict=True) if a != b]
    resumed = save(plugin, directory / "resumed")
    problems += differences(state_in(resumed), state_in(whole))
    problems += differences(weight_bytes(resumed), weight_bytes(whole))
    if plugin.loss_scale_state() and plugin.loss_scale_state()["scale"] != 2.0**15:
        problems.append(f"scaler {plugin.loss_scale_state()}")
    return verdict(problems)


def wandering(directory: Path, precision: str, layouts: tuple[tuple[str, str], ...], **kwargs: Any) -> str:
    """From layout to layout without a step in between: state and exported weights keep every bit."""
    plugin = boost("gemini", precision, 2, **kwargs)
    train(plugin, range(3))
    first = last = save(plugin, directory / "first")
    problems = []
    for number, (name, flags) in enumerate(layouts):
        plugin = resume(name, last, True, precision, 2, flags, **kwargs)
        last = save(plugin, directory / str(number))
        problems += [f"{name}: {key}" for key in differences(state_in(last), state_in(first))]
        problems += [f"{name} exports {key}" for key in differences(weight_bytes(last), weight_bytes(first))]
        if plugin.loss_scale_state().get("scale") != (2.0**16 if precision == "fp16" else None):
            problems.append(f"{name}: scale {plugin.loss_scale_state()}")
    train(plugin, range(3, 5))
    return verdict(problems)


def other_chunks(directory: Path) -> str:
    """The same layout with chunks of another size (of another version, say) reads slices of all files."""
    from colossal_llama.training.plugins import gemini_chunks

    plugin = boost("gemini", "bf16")
    train(plugin, range(2))
    before = save(plugin, directory / "before")
    gemini_chunks.FEWEST_CHUNKS = 3
    try:
        after = save(resume("gemini", before, False, "bf16"), directory / "after")
    finally:
        gemini_chunks.FEWEST_CHUNKS = 8
    return verdict(differences(state_in(after), state_in(before)))


def early_evaluation(directory: Path, precision: str, passes: int) -> str:
    """The placement "auto" evaluates before the first step, and trains as if it had not."""
    states = []
    for evaluates in (False, True):
        plugin = boost("gemini_auto", precision, passes)
        if evaluates:
            batch = batches_of(plugin, 0)[0][0]
            random_before = torch.get_rng_state()
            first = plugin.evaluate_pass(batch)
            if not torch.equal(torch.get_rng_state(), random_before):
                return "random numbers were used up"
            if not torch.equal(first, plugin.evaluate_pass(batch)):
                return "weights have changed"
        losses = train(plugin, range(4))
        states.append((losses, state_in(save(plugin, directory / str(evaluates)))))
    if states[0][0] != states[1][0]:
        return "losses differ"
    return verdict(differences(states[1][1], states[0][1]))


def parameter_groups(directory: Path, name: str) -> str:
    """Matrices decay, norms do not, embeddings have a rate of their own: all state is there by name."""
    from colossal_llama.upstream.gemini_adam import DividingAdamW

    def groups_of(model: Any) -> list[dict[str, Any]]:
        norms = [p for n, p in model.named_parameters() if "norm" in n]
        embeddings = [p for n, p in model.named_parameters() if "embed" in n or "lm_head" in n]
        chosen = {id(p) for p in (*norms, *embeddings)}
        rest = [p for p in model.parameters() if id(p) not in chosen]
        return [
            {"params": norms, "weight_decay": 0.0},
            {"params": rest},
            {"params": embeddings, "weight_decay": 0.5},
        ]

    runs = []
    for plugin_name, optimizer_class in (("zero2", torch.optim.AdamW), (name, DividingAdamW)):
        plugin_class, model = find_plugin(plugin_name), make_model().to(torch.bfloat16)
        original = plugin_class.make_optimizer
        plugin_class.make_optimizer = lambda self, parameters, model=model, made=optimizer_class: made(
            groups_of(model), **self.adam_settings
        )
        try:
            plugin = boost(plugin_name, model=model)
        finally:
            plugin_class.make_optimizer = original
        losses = train(plugin, range(4))
        runs.append((losses, state_in(save(plugin, directory / plugin_name))))
    problems = close(runs[1][0], runs[0][0])
    if runs[0][1].keys() != runs[1][1].keys():
        problems.append("names differ")
    for key, tensor in runs[0][1].items():
        if key.endswith("/master") and not torch.allclose(runs[1][1][key], tensor, atol=5e-3):
            problems.append(key)
    return verdict(problems)


def masked_gradients(directory: Path, name: str) -> str:
    """A hook that was registered before boosting changes gradients before Gemini takes them away."""
    model = make_model()
    kept = VOCABULARY // 2
    for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
        weight.requires_grad_(True)
        mask = (torch.arange(VOCABULARY) >= kept).unsqueeze(1)
        weight.register_hook(lambda gradient, mask=mask: gradient * mask)
    plugin = boost(name, "bf16", 2, model=model)
    train(plugin, range(3))
    state = state_in(save(plugin, directory / name))
    problems = []
    for weight in ("model.embed_tokens.weight", "lm_head.weight"):
        moments = state[f"{weight}/exp_avg_sq"]
        if moments[:kept].any():
            problems.append(f"{weight}: masked rows have moments")
        if not moments[kept:].any():
            problems.append(f"{weight}: other rows have none")
    return verdict(problems)


def failing_rank(directory: Path) -> str:
    """A rank that can't hold a weight says so once all have been gathered; the others do not wait."""
    plugin = boost("gemini")
    plan = FileJobs(directory, None)
    hold = plan.hold
    calls = itertools.count()

    def fail_late(tensor: torch.Tensor) -> torch.Tensor:
        if next(calls) == 2:
            raise MemoryError("no room")
        return hold(tensor)

    if dist.get_rank() == 0:
        plan.hold = fail_late
    failure = None
    try:
        _add_weights(plan, plugin, "")
    except MemoryError as error:
        failure = str(error)
    dist.barrier()
    expected = "no room" if dist.get_rank() == 0 else None
    return RIGHT if failure == expected else f"failure {failure}"


def lost_weights(directory: Path) -> str:
    """A model that is boosted without its weights is an error."""
    plugin = boost("gemini")
    name = "model.layers.1.mlp.up_proj.weight"
    plugin.loaded_sums[name] += 1000.0
    try:
        plugin.check_weights()
    except RuntimeError as error:
        return RIGHT if name in str(error) else str(error)
    return "nothing was noticed"


def estimated_memory(directory: Path, name: str, passes: int) -> str:
    """What the plan says is what chunks and moments take."""
    plugin = boost(name, passes=passes, flags=f"--max_length {LENGTH}")
    manager = plugin.model.chunk_manager
    largest = [0]
    for method in ("access_chunk", "init_grad_chunk"):
        original = getattr(manager, method)

        def measure(*args: Any, original: Any = original, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            largest[0] = max(largest[0], manager.accessed_mem)
            return result

        setattr(manager, method, measure)
    train(plugin, range(2))
    estimate = plugin.estimate_states(plugin.count_held_parameters(plugin.causal_lm.config))
    chunks = manager.get_chunks(plugin.model.fp16_params)
    weights = sum(chunk.shard_mem for chunk in chunks)
    masters = sum(chunk.paired_chunk.shard_mem for chunk in chunks)
    gradients = sum(chunk.grad_chunk.shard_mem for chunk in chunks if chunk.grad_chunk is not None)
    moments = sum(
        tensor.nbytes
        for state in plugin.optimizer.optim.state.values()
        for tensor in state.values()
        if tensor.dim()
    )
    found = {"weights": weights, "gradients": gradients, "master_weights": masters}
    if name == "gemini_auto":  # fills the device as long as there is room
        # Blocks of these sizes would be rounded up to less than twice as much where they are pinned.
        used = weights + gradients + masters
        least, most = used + 0.8 * moments, 2 * used + 1.2 * moments
        problems = [] if least <= estimate["host"] <= most else [f"host {estimate['host']}, found {used}"]
    else:
        problems = [f"{key}: {estimate[key]}, found {n}" for key, n in found.items() if estimate[key] != n]
        if not 0.7 * estimate["communication"] <= largest[0] <= estimate["communication"]:
            problems.append(f"gathered: {estimate['communication']}, found {largest[0]}")
        if not 0.8 * moments <= estimate["moments"] <= 1.2 * moments:
            problems.append(f"moments: {estimate['moments']}, found {moments}")
    return verdict(problems)


Case = tuple[str, Callable[..., str], tuple, dict[str, Any]]

CASES: list[Case] = [
    ("parity gemini bf16 x4", parity, ("gemini", "bf16", 4), {}),
    ("parity gemini_auto bf16, recompute", parity, ("gemini_auto", "bf16", 1, "--use_grad_checkpoint"), {}),
    ("parity gemini fp16, tied, NEFTune", parity, ("gemini", "fp16", 1, "--use_neft"), {"tied": True}),
    ("frozen gemini", frozen, ("gemini",), {}),
    ("overflow gemini x4", overflow, ("gemini", 4), {}),
    ("overflow gemini_auto x1", overflow, ("gemini_auto", 1), {}),
    ("growing scale gemini", growing_scale, ("gemini",), {}),
    ("current weights gemini_auto x2", current_weights, ("gemini_auto", "bf16", 2), {}),
    ("exact resume gemini bf16 x2", exact_resume, ("gemini", "bf16", 2), {}),
    ("exact resume gemini_auto fp16 x1", exact_resume, ("gemini_auto", "fp16", 1), {}),
    (
        "wandering fp16",
        wandering,
        (
            "fp16",
            (("zero2", ""), ("gemini_auto", ""), ("3d", "--tp 2"), ("gemini", ""), ("3d", "--zero_stage 1")),
        ),
        {},
    ),
    ("other chunks", other_chunks, (), {}),
    ("early evaluation fp16 x1", early_evaluation, ("fp16", 1), {}),
    ("parameter groups gemini", parameter_groups, ("gemini",), {}),
    ("masked gradients gemini", masked_gradients, ("gemini",), {}),
    ("pinned bf16 x2", pinned, ("bf16", 2), {}),
    ("crowded bf16 x2", crowded, ("bf16", 2), {}),
    ("failing rank", failing_rank, (), {}),
    ("lost weights", lost_weights, (), {}),
    ("estimated memory gemini x2", estimated_memory, ("gemini", 2), {}),
    ("estimated memory gemini_auto x2", estimated_memory, ("gemini_auto", 2), {}),
]


def more_cases() -> list[Case]:
    """The rest of the matrix."""
    cases: list[Case] = []
    for name, precision, passes, recompute in itertools.product(
        GEMINI, ("bf16", "fp16"), (1, 4), ("", ", recompute")
    ):
        flags = "--use_grad_checkpoint" if recompute else ""
        label = f"parity {name} {precision} x{passes}{recompute}"
        cases.append((label, parity, (name, precision, passes, flags), {}))
        cases.append((f"{label}, tied", parity, (name, precision, passes, flags), {"tied": True}))
    for name, precision, passes in itertools.product(GEMINI, ("bf16", "fp16"), (1, 2)):
        label = f"{name} {precision} x{passes}"
        cases.append((f"current weights {label}", current_weights, (name, precision, passes), {}))
        cases.append((f"exact resume {label}", exact_resume, (name, precision, passes), {}))
        cases.append((f"exact resume {label}, tied", exact_resume, (name, precision, passes), {"tied": True}))
    for precision, passes in itertools.product(("bf16", "fp16"), (1, 2)):
        label = f"{precision} x{passes}"
        cases.append((f"early evaluation {label}", early_evaluation, (precision, passes), {}))
        cases.append((f"crowded {label}", crowded, (precision, passes), {}))
        recomputed = (precision, passes, "--use_grad_checkpoint")
        cases.append((f"crowded {label}, recompute", crowded, recomputed, {}))
        cases.append((f"pinned {label}", pinned, (precision, passes), {}))
        offloaded = ("gemini", precision, passes, True)
        cases.append((f"current weights gemini {label}, offloaded", current_weights, offloaded, {}))
    for name in GEMINI:
        for passes in (1, 2, 4):
            cases.append((f"overflow {name} x{passes}", overflow, (name, passes), {}))
            cases.append((f"estimated memory {name} x{passes}", estimated_memory, (name, passes), {}))
        cases.append((f"frozen {name}", frozen, (name,), {}))
        cases.append((f"growing scale {name}", growing_scale, (name,), {}))
        cases.append((f"parameter groups {name}", parameter_groups, (name,), {}))
        cases.append((f"masked gradients {name}", masked_gradients, (name,), {}))
    others = (("zero2_cpu", ""), ("gemini", ""), ("3d", "--tp 2 --zero_stage 2"), ("gemini_auto", ""))
    for precision, tied in itertools.product(("bf16", "fp16"), (False, True)):
        label = f"wandering {precision}{', tied' if tied else ''}, others"
        cases.append((label, wandering, (precision, others), {"tied": tied}))
    known = {case[0] for case in CASES}
    return [case for case in cases if case[0] not in known]


def main() -> None:
    directory = Path(sys.argv[1])
    wanted = sys.argv[2] if len(sys.argv) > 2 else ""
    cases = {"": CASES, "more": more_cases()}.get(wanted)
    if cases is None:
        cases = [case for case in CASES + more_cases() if wanted in case[0]]
    with lean_imports():
        enable_cpu_training()
        import colossalai.booster.plugin  # noqa: F401
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    torch.manual_seed(dist.get_rank())
    base.ADAM_EPS = ADAM_EPS
    outcomes: dict[str, str] = {}
    for number, (name, function, args, kwargs) in enumerate(cases):
        own = directory / f"case-{number}"
        own.mkdir(parents=True, exist_ok=True)
        try:
            outcome = function(own, *args, **kwargs)
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, outcome)
        outcomes[name] = next((each for each in found if each != RIGHT), RIGHT)
        if dist.get_rank() == 0:
            (directory / "outcomes.json").write_text(json.dumps(outcomes, indent=1), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()

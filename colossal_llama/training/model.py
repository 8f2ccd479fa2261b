"""The model that is trained: loading, what of it trains, and the forward that every layout shares."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from colossal_llama.model.model_config import (
    GENERATION_CONFIG_FILE,
    accept_byte_order_marks,
    find_model_file,
    load_model_config,
    outside_vocabulary,
)
from colossal_llama.model.weight_files import check_index, find_shards, iterate_chunks, open_shard
from colossal_llama.tokenizer.tokenizer_files import check_settings
from colossal_llama.training.attention import install_attention
from colossal_llama.training.loss import next_token_loss_sum, plain_next_token_loss_sum
from colossal_llama.training.neftune import EmbeddingNoise
from colossal_llama.utils.errors import UserError

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

LORA_ALPHA = 32
LORA_DROPOUT = 0.1
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load_config(path: str, trust_remote_code: bool) -> LlamaConfig:
    """Reads the model's configuration; raises `UserError` when it is not a LLaMA."""
    where = f"--pretrained {path}"
    try:
        config = load_model_config(path, where, trust_remote_code)
    except UserError:
        raise
    except Exception as error:  # a damaged file can make any of them
        raise UserError(f"{where}: cannot be read as a Hugging Face model ({_first_line(error)})") from None
    if config.model_type != "llama":
        raise UserError(
            f"--pretrained {path}: is a {config.model_type} model; this suite trains llama models"
        )
    if config.attention_dropout:
        raise UserError(
            f"--pretrained {path}: its config.json has attention_dropout {config.attention_dropout}, which "
            "this suite does not apply; set it to 0.0 (no LLaMA was trained with it)"
        )
    return config


def load_tokenizer(path: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    check_settings(path)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # of tokenizers and sentencepiece too, which have classes of their own
        raise UserError(
            f"--pretrained {path}: its tokenizer cannot be read ({_first_line(error)}); "
            "copy the tokenizer files into the model directory"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def load_causal_lm(weights: str, config: LlamaConfig, dtype: torch.dtype, flag: str) -> LlamaForCausalLM:
    """Loads `weights` into a model of shape `config`.

    Args:
        weights: model directory or hub name; safetensors or `.bin`, sharded or not.
        flag: the argument that named it, for messages.

    Raises:
        UserError: files are missing or damaged, or tensors are missing or of another shape.
    """
    from transformers import LlamaForCausalLM

    accept_byte_order_marks()
    if Path(weights).is_dir():
        check_index(Path(weights), flag)
    try:
        with every_row_trains(config) as restore:
            model, info = LlamaForCausalLM.from_pretrained(
                weights,
                config=config,
                torch_dtype=dtype,
                attn_implementation="sdpa",
                output_loading_info=True,
            )
            restore(model, find_model_file(weights, GENERATION_CONFIG_FILE) is None)
    except Exception as error:
        raise UserError(f"{flag} {weights}: the weights cannot be loaded ({_first_line(error)})") from None
    problems = [f"{flag} {weights}: tensor {name} is missing" for name in sorted(info["missing_keys"])]
    problems += [f"{flag} {weights}: tensor {name[0]} has another shape" for name in info["mismatched_keys"]]
    if problems:
        raise UserError(problems[:20])
    return model


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
        with every_row_trains(config), torch.device("meta"):
            model = LlamaForCausalLM(config)
    except Exception as error:
        raise UserError(f"{flag} {weights}: the model cannot be built ({_first_line(error)})") from None
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
        raise UserError(problems[:20])
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


def random_causal_lm(config: LlamaConfig, dtype: torch.dtype, seed: int) -> LlamaForCausalLM:
    """A model with random weights, the same on every rank, for benchmarks of a shape without weights."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    config.torch_dtype = dtype
    with every_row_trains(config) as restore:
        model = LlamaForCausalLM._from_config(config, torch_dtype=dtype, attn_implementation="sdpa")
        restore(model, True)
    return model


@contextlib.contextmanager
def every_row_trains(config: LlamaConfig) -> Iterator[Callable[[LlamaForCausalLM, bool], None]]:
    """Makes `from_pretrained` build an embedding without a row for padding.

    `pad_token_id` becomes the embedding's `padding_idx`, whose row gets no gradient, in colossalai's sharded
    embeddings too: 2 would freeze `</s>`, -1 the last piece. Padding needs no such row: it has no loss.

    The context gives a function that writes the value back, so that what is saved holds it as before. It
    takes the model, and whether the model's generation configuration was derived from `config`.
    """
    from transformers import GenerationConfig

    pad_token_id = config.pad_token_id

    def restore(model: LlamaForCausalLM, generation_of_config: bool) -> None:
        model.config.pad_token_id = pad_token_id
        if generation_of_config and not outside_vocabulary(pad_token_id, config.vocab_size):
            model.generation_config = GenerationConfig.from_model_config(model.config)
        if outside_vocabulary(model.generation_config.pad_token_id, config.vocab_size):
            model.generation_config.pad_token_id = None  # with -1, transformers refuses to save it

    config.pad_token_id = None
    try:
        yield restore
    finally:
        config.pad_token_id = pad_token_id


def freeze_all_but_embeddings(model: LlamaForCausalLM) -> None:
    """Leaves only the input and output embeddings to train."""
    model.requires_grad_(False)
    train_embeddings_too(model)


def train_embeddings_too(model: LlamaForCausalLM) -> None:
    model.get_input_embeddings().requires_grad_(True)
    model.get_output_embeddings().requires_grad_(True)


def is_embedding(name: str) -> bool:
    """Whether a parameter of this name is the input or the output embedding; in a PEFT model too."""
    return name.endswith(("embed_tokens.weight", "lm_head.weight"))


def lora_config(rank: int) -> LoraConfig:
    """Adapters on all attention and MLP projections."""
    from peft import LoraConfig, TaskType

    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=rank,
        lora_alpha=LORA_ALPHA,
        lora_dropout=LORA_DROPOUT,
        target_modules=LORA_TARGETS,
    )


def add_lora(
    model: LlamaForCausalLM, rank: int, adapter: Path | None, seed: int, train_embeddings: bool = False
) -> nn.Module:
    """Wraps the model with LoRA on all attention and MLP projections: new adapters, or saved ones
    from `adapter`.

    Args:
        seed: of the new adapters, the same on every rank: each plugin takes its own rank's for granted.
        train_embeddings: trains the model's own embeddings too. peft's `modules_to_save` would train copies
            of them, which untie tied ones and which the plugins can't handle.
    """
    from peft import PeftModel, get_peft_model

    if adapter is not None:
        # Embeddings among its tensors go into the model's own. peft would read them onto a GPU first.
        wrapped = PeftModel.from_pretrained(
            model, adapter, is_trainable=True, autocast_adapter_dtype=False, torch_device="cpu"
        )
    else:
        with torch.random.fork_rng(devices=[]):
            # The CPU's alone: ranks keep dropout masks of their own.
            torch.default_generator.manual_seed(seed)
            wrapped = get_peft_model(model, lora_config(rank), autocast_adapter_dtype=False)
    base = model.name_or_path
    if base and Path(base).is_dir():
        base = str(Path(base).absolute())  # a relative path would lead nowhere from another directory
    wrapped.peft_config["default"].base_model_name_or_path = base
    if train_embeddings:
        train_embeddings_too(model)
    return wrapped


def causal_lm_forward(
    self: LlamaForCausalLM,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    hidden_states: torch.Tensor | None = None,
    **unused: Any,
) -> dict[str, torch.Tensor]:
    """The forward of `LlamaForCausalLM` in training: from a collated batch to the summed loss.

    Args:
        attention_mask: the collator's `document_index`, [batch, sequence].
        labels: already shifted, [batch, sequence].
        hidden_states: from the previous pipeline stage.

    Returns:
        `loss_sum`, an fp32 scalar; from a pipeline stage that is not the last one, `hidden_states`.
    """
    inputs: dict[str, Any] = {"input_ids": input_ids}
    pipeline = self.pipeline_arguments
    is_first = pipeline is None or pipeline["stage_manager"].is_first_stage()
    if self.training and self.embedding_noise is not None and is_first:
        embeddings = self.model.embed_tokens(input_ids)
        inputs = {"inputs_embeds": embeddings + self.embedding_noise(embeddings, attention_mask >= 0)}
    inputs.update(attention_mask=attention_mask, position_ids=position_ids, use_cache=False)
    if pipeline is None:
        hidden = self.model(**inputs)[0]
    else:
        from colossalai.shardformer.modeling.llama import LlamaPipelineForwards

        outputs = LlamaPipelineForwards.llama_model_forward(
            self.model, hidden_states=hidden_states, **inputs, **pipeline
        )
        if not pipeline["stage_manager"].is_last_stage():
            return {"hidden_states": outputs["hidden_states"]}
        hidden = outputs[0]
    if self.plain_loss:
        return {"loss_sum": plain_next_token_loss_sum(self.lm_head, hidden, labels)}
    return {"loss_sum": next_token_loss_sum(self.lm_head, hidden, labels, self.vocabulary_group)}


def install_forwards(
    model: LlamaForCausalLM,
    use_flash: bool,
    ulysses_group: Any = None,
    vocabulary_group: Any = None,
    pipeline_arguments: dict | None = None,
    embedding_noise: EmbeddingNoise | None = None,
    plain_loss: bool = False,
) -> None:
    """Replaces the plugin's forwards by ours, after boosting.

    Args:
        vocabulary_group: the tensor parallel group when `lm_head` is sharded along the vocabulary.
        pipeline_arguments: `stage_manager`, `stage_index` and `shard_config` under pipeline parallelism.
        plain_loss: compute whole logits with ordinary operations.
    """
    install_attention(model, use_flash, ulysses_group)
    model.pipeline_arguments = pipeline_arguments
    model.vocabulary_group = vocabulary_group
    model.embedding_noise = embedding_noise
    model.plain_loss = plain_loss
    model.forward = MethodType(causal_lm_forward, model)


def restore_rotary_frequencies(model: nn.Module) -> None:
    """Recomputes `inv_freq` in fp32: casting a model to half precision rounds it, which shifts phases
    by radians.
    """
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    for module in model.modules():
        if isinstance(module, LlamaRotaryEmbedding):
            frequencies, module.attention_scaling = module.rope_init_fn(module.config, module.inv_freq.device)
            module.register_buffer("inv_freq", frequencies.float(), persistent=False)
            module.original_inv_freq = module.inv_freq


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

    tolerance = 1e-6 if compute_dtype == torch.float32 else 1e-2
    for name, parameter in model.named_parameters():
        if is_embedding(name) or name not in sums:
            continue
        total = parameter.detach().double().sum()
        magnitude = parameter.detach().double().abs().sum()
        if tensor_parallel_group is not None and is_distributed_tensor(parameter):
            both = torch.stack([total, magnitude])
            dist.all_reduce(both, group=tensor_parallel_group)
            total, magnitude = both
        if abs(float(total) - sums[name]) > tolerance * max(1.0, float(magnitude)):
            raise RuntimeError(f"parameter {name} lost its values while the plugin took over the model")


def looks_untrained(loss: float, vocab_size: int) -> bool:
    """Whether a first loss is what random weights give: within 5 % of ln(vocabulary), or above it."""
    return loss > 0.95 * math.log(vocab_size)


def is_weights_directory(path: Path) -> bool:
    """Whether a directory holds model weights in one of the forms that `from_pretrained` reads."""
    return (
        any(path.glob("*.safetensors"))
        or any(path.glob("*.safetensors.index.json"))
        or any(path.glob("*.bin*"))
    )

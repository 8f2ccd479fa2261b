"""The forward that every layout shares: from a collated batch to the summed loss."""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any

import torch

from colossal_llama.training.llama.attention import install_attention
from colossal_llama.training.llama.embedding_noise import EmbeddingNoise
from colossal_llama.training.llama.loss import next_token_loss_sum, plain_next_token_loss_sum

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from colossal_llama.training.llama.flash import FlashKernel


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
    row_losses = self.row_losses if self.training else None
    if self.plain_loss:
        return {"loss_sum": plain_next_token_loss_sum(self.lm_head, hidden, labels, row_losses)}
    loss_sum = next_token_loss_sum(self.lm_head, hidden, labels, self.vocabulary_group, row_losses)
    return {"loss_sum": loss_sum}


def install_forwards(
    model: LlamaForCausalLM,
    flash: FlashKernel | None = None,
    ulysses_group: Any = None,
    vocabulary_group: Any = None,
    pipeline_arguments: dict | None = None,
    embedding_noise: EmbeddingNoise | None = None,
    plain_loss: bool = False,
    row_losses: list[torch.Tensor] | None = None,
) -> None:
    """Replaces the plugin's forwards by ours, after boosting.

    Args:
        flash: see `install_attention`.
        vocabulary_group: the tensor parallel group when `lm_head` is sharded along the vocabulary.
        pipeline_arguments: `stage_manager`, `stage_index` and `shard_config` under pipeline parallelism.
        plain_loss: compute whole logits with ordinary operations.
        row_losses: gets the summed loss of each row, [batch], in every pass of training.
    """
    install_attention(model, flash, ulysses_group)
    model.pipeline_arguments = pipeline_arguments
    model.vocabulary_group = vocabulary_group
    model.embedding_noise = embedding_noise
    model.plain_loss, model.row_losses = plain_loss, row_losses
    model.forward = MethodType(causal_lm_forward, model)

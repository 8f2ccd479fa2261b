"""Answers from `transformers`' own `generate`: text streamed as it comes, a cache that can be kept."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.generation import BaseStreamer

from colossal_llama.inference.settings import Sampling
from colossal_llama.inference.streaming import StreamDecoder
from colossal_llama.utils.console import format_table
from colossal_llama.utils.errors import UserError

if TYPE_CHECKING:
    from colossal_llama.inference.loading import LoadedModel

# Modes of `generate` that a model's generation configuration may ask for, and that this program does not
# offer: one answer, token by token, from a cache of its own.
OWN_MODES = (
    "max_length",
    "num_beams",
    "num_beam_groups",
    "num_return_sequences",
    "early_stopping",
    "diversity_penalty",
    "length_penalty",
    "force_words_ids",
    "constraints",
    "dola_layers",
    "low_memory",
    "token_healing",
    "penalty_alpha",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "cache_implementation",
    "use_cache",
    "return_dict_in_generate",
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
)
SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")

STOPPED_BY_END = "end"
STOPPED_BY_LIMIT = "max_new_tokens"
STOPPED_BY_CONTEXT = "context_length"
STOPPED_BY_USER = "interrupt"


@dataclass(frozen=True)
class Answer:
    """`ids` holds the end token if there is one; `num_reused` prompt tokens came from the cache."""

    ids: list[int]
    text: str
    stopped_by: str
    num_reused: int


@dataclass
class Totals:
    """What a generator has done so far. Prompt tokens are counted where they were read, not taken from the
    cache; `seconds` is the time spent on answers.
    """

    answers: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    seconds: float = 0.0

    def add(self, answer: Answer, num_prompt_tokens: int, seconds: float) -> None:
        self.answers += 1
        self.prompt_tokens += num_prompt_tokens - answer.num_reused
        self.answer_tokens += len(answer.ids)
        self.seconds += seconds

    def table(self) -> str:
        rows = [
            ("answers", self.answers),
            ("prompt tokens read", self.prompt_tokens),
            ("tokens answered", self.answer_tokens),
            ("seconds", f"{self.seconds:,.1f}"),
            ("tokens answered a second", f"{self.answer_tokens / max(self.seconds, 1e-9):,.1f}"),
        ]
        return format_table(["inference", "total"], rows)


class AnswerGenerator:
    """Answers prompts with one model.

    Args:
        end_ids: tokens that end an answer, besides those of the model's generation configuration.
        sampling: None = greedy.
        keep_cache: keep keys and values for the next prompt, which starts where it differs from the last one.
            Without it every answer is computed from nothing, as `generate` does.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        end_ids: frozenset[int],
        max_new_tokens: int,
        sampling: Sampling | None,
        keep_cache: bool = False,
    ) -> None:
        self.model = loaded.model
        self.tokenizer = loaded.tokenizer
        self.context_length = loaded.context_length
        self.max_new_tokens = max_new_tokens
        self.keep_cache = keep_cache
        self.totals = Totals()
        self.config = make_generation_config(self.model.generation_config, end_ids, sampling)
        self.end_ids = frozenset(self.config.eos_token_id or ())
        self._cache: DynamicCache | None = None
        self._cached_ids: list[int] = []

    def answer(self, prompt: Sequence[int], on_text: Callable[[str], None]) -> Answer:
        """Generates until an end token, `max_new_tokens`, the end of the context, or Ctrl-C.

        Args:
            prompt: token ids, not empty.
            on_text: gets every piece of text as soon as it is certain.

        Raises:
            UserError: the prompt does not fit the model, or the GPU's memory is full.
        """
        self._check(prompt)
        started = time.perf_counter()
        room = self.context_length - len(prompt)
        budget = min(self.max_new_tokens, room)
        num_reused = self._reuse_cache(prompt)
        sink = _AnswerSink(StreamDecoder(self.tokenizer), self.end_ids, on_text)
        interrupted = False
        try:
            self._generate(prompt, budget, sink)
        except KeyboardInterrupt:
            interrupted = True
        except torch.OutOfMemoryError:
            self.forget()
            raise UserError(
                f"the GPU's memory is full at {len(prompt) + len(sink.ids):,} tokens; use --dtype bf16, "
                "a shorter prompt, or --device cpu"
            ) from None
        # The last token was chosen, not read: its keys and values are not in the cache. An interrupted step
        # may have reached some layers and not others, so its part is cut off.
        read = [*prompt, *sink.ids[:-1]] if sink.ids else list(prompt[:num_reused])
        self._keep(read)
        sink.finish()
        if interrupted:
            stopped_by = STOPPED_BY_USER
        elif len(sink.ids) < budget or sink.ids[-1] in self.end_ids:
            stopped_by = STOPPED_BY_END
        else:
            stopped_by = STOPPED_BY_LIMIT if budget == self.max_new_tokens else STOPPED_BY_CONTEXT
        answer = Answer(sink.ids, sink.text, stopped_by, num_reused)
        self.totals.add(answer, len(prompt), time.perf_counter() - started)
        return answer

    def forget(self) -> None:
        """Empties the cache."""
        self._cache, self._cached_ids = None, []

    def _check(self, prompt: Sequence[int]) -> None:
        if len(prompt) >= self.context_length:
            raise UserError(
                f"the prompt has {len(prompt):,} tokens, template included, and the model's context is "
                f"{self.context_length:,}; shorten it"
            )
        num_rows = self.model.get_input_embeddings().num_embeddings
        if max(prompt) >= num_rows:
            raise UserError(
                f"the tokenizer {self.tokenizer.name_or_path} gives token {max(prompt):,}, and the model has "
                f"embeddings for {num_rows:,}; use the tokenizer that belongs to the model (--tokenizer_path)"
            )

    def _generate(self, prompt: Sequence[int], budget: int, sink: _AnswerSink) -> None:
        input_ids = torch.tensor([list(prompt)], device=self.model.device)
        config = copy.deepcopy(self.config)
        config.max_new_tokens = budget
        cache = {"past_key_values": self._cache} if self.keep_cache else {}
        self.model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=config,
            # The configuration holds the model's own settings already, and some of them are meant to be off.
            use_model_defaults=False,
            streamer=sink,
            tokenizer=self.tokenizer,  # for the model's own `stop_strings`
            **cache,
        )

    def _reuse_cache(self, prompt: Sequence[int]) -> int:
        """Cuts the cache to what it shares with the prompt; returns that many tokens.

        The prompt's last token is always read again: its logits are where the answer begins.
        """
        if not self.keep_cache:
            return 0
        pairs = zip(self._cached_ids, prompt[:-1], strict=False)
        self._keep(list(prompt[: sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))]))
        return len(self._cached_ids)

    def _keep(self, ids: list[int]) -> None:
        """Cuts the cache to `ids`, which its contents begin with."""
        if not self.keep_cache:
            return
        self._cached_ids = ids
        if self._cache is None or not ids:
            self._cache = DynamicCache()
        else:
            self._cache.crop(len(ids))


def make_generation_config(
    model_config: GenerationConfig, end_ids: frozenset[int], sampling: Sampling | None
) -> GenerationConfig:
    """The model's own generation configuration, the tokens that end an answer, and the way of choosing."""
    config, default = copy.deepcopy(model_config), GenerationConfig()
    for name in OWN_MODES:
        setattr(config, name, getattr(default, name))
    own = config.eos_token_id
    own_ids = set() if own is None else {own} if isinstance(own, int) else set(own)
    config.eos_token_id = sorted(own_ids | end_ids) or None
    # Nothing is padded, but `generate` warns unless it knows with what.
    config.pad_token_id = config.eos_token_id[0] if config.eos_token_id else 0
    config.do_sample = sampling is not None
    if sampling is None:
        for name in SAMPLING_OPTIONS:
            setattr(config, name, getattr(default, name))
    else:
        config.temperature, config.top_k, config.top_p = sampling.temperature, sampling.top_k, sampling.top_p
    return config


class _AnswerSink(BaseStreamer):
    """Collects what `generate` hands out: the prompt first, then the tokens one by one."""

    def __init__(
        self, decoder: StreamDecoder, end_ids: frozenset[int], on_text: Callable[[str], None]
    ) -> None:
        self.decoder, self.end_ids, self.on_text = decoder, end_ids, on_text
        self.ids: list[int] = []
        self.text = ""
        self.seen_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if not self.seen_prompt:
            self.seen_prompt = True
            return
        token_id = int(value)
        self.ids.append(token_id)
        if token_id not in self.end_ids:
            self._give_out(self.decoder.push(token_id))

    def end(self) -> None:
        pass  # `finish` also follows an interrupted `generate`, which never comes here

    def finish(self) -> None:
        self._give_out(self.decoder.finish())

    def _give_out(self, text: str) -> None:
        if text:
            self.text += text
            self.on_text(text)

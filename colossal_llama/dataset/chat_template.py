"""Conversations in the tokenizer's own Jinja template: the ids of `apply_chat_template`, and exact masks.

A template is a program that may look at what is said (it may leave out `<think>` parts of earlier answers, or
trim), so it always gets the real messages, and the text that it writes for all of them is what is encoded.
Where an assistant speaks is found in that text

- with `{% generation %}`: by rendering once more, with a mark written at each of these tags;
- without: an answer begins after what the template writes for the messages before it as a prompt, and ends
  where it ends the conversation up to it. What a template writes otherwise inside a conversation is found by
  putting two other texts in the answer's place: what they have in common is its frame.

    "<think>b</think>c" as the last answer     [user]a[assistant]<think>b</think>c</s>
    and as an earlier one                      [user]a[assistant]c</s>[user]d …
    "x" and "y" in its place                   [user]a[assistant]x</s>[user]d …        the same on both sides

The strings of special tokens inside a message are plain text. Where there are any, the messages are rendered
once more with noncharacters in place of them, so that those of the template can be told from those of the
text; for a tokenizer that encodes such conversations alone, the template's are renamed:

    content "a </s>"      ─▶  a </s>           text
    template's own </s>   ─▶  ⟪0⟫              the 0th special token
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from colossal_llama.dataset.conversation import Message
from colossal_llama.dataset.jsonl import BadRecord
from colossal_llama.dataset.labels import has_loss
from colossal_llama.dataset.tokenization import (
    ConversationRecord,
    EncoderSpec,
    Outcome,
    TemplateTokens,
    describe_conversation,
    parse_conversation,
)
from colossal_llama.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

OPEN, CLOSE, QUOTE, RENAMED = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
MARKS = re.compile(f"[{OPEN}-{RENAMED}]")
ROLE_NAMES = {"human": "user", "assistant": "assistant", "system": "system"}
GENERATION = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")
# Some templates write today's date, and the output would depend on it; this is LLaMA 3.1's own default.
DATE = datetime(2024, 7, 26)
DATE_STRING = "26 Jul 2024"
REFUSED = "refused by the chat template"
# In place of an answer: letters that no filter for case or white space changes.
PROBES = ("甲", "乙")


@dataclass(frozen=True)
class Rendered:
    """What a template wrote, and the half-open character spans that an assistant says.

    `is_renamed`: the text is for the tokenizer of `rename_special_tokens`.
    """

    text: str
    spans: list[tuple[int, int]]
    is_renamed: bool = False


@dataclass(frozen=True)
class TemplatedRecord(ConversationRecord):
    """A conversation and how it is rendered.

    Args:
        ends: numbers of messages up to each answer, the last first.
        full: all of it; None if the template refuses it.
        up_to_answer: up to the last answer; None if there is none.
    """

    ends: list[int]
    full: Rendered | None
    up_to_answer: Rendered | None


class Refused(BadRecord):
    """The template raised an error for these messages."""

    def __init__(self, error: Exception) -> None:
        super().__init__(REFUSED, f"the chat template refuses it: {error}")


def check_chat_template(tokenizer: PreTrainedTokenizerFast) -> tuple[str, TemplateTokens]:
    """The tokenizer's template and the special tokens that it may name; `UserError` when it can't be used."""
    where = f"--chat_template: {tokenizer.name_or_path}"
    try:
        template = tokenizer.get_chat_template()
    except ValueError:
        raise UserError(f"{where}: this tokenizer has no chat template; leave the flag out") from None
    probe = [Message("human", "a"), Message("assistant", "b")] * 2
    try:
        renderer = TemplateRenderer(tokenizer, template)
        (encoding,) = renderer.encode_rendered([renderer.render(probe)])
        if encoding.ids != renderer.apply(probe, tokenize=True):
            raise BadRecord(
                "other ids",
                "apply_chat_template gives other ids than its tokenizer.json; take split_special_tokens, if "
                "it is there, out of its tokenizer_config.json",
            )
    except BadRecord as error:
        raise UserError(f"{where}: {error}") from None
    names = tokenizer.special_tokens_map.items()
    return template, tuple(sorted((k, v if isinstance(v, str) else tuple(v)) for k, v in names))


class ChatTemplateEncoder:
    """Conversations in the tokenizer's template; whole turns up to `max_length`."""

    def __init__(self, spec: EncoderSpec) -> None:
        from transformers import PreTrainedTokenizerFast

        variables = dict(spec.template_tokens)
        special = {name: value for name, value in variables.items() if isinstance(value, str)}
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=spec.tokenizer_json, **special)
        self.max_length = spec.max_length
        self.renderer = TemplateRenderer(tokenizer, spec.template, variables)

    def parse(self, value: dict[str, Any]) -> TemplatedRecord:
        record = parse_conversation(value)
        messages = record.messages
        self.renderer.check_characters(messages)
        ends = [i + 1 for i, m in enumerate(messages) if m.role == "assistant" and m.content]
        ends.reverse()
        full = up_to_answer = None
        try:
            if ends:
                full = up_to_answer = self.renderer.render(messages[: ends[0]])
            if not ends or ends[0] < len(messages):
                full = self.renderer.render(messages, with_spans=False)
        except Refused:
            full = None
        return TemplatedRecord(messages, record.category, ends, full, up_to_answer)

    def encode(self, records: Sequence[TemplatedRecord]) -> list[Outcome]:
        encoded = iter(
            self._encode_rendered([r.up_to_answer or r.full for r in records if r.full is not None])
        )
        return [
            self._refuse(record) if record.full is None else self._finish(record, next(encoded))
            for record in records
        ]

    def _refuse(self, record: TemplatedRecord) -> Outcome:
        return Outcome(0, reason=REFUSED, notes=describe_conversation(record.messages))

    def _finish(self, record: TemplatedRecord, stored: np.ndarray) -> Outcome:
        """`stored`: the conversation up to its last answer, or all of it when there is none."""
        notes = describe_conversation(record.messages)
        if record.full.is_renamed:
            notes.append("special token's string as text")
        if record.up_to_answer is None:
            return Outcome(len(stored), [], {"no answer": len(stored)}, "no answer", notes)
        num_tokens = num_up_to_answer = len(stored)
        if record.full.text != record.up_to_answer.text:
            # A template may write less for a longer conversation: then nothing is counted as dropped.
            num_tokens = max(num_tokens, len(self._encode_rendered([record.full])[0]))
        if len(stored) > self.max_length:
            stored = self._find_fitting(record)
        reason = None
        if stored is None:
            reason = "first answer beyond max_length"
        elif not has_loss(stored):  # a template may write nothing of what is said
            reason = "no answer"
        if reason is not None:
            return Outcome(num_tokens, [], {reason: num_tokens}, reason, notes)
        outcome = Outcome(num_tokens, [stored], notes=notes)
        if num_tokens > num_up_to_answer:
            outcome.dropped_tokens["after the last answer"] = num_tokens - num_up_to_answer
        if len(stored) < num_up_to_answer:
            outcome.dropped_tokens["turns beyond max_length"] = num_up_to_answer - len(stored)
            outcome.notes.append("cut to whole turns")
        return outcome

    def _find_fitting(self, record: TemplatedRecord) -> np.ndarray | None:
        """The stored tokens of the longest beginning that ends with an answer and fits; None if none does.

        Each beginning is rendered as a conversation of its own: the template may write it in another way.
        """
        for end in record.ends[1:]:
            messages = record.messages[:end]
            with contextlib.suppress(BadRecord):
                (stored,) = self._encode_rendered([self.renderer.render(messages, with_spans=False)])
                if len(stored) <= self.max_length:  # only now are the answers looked for, which takes longer
                    return self._encode_rendered([self.renderer.render(messages)])[0]
        return None

    def _encode_rendered(self, rendered: Sequence[Rendered]) -> list[np.ndarray]:
        """Stored tokens of each text: a token that holds a character of a span has loss."""
        documents = []
        for one, encoding in zip(rendered, self.renderer.encode_rendered(rendered), strict=True):
            plain = np.array(encoding.ids, dtype=np.int32)
            offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
            stored = ~plain
            for start, end in one.spans:
                inside = (offsets[:, 1] > start) & (offsets[:, 0] < end)
                stored[inside] = plain[inside]
            documents.append(stored)
        return documents


class TemplateRenderer:
    """Renders messages with a tokenizer's template, keeping track of spans and special tokens (see above).

    `variables`: what the template may name, where the tokenizer does not say it itself.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        template: str,
        variables: Mapping[str, str | tuple[str, ...]] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.variables = {
            name: value if isinstance(value, str) else list(value)
            for name, value in (variables or {}).items()
        }
        added = tokenizer.added_tokens_decoder.values()
        ordinary = {t.content for t in added if not t.special}
        self.special_tokens = sorted(
            (
                t.content
                for t in added
                if t.special
                or (t.content in template and is_mark(t.content) and not is_tag(t.content, ordinary))
            ),
            key=lambda token: (-len(token), token),
        )
        alternatives = "|".join(map(re.escape, self.special_tokens)) or "(?!)"
        self.special_pattern = re.compile(alternatives)
        self.quoted_pattern = re.compile(f"{QUOTE}(\\d+){QUOTE}|{alternatives}")
        self.marked_template = None
        if GENERATION.search(template) is not None:
            self.marked_template = GENERATION.sub(_mark_generation, template)

    @cached_property
    def backend(self) -> Tokenizer:
        """The tokenizer as `apply_chat_template` uses it. Without its post-processor, which only adds tokens
        and trims spaces from offsets, every character belongs to the token that it came from.
        """
        return _plain_copy(self.tokenizer.backend_tokenizer.to_str())

    @cached_property
    def renamed_backend(self) -> Tokenizer:
        return rename_special_tokens(self.tokenizer.backend_tokenizer, self.special_tokens)

    def encode_rendered(self, rendered: Sequence[Rendered]) -> list[Any]:
        """A `tokenizers.Encoding` for each text."""
        encodings: list[Any] = [None] * len(rendered)
        for is_renamed in (False, True):
            places = [i for i, one in enumerate(rendered) if one.is_renamed == is_renamed]
            if places:
                backend = self.renamed_backend if is_renamed else self.backend
                texts = [rendered[i].text for i in places]
                for i, encoding in zip(
                    places, backend.encode_batch(texts, add_special_tokens=False), strict=True
                ):
                    encodings[i] = encoding
        return encodings

    def check_characters(self, messages: Sequence[Message]) -> None:
        """Raises `BadRecord` for characters that mark places here."""
        if any(MARKS.search(message.content) for message in messages):
            raise BadRecord("noncharacter", "a message holds a Unicode noncharacter (U+FDD0 to U+FDD3)")

    def render(
        self, messages: Sequence[Message], with_spans: bool = True, add_generation_prompt: bool = False
    ) -> Rendered:
        """What the template writes; raises `BadRecord` where it refuses, or can't be seen through."""
        text = self.apply(messages, add_generation_prompt)
        spans = self._find_spans(messages, text) if with_spans else []
        if not any(self.special_pattern.search(message.content) for message in messages):
            return Rendered(text, spans)
        quoted = [Message(m.role, self._quote(m.content)) for m in messages]
        return self._rename(text, self.apply(quoted, add_generation_prompt), spans)

    def _rename(self, text: str, quoted: str, spans: list[tuple[int, int]]) -> Rendered:
        """`quoted` for the renamed tokenizer, with the spans of `text`, which it has to be a form of."""
        original, parts = [], []
        places = [0]  # of each character of the original text
        length = position = 0

        def add(before: str, after: str) -> None:
            nonlocal length
            original.append(before)
            parts.append(after)
            same = before == after
            places.extend(length + (i if same else len(after)) for i in range(1, len(before) + 1))
            length += len(after)

        for match in self.quoted_pattern.finditer(quoted):
            between = quoted[position : match.start()]
            add(between, between)
            if match.group(1) is not None:
                token = self.special_tokens[int(match.group(1))]
                add(token, token)
            else:
                add(match.group(), renamed(self.special_tokens.index(match.group())))
            position = match.end()
        add(quoted[position:], quoted[position:])
        if "".join(original) != text:
            raise BadRecord(
                "special token in text",
                "a message holds the string of a special token, and the chat template looks at what messages "
                "hold: it can't be told which special tokens are the template's",
            )
        return Rendered("".join(parts), [(places[start], places[end]) for start, end in spans], True)

    def _find_spans(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        """Where the answers that have content are in `text`, with what ends them."""
        if self.marked_template is not None:
            return self._find_marked(messages, text)
        spans: list[tuple[int, int]] = []
        position = 0
        for index, message in enumerate(messages):
            if message.role != "assistant" or not message.content:
                continue
            span = self._find_answer(messages, index, text)
            if span is None or not position <= span[0] <= span[1]:
                raise BadRecord(
                    "not rendered turn by turn",
                    f"the chat template has no {{% generation %}} marks, and what it writes for answer "
                    f"{len(spans) + 1} can't be found in what it writes for all messages; put the marks "
                    "around the assistant's part of the template, or leave --chat_template out",
                )
            spans.append(span)
            position = span[1]
        return spans

    def _find_marked(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        marked = self.apply(messages, template=self.marked_template)
        spans, parts, start, length = [], [], 0, 0
        for part in re.split(f"([{OPEN}{CLOSE}])", marked):
            if part == OPEN:
                start = length
            elif part == CLOSE:
                spans.append((start, length))
            else:
                parts.append(part)
                length += len(part)
        answers = [message for message in messages if message.role == "assistant"]
        if len(spans) != len(answers):
            raise BadRecord(
                "answers not marked",
                f"the chat template marks {len(spans)} of {len(answers)} answers with {{% generation %}}",
            )
        if "".join(parts) != text:
            raise BadRecord(
                "answers not marked",
                "the chat template changes what is between its {% generation %} marks after it is written",
            )
        # An answer without content is left out: there is nothing in it to learn but silence.
        return [span for span, answer in zip(spans, answers, strict=True) if answer.content]

    def _find_answer(self, messages: Sequence[Message], index: int, text: str) -> tuple[int, int] | None:
        """Where the answer `messages[index]` is in the text of all messages; None if it can't be said."""
        before = self._try(messages[:index], add_generation_prompt=True)
        after = text if index + 1 == len(messages) else self._try(messages[: index + 1])
        starts_as_prompt = before is not None and text.startswith(before)
        if starts_as_prompt and after is not None and after.startswith(before) and text.startswith(after):
            return len(before), len(after)
        frame = self._find_frame(messages, index)
        as_last = self._find_frame(messages[: index + 1], index)
        if frame is None or as_last is None:
            return None
        # What follows the answer: its end, as where it is the last message, then the messages after it.
        end_of_turn = _common_prefix(frame[1], as_last[1])
        rest = frame[1][len(end_of_turn) :]
        if not text.endswith(rest) or (as_last[1] and not end_of_turn):
            return None
        if starts_as_prompt:
            start = len(before)
        elif text.startswith(frame[0]):
            start = len(frame[0])
        else:
            return None
        end = len(text) - len(rest)
        return (start, end) if start <= end else None

    def _find_frame(self, messages: Sequence[Message], index: int) -> tuple[str, str] | None:
        """What is written before and after the content of a message, whatever that is."""
        texts = [
            self._try([*messages[:index], Message(messages[index].role, content), *messages[index + 1 :]])
            for content in PROBES
        ]
        first, second = texts
        if first is None or second is None:
            return None
        head = _common_prefix(first, second)
        tail = _common_prefix(first[::-1], second[::-1])[::-1]
        is_frame = [head + content + tail for content in PROBES] == texts
        return (head, tail) if is_frame else None

    def _try(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str | None:
        try:
            return self.apply(messages, add_generation_prompt)
        except Refused:
            return None

    def apply(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        template: str | None = None,
        tokenize: bool = False,
    ) -> Any:
        """What `apply_chat_template` gives, text or token ids; raises `Refused`."""
        chat = [{"role": ROLE_NAMES[message.role], "content": message.content} for message in messages]
        try:
            (result,) = self.tokenizer.apply_chat_template(
                [chat],  # a batch, which transformers also takes when there is no message in it yet
                chat_template=template or self.template,
                add_generation_prompt=add_generation_prompt,
                tokenize=tokenize,
                **self.variables,
                date_string=DATE_STRING,
                strftime_now=DATE.strftime,
            )
        except Exception as error:  # a template is a program, and fails in any way
            raise Refused(error) from None
        return result

    def _quote(self, content: str) -> str:
        return self.special_pattern.sub(
            lambda match: f"{QUOTE}{self.special_tokens.index(match.group())}{QUOTE}", content
        )


def is_mark(token: str) -> bool:
    """Whether an added token that is not said to be special looks like one, `<|im_end|>` for instance.

    A template that writes such a token means it as a control token, however it was added to the vocabulary.
    """
    ends = token[:1] + token[-1:]
    return len(token) > 2 and not any(character.isalnum() or character.isspace() for character in ends)


def is_tag(token: str, ordinary: Collection[str]) -> bool:
    """Whether an ordinary added token is one of a pair like `<think>` and `</think>`.

    Those are a part of what is said: the tokenizer finds them in messages as `apply_chat_template` does.
    """
    match = re.fullmatch(r"</?([\w-]+)>", token)
    return match is not None and {f"<{match[1]}>", f"</{match[1]}>"} <= set(ordinary)


def renamed(index: int) -> str:
    """The name under which the encoding tokenizer knows the special token with this index."""
    return f"{RENAMED}{index}{RENAMED}"


def rename_special_tokens(backend: Tokenizer, special_tokens: Sequence[str]) -> Tokenizer:
    """A copy whose special tokens have the names of `renamed`, so that their own strings are plain text.

    The ids, and everything else in which the tokenizers encode text, are the same.
    """
    names = {token: renamed(index) for index, token in enumerate(special_tokens)}
    value = json.loads(backend.to_str())
    for added in value["added_tokens"]:
        added["content"] = names.get(added["content"], added["content"])
    model = value["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): token_id for token, token_id in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    copy = _plain_copy(json.dumps(value))
    assert all(copy.token_to_id(name) == backend.token_to_id(token) for token, name in names.items())
    return copy


def _common_prefix(first: str, second: str) -> str:
    length = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        length += 1
    return first[:length]


def _plain_copy(serialised: str) -> Tokenizer:
    copy = Tokenizer.from_str(serialised)
    copy.no_truncation()
    copy.no_padding()
    copy.post_processor = None
    return copy


def _mark_generation(tag: re.Match[str]) -> str:
    """Two tags around a mark for one `{% generation %}`: white space on both sides is treated as before."""
    left, end, right = tag.groups()
    statement, mark = ("endif", CLOSE) if end else ("if true", OPEN)
    return f"{{%{left} {statement} %}}{{{{ '{mark}' }}}}{{% {statement} {right}%}}"

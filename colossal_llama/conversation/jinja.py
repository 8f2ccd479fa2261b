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

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, TemplateError, nodes
from tokenizers import Tokenizer

from colossal_llama.conversation.control_tokens import (
    RENAMED,
    is_mark,
    is_tag,
    plain_copy,
    rename_special_tokens,
    renamed,
)
from colossal_llama.conversation.messages import Message, as_chat
from colossal_llama.corpus.records import BadRecord
from colossal_llama.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# Special tokens, or lists of them, by the names that a chat template has for them.
TemplateTokens = tuple[tuple[str, str | tuple[str, ...]], ...]
OPEN, CLOSE, QUOTE = "\ufdd0", "\ufdd1", "\ufdd2"
MARKS = re.compile(f"[{OPEN}-{RENAMED}]")
GENERATION = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")
# Some templates write today's date, and the output would depend on it; this is LLaMA 3.1's own default.
DATE = datetime(2024, 7, 26)
DATE_STRING = "26 Jul 2024"
# Statements that write what is in them where they stand, or write nothing.
WRITING = (
    *(nodes.Output, nodes.For, nodes.If, nodes.With, nodes.Assign, nodes.ExprStmt),
    *(nodes.Break, nodes.Continue),
)
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


class Refused(BadRecord):
    """The template raised an error for these messages."""

    def __init__(self, error: Exception) -> None:
        super().__init__(REFUSED, f"the chat template refuses it: {error}")


class JinjaTemplate:
    """The tokenizer's own template, with track kept of answers and special tokens (see above).

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
        # Then marks change nothing else, and what is between them need not be rendered without them too.
        self.only_adds_marks = (
            self.marked_template is not None
            and MARKS.search(template) is None
            and only_writes(self.marked_template)
        )

    @classmethod
    def of_tokenizer(
        cls, tokenizer: PreTrainedTokenizerBase, llama_version: int | None = None
    ) -> JinjaTemplate:
        """The template that the tokenizer has; `UserError` if it has none. The version says nothing here."""
        where = f"--chat_template: {tokenizer.name_or_path}"
        if not tokenizer.is_fast:
            raise UserError(f"{where}: {type(tokenizer).__name__} is not a fast tokenizer")
        try:
            template = tokenizer.get_chat_template()
        except ValueError:
            raise UserError(f"{where}: this tokenizer has no chat template; leave the flag out") from None
        return cls(tokenizer, template)

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the messages and of what the template writes before an answer.

        The strings of special tokens inside messages are plain text. Raises `UserError`.
        """
        return self._encode_for_inference(messages, add_generation_prompt=True)

    def find_end_ids(self) -> set[int]:
        """The special token that the template writes after an answer, if it writes one.

        It need not be the tokenizer's EOS: LLaMA-3 base tokenizers have another one.
        """
        question, answer = Message("human", "a"), Message("assistant", "b")
        prompt = self._encode_for_inference([question], add_generation_prompt=True)
        full = self._encode_for_inference([question, answer], add_generation_prompt=False)
        special_ids = set(self.tokenizer.convert_tokens_to_ids(self.special_tokens))
        return set([token_id for token_id in full[len(prompt) :] if token_id in special_ids][:1])

    def _encode_for_inference(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
        if any(MARKS.search(message.content) for message in messages):
            raise UserError("the prompt holds a Unicode noncharacter (U+FDD0 to U+FDD3); leave it out")
        try:
            rendered = self.render(messages, False, add_generation_prompt)
        except BadRecord as error:
            raise UserError(f"--chat_template: {error}") from None
        return self.encode_rendered([rendered])[0].ids

    def check(self) -> None:
        """Raises `UserError` when preparation can't use it: other ids than transformers, or no exact mask."""
        probe = [Message("human", "a"), Message("assistant", "b")] * 2
        try:
            (encoding,) = self.encode_rendered([self.render(probe)])
            if encoding.ids != self.apply(probe, tokenize=True):
                raise BadRecord(
                    "other ids",
                    "apply_chat_template gives other ids than its tokenizer.json; take split_special_tokens, "
                    "if it is there, out of its tokenizer_config.json",
                )
        except BadRecord as error:
            raise UserError(f"--chat_template: {self.tokenizer.name_or_path}: {error}") from None

    def tokens(self) -> TemplateTokens:
        """The special tokens that the template may name."""
        names = self.tokenizer.special_tokens_map.items()
        return tuple(sorted((k, v if isinstance(v, str) else tuple(v)) for k, v in names))

    @cached_property
    def backend(self) -> Tokenizer:
        """The tokenizer as `apply_chat_template` uses it. Without its post-processor, which only adds tokens
        and trims spaces from offsets, every character belongs to the token that it came from.
        """
        return plain_copy(self.tokenizer.backend_tokenizer.to_str())

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
        if with_spans and self.only_adds_marks:
            assert not add_generation_prompt, "a prompt has no answers to find"
            text, spans = self._render_marked(messages)
        else:
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
            marked_text, spans = self._render_marked(messages)
            if marked_text != text:
                raise BadRecord(
                    "answers not marked",
                    "the chat template changes what is between its {% generation %} marks after it is "
                    "written",
                )
            return spans
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

    def _render_marked(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """What the template writes with marks, without them, and where the answers are in it."""
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
        # An answer without content is left out: there is nothing in it to learn but silence.
        return "".join(parts), [span for span, answer in zip(spans, answers, strict=True) if answer.content]

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
        try:
            (result,) = self.tokenizer.apply_chat_template(
                [
                    as_chat(messages)
                ],  # a batch, which transformers also takes when there is no message in it yet
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


def only_writes(template: str) -> bool:
    """Whether a template with marks writes from beginning to end, and never takes what it wrote for a value.

    Such are templates of conditions, loops, assignments and output. Others may put what they write into a
    variable or through a filter first: by a block, a macro, or a loop that calls itself. The marks have to be
    constants of their own: a tag may also have been replaced inside of a string, or of raw text.
    """
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except TemplateError:
        return False
    constants = [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    raw = [node.data for node in tree.find_all(nodes.TemplateData)]
    if any(MARKS.search(text) for text in [*raw, *(c for c in constants if c not in (OPEN, CLOSE))]):
        return False
    return all(
        isinstance(node, WRITING) and not getattr(node, "recursive", False)
        for node in tree.find_all(nodes.Stmt)
    )


def _common_prefix(first: str, second: str) -> str:
    length = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        length += 1
    return first[:length]


def _mark_generation(tag: re.Match[str]) -> str:
    """Two tags around a mark for one `{% generation %}`.

    White space on both sides is treated as before, and what is set inside is not seen outside.
    """
    left, end, right = tag.groups()
    first, mark, second = ("endif", CLOSE, "endwith") if end else ("with", OPEN, "if true")
    return f"{{%{left} {first} %}}{{{{ '{mark}' }}}}{{% {second} {right}%}}"

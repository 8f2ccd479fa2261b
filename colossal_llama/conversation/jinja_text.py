"""A form as a Jinja chat template, for `apply_chat_template` and every program that reads such templates.

Answers stand between `{% generation %}` marks. Only what other implementations of Jinja (llama.cpp's, for
instance) know is used. No white space of the text itself is written: tags eat what is before them.

The LLaMA-2 template of this suite, where the tokenizer adds no space behind a special token:

    {%- set turns = messages %}
    {%- set system = "A chat between … questions." %}
    {%- if messages and messages[0]['role'] == "system" %}
    …
    {%- for message in turns %}
    {%- set before = opening if loop.first else "" %}
    {%- if message['role'] == "user" %}
    {{- " " + before + "Human: <s>" + (" " + content if content else "") + "</s>" }}
    …
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from colossal_llama.conversation.form import CONTENT, NO_SYSTEM, NOT_ALTERNATING, Form
from colossal_llama.conversation.stretches import StretchRule

UNKNOWN_ROLE = "a role other than user and assistant, or a system message that is not the first"
BEFORE = "\ufdd5"  # stands for the text before the first turn, as `CONTENT` for what is said
FILLED = "\ufdd6"  # stands for what is said, where it is not empty
VARIABLES = {CONTENT: "content", BEFORE: "before", FILLED: "content"}


def write_jinja(form: Form, controls: Sequence[str], rule: StretchRule, marker: str = "") -> str:
    """The chat template.

    Args:
        controls: the special tokens in the form's texts.
        rule: how a text behind a special token is to be written.
        marker: a comment at the beginning.
    """
    writer = _Writer(controls, rule)
    is_open = bool(form.system) and not form.system_inside and not writer.ends_with_control(form.system)
    keeps_text = is_open or form.system_inside  # of the system message, for the first turn
    trim = " | trim" if form.trims else ""
    system_trim = "" if form.system_inside else trim
    lines = [f"{{#- {marker} -#}}"] if marker else []
    lines += [
        "{%- set turns = messages %}",
        f"{{%- set system = {_quote(form.default_system or '')} %}}",
        "{%- if messages and messages[0]['role'] == \"system\" %}",
        f"{{%- set system = messages[0]['content']{system_trim} %}}",
        "{%- set turns = messages[1:] %}",
        "{%- endif %}",
    ]
    if form.opening:
        lines.append(f"{{{{- {_quote(form.opening)} }}}}")
    if keeps_text:
        before, after = form.system.split(CONTENT)
        text = " + ".join([_quote(before)] * bool(before) + ["system"] + [_quote(after)] * bool(after))
        lines.append(f'{{%- set opening = {text} if system else "" %}}')
    elif form.system:
        system = writer.write(form.system, "system")
        lines.append(f"{{%- if system %}}{system}{{%- endif %}}")
    else:
        lines.append(f"{{%- if system %}}{{{{- raise_exception({_quote(NO_SYSTEM)}) }}}}{{%- endif %}}")
    lines.append("{%- for message in turns %}")
    if form.alternates:
        lines.append(
            "{%- if (message['role'] == \"user\") != (loop.index0 % 2 == 0) %}"
            f"{{{{- raise_exception({_quote(NOT_ALTERNATING)}) }}}}{{%- endif %}}"
        )
    content = "message['content']"
    if form.system_inside:
        lines.append('{%- set before = opening if loop.first else "" %}')
        content = f"(before + {content})"
    elif is_open:
        lines.append('{%- set before = opening if loop.first else "" %}')
    lead = BEFORE if is_open else ""
    goes_on = not writer.ends_with_control(form.human)
    assert form.alternates or not goes_on, "an answer may not follow where its text would not go on"
    header_goes_on = not writer.ends_with_control(form.header) and bool(form.header)
    answer = writer.write(form.answer.replace(CONTENT, FILLED), goes_on=goes_on or header_goes_on)
    silence = writer.write(form.answer.replace(CONTENT, ""), goes_on=goes_on or header_goes_on)
    lines += [
        f"{{%- set content = {content}{trim} %}}",
        "{%- if message['role'] == \"user\" %}",
        writer.write(lead + form.human),
        "{%- elif message['role'] == \"assistant\" %}",
        writer.write(lead + form.header, goes_on=goes_on),
        f"{{%- if content %}}{{% generation %}}{answer}{{% endgeneration %}}",
        f"{{%- else %}}{silence}{{%- endif %}}",
        "{%- else %}",
        f"{{{{- raise_exception({_quote(UNKNOWN_ROLE)}) }}}}",
        "{%- endif %}",
        "{%- endfor %}",
    ]
    if form.header:
        lines.append("{%- if add_generation_prompt %}")
        if is_open:
            lines.append('{%- set before = "" if turns else opening %}')
        lines += [writer.write(lead + form.header, goes_on=goes_on), "{%- endif %}"]
    return "\n".join(line for line in lines if line)


class _Writer:
    """Writes a form's texts as Jinja expressions."""

    def __init__(self, controls: Sequence[str], rule: StretchRule) -> None:
        self.controls = set(controls)
        self.rule = rule
        pattern = "|".join(map(re.escape, sorted(controls, key=len, reverse=True)))
        self.pattern = re.compile(f"({pattern})")

    def ends_with_control(self, text: str) -> bool:
        return any(text.endswith(control) for control in self.controls)

    def write(self, text: str, content: str = "content", goes_on: bool = False) -> str:
        """Statements that output a text.

        Args:
            content: the variable that `CONTENT` stands for.
            goes_on: whether it is not at the beginning of a stretch.
        """
        statements, terms = [], []
        for number, part in enumerate(self.pattern.split(text)):
            if not part:
                continue
            if part in self.controls:
                terms.append(part)
            elif number == 0 and goes_on:
                terms += _atoms(part)
            else:
                more, written = self._begin_stretch(_atoms(part), content)
                statements += more
                terms += written
        if not terms:
            return ""
        expression = " + ".join(_merge(terms, content))
        return "".join(statements) + f"{{{{- {expression} }}}}"

    def _begin_stretch(self, atoms: list[str], content: str) -> tuple[list[str], list[str]]:
        """Statements to go before, and the terms of the stretch with the space that the rule wants."""
        if not self.rule.adds_space:
            return [], atoms
        first, exempt = atoms[0], self.rule.exempt
        is_open_ended = first in VARIABLES or any(word.startswith(first) for word in exempt)
        if not is_open_ended:
            return [], [self.rule.write(first), *atoms[1:]]
        is_filled = any(atom not in (CONTENT, BEFORE) for atom in atoms)
        if not exempt and is_filled:
            return [], [" ", *atoms]
        statements = []
        name = _merge(atoms, content)[0]
        if len(atoms) > 1:
            name = "text"
            statements.append(f"{{%- set text = {' + '.join(_merge(atoms, content))} %}}")
        conditions = [] if is_filled else [f"not {name}"]
        conditions += [f"{name}.startswith({_quote(word)})" for word in exempt]
        if not exempt:
            return statements, [_raw(f'(" " + {name} if {name} else "")')]
        return statements, [_raw(f'({name} if {" or ".join(conditions)} else " " + {name})')]


class _raw(str):
    """A term that is an expression already."""


def _atoms(text: str) -> list[str]:
    return [part for part in re.split(f"([{CONTENT}{BEFORE}{FILLED}])", text) if part]


def _merge(terms: Sequence[str], content: str) -> list[str]:
    """Terms as expressions, neighbouring texts as one."""
    expressions: list[str] = []
    text = ""
    for term in [*terms, None]:
        if term is not None and not isinstance(term, _raw) and term not in VARIABLES:
            text += term
            continue
        if text:
            expressions.append(_quote(text))
            text = ""
        if term is not None:
            is_raw = isinstance(term, _raw)
            expressions.append(str(term) if is_raw else content if term == CONTENT else VARIABLES[term])
    return expressions


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)

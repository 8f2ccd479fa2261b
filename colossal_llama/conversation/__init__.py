"""Conversations and the templates that turn them into tokens, for data preparation and inference alike.

A new template is a class in a file of its own (see `template.py`), and a line here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from colossal_llama.utils.registry import look_up

if TYPE_CHECKING:
    from colossal_llama.conversation.template import Template

# Name -> module and class. Names alone, so that only what is used is imported.
TEMPLATES = {
    "colossal": "colossal_llama.conversation.colossal:ColossalTemplate",
    "llama2": "colossal_llama.conversation.llama2:Llama2Template",
    "llama3": "colossal_llama.conversation.llama3:Llama3Template",
    "tokenizer": "colossal_llama.conversation.jinja:JinjaTemplate",
}


def find_template(name: str) -> type[Template]:
    """The class of a template."""
    return look_up(TEMPLATES, name)

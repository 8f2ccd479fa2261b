"""Every message that docs/troubleshooting.md quotes is one that the code can still print."""

from __future__ import annotations

import ast
import re

import pytest
from support import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
LIBRARIES = "## Messages of libraries"
# Stands in a message of the code where a value is filled in.
VALUE = "\0"


def code_messages() -> list[str]:
    """Strings of the package and the scripts, joined as Python joins them, docstrings left out; lines of the
    launch scripts.
    """
    files = [*ROOT.glob("*.py"), *(ROOT / "colossal_llama").rglob("*.py")]
    messages = []
    for path in files:
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if id(node) in docstrings:
                continue
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                messages.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else VALUE for part in node.values)
                messages.append("".join(map(str, parts)))
    for path in (ROOT / "examples" / "launch").glob("*.sh"):
        messages += path.read_text(encoding="utf-8").splitlines()
    return messages


def documented_messages() -> list[str]:
    text = PAGE.read_text(encoding="utf-8").partition(LIBRARIES)[0]
    return re.findall(r"^\| `([^`]+)`", text, flags=re.MULTILINE)


def to_pattern(message: str) -> re.Pattern:
    """`…` is whatever the code fills in; the message may be a part of a longer one."""
    return re.compile(r"[^`]*?".join(map(re.escape, message.split("…"))), flags=re.DOTALL)


MESSAGES = code_messages()


def test_the_page_has_messages() -> None:
    assert LIBRARIES in PAGE.read_text(encoding="utf-8")
    assert len(documented_messages()) > 40


@pytest.mark.parametrize("message", documented_messages())
def test_message_is_in_the_code(message: str) -> None:
    pattern = to_pattern(message)
    assert any(pattern.search(text) for text in MESSAGES), f"the code has no such message: {message}"

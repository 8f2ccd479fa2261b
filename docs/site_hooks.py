"""Lets mkdocs read the pages as GitHub does, with links to any file of the clone.

A page links to files outside docs/ by their place in the clone (`../benchmarks/run.sh`), and so do README.md
and CHANGELOG.md. In the site these files are pages below `clone/`: Markdown as it is, pictures as files,
other text as a block of code. Files that nothing links to are left out.
"""

from __future__ import annotations

import os
import posixpath
import re
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

CLONE = Path(__file__).resolve().parents[1]
DOCS = "docs/"
PICTURES = (".png", ".svg", ".jpg", ".jpeg")
# Reached from the navigation.
ENTRANCES = ("CHANGELOG.md",)
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.mdx_configs["toc"]["slugify"] = github_anchor
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what the pages link to, and what that links to."""
    waiting = [DOCS + file.src_uri for file in files.documentation_pages()] + list(ENTRANCES)
    added = set(waiting) - set(ENTRANCES)
    while waiting:
        name = waiting.pop()
        if name not in added:
            added.add(name)
            files.append(make_file(name, config))
        if name.endswith(".md"):
            text = (CLONE / name).read_text(encoding="utf-8")
            waiting += [linked for linked in linked_files(name, text) if linked not in added]
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    name = name_in_clone(page.file.src_uri)
    if not name.endswith(".md"):
        return markdown

    def moved(match: re.Match) -> str:
        begin, path, anchor, end = match.groups()
        linked = linked_file(name, path)
        if linked is None:
            return match[0]
        target = posixpath.relpath(place_in_site(linked), posixpath.dirname(page.file.src_uri) or ".")
        return f"{begin}{target}{anchor or ''}{end}"

    def as_here(text: str) -> str:
        return plain_pipes_in_code(LINK.sub(moved, text))

    return outside_of_code_blocks(markdown, as_here)


def make_file(name: str, config: MkDocsConfig) -> File:
    path = CLONE / name
    if name.endswith((".md", *PICTURES)):
        return File.generated(config, place_in_site(name), abs_src_path=str(path))
    language = {".py": "python", ".sh": "bash", ".yaml": "yaml"}.get(path.suffix, "text")
    text = path.read_text(encoding="utf-8")
    return File.generated(
        config, place_in_site(name), content=f"# `{name}`\n\n````{language}\n{text.rstrip()}\n````\n"
    )


def linked_files(name: str, text: str) -> Iterator[str]:
    text = outside_of_code_blocks(text, lambda part: part, inside="")
    for match in LINK.finditer(text):
        linked = linked_file(name, match[2])
        if linked is not None and not linked.startswith(DOCS):
            if not (CLONE / linked).is_file():
                raise PluginError(f"{name}: {match[2]} is no file of the clone")
            yield linked


def linked_file(name: str, path: str) -> str | None:
    """Where a link of the file `name` leads, as a path in the clone; None for other sites."""
    if re.match(r"[a-z]+:", path):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), path))


def place_in_site(name: str) -> str:
    if name.startswith(DOCS):
        return name.removeprefix(DOCS)
    is_as_it_is = name.endswith((".md", *PICTURES))
    return f"clone/{name}" if is_as_it_is else f"clone/{name}.md"


def name_in_clone(src_uri: str) -> str:
    """Of a page whose Markdown is a file; one that was made from code has a name without `.md`."""
    if not src_uri.startswith("clone/"):
        return DOCS + src_uri
    name = src_uri.removeprefix("clone/")
    return name if os.path.exists(CLONE / name) else name.removesuffix(".md")


def outside_of_code_blocks(text: str, change: Callable[[str], str], inside: str | None = None) -> str:
    """Changes everything but blocks of code, which become `inside` where that is given."""
    parts = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)
    blocks = (part if inside is None else inside for part in parts[1::2])
    changed = [change(part) for part in parts[::2]]
    return changed[0] + "".join(block + rest for block, rest in zip(blocks, changed[1:], strict=True))


def plain_pipes_in_code(text: str) -> str:
    r"""GitHub needs `\|` inside code in a table, mkdocs shows the backslash."""
    rows = re.compile(r"^\|.*$", flags=re.MULTILINE)
    return rows.sub(lambda row: re.sub(r"`[^`]*`", lambda code: code[0].replace(r"\|", "|"), row[0]), text)


def github_anchor(heading: str, separator: str) -> str:
    """`stats.json & more` -> `statsjson--more`"""
    text = unicodedata.normalize("NFC", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", separator)

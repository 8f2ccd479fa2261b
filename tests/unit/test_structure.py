"""The shape of the package: which room may use which, and what may be known where."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from colossal_llama.training.plugins import PLUGINS

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "colossal_llama"
# A room may import from those above it in this list.
LAYERS = (
    "utils",
    "upstream",
    "corpus",
    "conversation",
    "tokenizer",
    "model",
    "dataset",
    "training",
    "inference",
    "evaluation",
    "launch",
)
# The files where arguments are parsed; a Namespace leaves none of them.
PARSING = {"utils/arguments.py", "utils/settings.py"}


@cache
def modules() -> dict[str, Path]:
    """Dotted name below the package -> file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        found[name] = path
    return found


def imports_of(path: Path, only_at_import: bool = False) -> set[str]:
    """Modules of the package that a file imports; those for type checkers alone are left out.

    Args:
        only_at_import: leave out what functions import when they are called.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        is_typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if is_typing or (only_at_import and is_function):
            skipped.update(ast.walk(node))
    found = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("colossal_llama"):
            module = node.module.removeprefix("colossal_llama").removeprefix(".")
            for alias in node.names:
                inner = f"{module}.{alias.name}".removeprefix(".")
                found.add(inner if inner in modules() else module)
    return found - {""}


def test_no_room_uses_one_above_it() -> None:
    """A program that nothing imports may use every room, wherever its users look for it."""
    imported = set().union(*(imports_of(path) for path in modules().values()))
    upward = [
        f"{name} imports {other}"
        for name, path in modules().items()
        if name in imported or "__main__" not in path.read_text(encoding="utf-8")
        for other in sorted(imports_of(path))
        if LAYERS.index(name.split(".")[0] or "utils") < LAYERS.index(other.split(".")[0])
        and name.split(".")[0] in LAYERS
    ]
    assert upward == []


def test_no_circle_of_imports() -> None:
    graph = {name: imports_of(path) for name, path in modules().items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"a circle: {' -> '.join([*trail[trail.index(name) :], name])}"
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_plugins_are_known_by_name_in_their_room_alone() -> None:
    names = set(PLUGINS)
    comparisons = []
    for name, path in modules().items():
        if name.startswith("training.plugins"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                constants = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant)}
                if constants & names:
                    comparisons.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert comparisons == []


def functions_with_namespace(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            annotations = [each.annotation for each in (*node.args.args, *node.args.kwonlyargs)]
            if any("Namespace" in ast.unparse(a) for a in (*annotations, node.returns) if a is not None):
                found.append(node.name)
    return found


@pytest.mark.parametrize("name", sorted(modules()))
def test_a_namespace_stays_where_arguments_are_parsed(name: str) -> None:
    path = modules()[name]
    relative = path.relative_to(PACKAGE).as_posix()
    if relative in PARSING or path.name in ("arguments.py", "options.py"):
        return
    assert functions_with_namespace(path) == []

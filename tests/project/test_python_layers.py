"""The rooms of python/llama_flash: arrows between modules only go down, none imports in a circle, and none is long.

Imports are read, not run: those within functions and those for type checkers count, too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from repository import ROOT

PYTHON = ROOT / "python"
PACKAGE = "llama_flash"

# from the bottom to the top; a room may import from itself and from those before it
ROOMS = (
    "",
    "native",
    "budget",
    "model",
    "device",
    "observe",
    "prompts",
    "planning",
    "drafts",
    "workers",
    "session",
    "server",
    "batch",
    "cli",
)  # "": words

# modules that only say where something is: names that users and llama_cpp import (docs/explanation/architecture.md)
DOORS = {
    "chat_template": "model.chat_template",
    "controller": "budget.controller",
    "cost": "planning.cost",
    "cpu": "native.cpu",
    "device_profile": "device.profile",
    "engine": "native.library",
    "model_load": "model.load",
    "offload": "session.session",
    "pictures": "observe.pictures",
    "planner": "planning.planner",
    "simulate": "observe.simulate",
    "snapshot": "observe.snapshot",
    "stats": "observe.stats",
    "threads": "budget.cores",
    "trace": "observe.trace",
    "turns": "session.turns",
}

LONGEST_FUNCTION, LONGEST_FILE = 60, 600  # lines
REASON = "\n\nLong: "  # begins the paragraph of a file's head that says why something in it is longer
GENERATED = "do not edit"


@dataclass(frozen=True)
class Edge:
    """One import."""

    importer: str  # module, without the package
    imported: str
    line: int

    def __str__(self) -> str:
        return f"{name_of(self.importer)}, line {self.line}, imports {name_of(self.imported)}"


def name_of(module: str) -> str:
    return f"{PACKAGE}.{module}".rstrip(".")


@cache
def modules() -> dict[str, Path]:
    found = {}
    for path in sorted((PYTHON / PACKAGE).rglob("*.py")):
        parts = path.relative_to(PYTHON / PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room_of(module: str) -> str:
    """The folder; "" of the words at the top."""
    return module.split(".")[0] if "." in module or modules()[module].name == "__init__.py" else ""


def imports(path: Path, module: str) -> Iterator[tuple[str, int]]:
    """Absolute names of what a file imports. Of `from a import b` that is a.b: a module, or a name of module a."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = name_of(package).split(".")
                base = ".".join([*above[: len(above) - node.level + 1], *([node.module] if node.module else [])])
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


@cache
def edges() -> tuple[Edge, ...]:
    """Between the modules of the package."""
    found = []
    for module, path in modules().items():
        for name, line in imports(path, module):
            if name != PACKAGE and not name.startswith(f"{PACKAGE}."):
                continue
            inside = name.removeprefix(PACKAGE).removeprefix(".")
            while inside not in modules():  # a name of that module
                inside = inside.rpartition(".")[0]
            found.append(Edge(module, inside, line))
    return tuple(found)


def test_every_room_has_its_place() -> None:
    assert {room_of(module) for module in modules()} == set(ROOMS)


def test_arrows_only_go_down() -> None:
    wrong = []
    for edge in edges():
        if edge.importer in ("", "__main__", *DOORS):  # what users import
            continue
        up = ROOMS.index(room_of(edge.imported)) > ROOMS.index(room_of(edge.importer))
        if up or edge.imported in ("", "__main__", *DOORS):
            wrong.append(str(edge))
    assert not wrong, "an arrow that points up:\n" + "\n".join(wrong)


def test_no_module_imports_in_a_circle() -> None:
    arrows: dict[str, dict[str, Edge]] = {}
    for edge in edges():
        if edge.importer != edge.imported:
            arrows.setdefault(edge.importer, {}).setdefault(edge.imported, edge)
    done: set[str] = set()

    def visit(module: str, way: list[Edge]) -> list[Edge]:
        """The edges of a circle that is reached from here."""
        if module in done:
            return []
        for begin, edge in enumerate(way):
            if edge.importer == module:
                return way[begin:]
        for edge in arrows.get(module, {}).values():
            if circle := visit(edge.imported, [*way, edge]):
                return circle
        done.add(module)
        return []

    for module in modules():
        circle = visit(module, [])
        assert not circle, "a circle:\n" + "\n".join(map(str, circle))


def test_llama_flash_imports_nothing_that_imports_it() -> None:
    above = [
        f"{name_of(module)}, line {line}, imports {name}"
        for module, path in modules().items()
        for name, line in imports(path, module)
        if name.split(".")[0] == "gguf_tools"
    ]
    assert not above, "an arrow that points up:\n" + "\n".join(above)


def test_ctypes_are_in_one_room() -> None:
    outside = [
        f"{name_of(module)}, line {line}"
        for module, path in modules().items()
        if room_of(module) != "native"
        for name, line in imports(path, module)
        if name.split(".")[0] == "ctypes"
    ]
    assert not outside, "ctypes outside of native/:\n" + "\n".join(outside)


@pytest.mark.parametrize("door", DOORS)
def test_a_door_leads_to_one_module_and_does_nothing_else(door: str) -> None:
    body = ast.parse(modules()[door].read_text(encoding="utf-8")).body
    says, leads, names = body
    assert isinstance(says, ast.Expr) and isinstance(leads, ast.ImportFrom) and isinstance(names, ast.Assign)
    assert leads.level == 1 and leads.module == DOORS[door]
    assert sorted(ast.literal_eval(names.value)) == sorted(alias.name for alias in leads.names)


def test_all_modules_at_the_top_are_words_or_doors() -> None:
    """Words need no room: whatever is a door is in the list."""
    words = {module for module in modules() if module and room_of(module) == "" and module not in DOORS}
    assert words - {"__main__"} == {
        *("addresses", "archives", "errors", "file_kind", "kept_files", "options", "sizes", "version", "whole_files"),
    }


@pytest.mark.parametrize("module", sorted(modules()), ids=name_of)
def test_nothing_is_long_without_a_reason(module: str) -> None:
    text = modules()[module].read_text(encoding="utf-8")
    tree = ast.parse(text)
    head = ast.get_docstring(tree, clean=False) or ""
    long = [
        f"{node.name} in line {node.lineno} has {n} lines"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (n := (node.end_lineno or 0) - node.lineno + 1) > LONGEST_FUNCTION
    ]
    if (n := text.count("\n")) > LONGEST_FILE:
        long.append(f"it has {n} lines")
    if GENERATED in head:
        return
    if REASON in head:
        assert long, f"{modules()[module]}: nothing in it is long any more: its head says so still"
        return
    assert not long, f"{modules()[module]}: {'; '.join(long)}: divide it, or say why in the file's head (Long: ...)"

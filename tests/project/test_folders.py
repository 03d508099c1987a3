"""The folders of ci/ and tests/: each has its line in the README beside it, and imports do not cross them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from repository import ROOT, SUPPORT, TESTS

MODULES = sorted(path for path in TESTS.glob("*/*.py"))
SHARED = {path.stem for path in SUPPORT.glob("*.py")} | {"conftest"}


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("place", ["ci", "tests"])
def test_every_folder_has_a_line_in_the_readme(place: str) -> None:
    named = re.findall(r"^\| `(\w+)/` \|", (ROOT / place / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    there = [path.name for path in (ROOT / place).iterdir() if path.is_dir() and path.name[0] not in "._"]
    assert sorted(named) == sorted(there)


def test_every_test_lies_in_a_folder_under_a_name_of_its_own() -> None:
    assert not list(TESTS.glob("test_*.py")) and not list(SUPPORT.glob("test_*.py"))
    names = [path.name for path in MODULES]
    assert len(names) == len(set(names))


def test_tests_import_from_support_and_from_their_own_folder() -> None:
    tests = {path.stem: path for path in MODULES if path.parent != SUPPORT}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in MODULES
        for name in imported(path)
        if name not in SHARED and name in tests and tests[name].parent != path.parent
    ]
    assert not wrong, "\n".join(wrong)


def test_what_measures_does_not_import_what_shows() -> None:
    """ci/tools uses ci/bench, and never the other way."""
    shown = {path.stem for path in (ROOT / "ci/tools").iterdir()}
    wrong = [path for path in (ROOT / "ci/bench").rglob("*.py") if shown & set(imported(path))]
    assert not wrong, wrong

"""The names that users, the documentation and the patches import are there, and are what is used inside."""

from __future__ import annotations

import importlib
import re

import pytest
from repository import ROOT

import llama_flash
from llama_flash.budget import rooms

IMPORT = re.compile(r"^\+? *from (llama_flash(?:\.\w+)*) import ([\w, ]+)", re.MULTILINE)
TITLE = re.compile(r"^### `(llama_flash(?:\.\w+)+)`$", re.MULTILINE)


def imported() -> list[tuple[str, str]]:
    """Module and name of each import in a patch, or in the documentation."""
    pages = [*ROOT.glob("patches/*.patch"), ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
    found = set()
    for page in pages:
        for module, names in IMPORT.findall(page.read_text(encoding="utf-8")):
            found |= {(module, name.split(" as ")[0].strip()) for name in names.split(",")}
    return sorted(found)


def test_patches_and_pages_import_something() -> None:
    modules = {module for module, _ in imported()}
    assert {"llama_flash.cpu", "llama_flash.engine", "llama_flash.offload", "llama_flash.trace"} <= modules


@pytest.mark.parametrize(("module", "name"), imported(), ids=".".join)
def test_what_patches_and_pages_import_is_there(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name)


def test_what_the_reference_names_is_there() -> None:
    (page,) = ROOT.glob("docs/**/api.md")
    titles = TITLE.findall(page.read_text(encoding="utf-8"))
    assert len(titles) > 20
    for title in titles:
        module, _, name = title.rpartition(".")
        assert hasattr(importlib.import_module(module), name), title


def test_names_of_earlier_versions_are_the_same_things() -> None:
    from llama_flash.cost import Cost
    from llama_flash.offload import FlashSession
    from llama_flash.planner import Option
    from llama_flash.planning import cost, planner
    from llama_flash.session import session

    assert Option is planner.Option and Cost is cost.Cost and FlashSession is session.FlashSession
    assert llama_flash.budget.Budget is rooms.Budget
    assert llama_flash.plan is planner.plan, "a function, also when the module planner is loaded"

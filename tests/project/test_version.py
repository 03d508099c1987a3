"""The version is said once, in pyproject.toml: whatever repeats it says the same."""

from __future__ import annotations

import re

import pytest
from repository import ROOT

import llama_flash


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def whole() -> tuple[str, str]:
    """The engine's version, and ours."""
    match = re.search(r'^version = "([\d.]+)\+flash\.([\d.]+)"$', text("pyproject.toml"), re.MULTILINE)
    assert match
    return match[1], match[2]


def test_the_python_package_has_it() -> None:
    assert llama_flash.__version__ == whole()[1]  # test_bindings.py compares the plugin's with this one


def test_the_engine_s_part_is_that_of_the_pin() -> None:
    engine, _ = whole()
    assert re.search(rf"^llama-cpp-python=={re.escape(engine)} ", text("ci/engine/requirements.txt"), re.MULTILINE)


@pytest.mark.parametrize("name", ["README.md", "docs/reference/api.md", "ci/tools/api_reference.py"])
def test_pages_have_it_whole(name: str) -> None:
    assert set(re.findall(r"[\d.]+\+flash\.[\d.]+", text(name))) == {"+flash.".join(whole())}


def test_the_changelog_begins_with_it() -> None:
    heading = re.search(r"^## (\S+)$", text("CHANGELOG.md"), re.MULTILINE)
    assert heading and heading[1] == whole()[1]

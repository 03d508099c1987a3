"""The version is said once, in pyproject.toml: whatever repeats it says the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from repository import ROOT

import llama_flash
from llama_flash.native import bindings

BUILT = ["ci/engine/CMakeLists.txt", *(f"plugin/{kind}" for kind in ("CMakeLists.txt", "**/*.h", "**/*.cpp"))]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def whole() -> tuple[str, str]:
    """The engine's version, and ours."""
    match = re.search(r'^version = "([\d.]+)\+flash\.([\d.]+)"$', text("pyproject.toml"), re.MULTILINE)
    assert match
    return match[1], match[2]


def test_the_python_package_has_it() -> None:
    assert llama_flash.__version__ == whole()[1]


def test_the_plugin_has_it() -> None:
    """CMake reads it from pyproject.toml, and the compiler gets it as a definition."""
    told = re.match(r"llama-flash (\S+), ", bindings.load().llama_flash_build_info().decode())
    assert told and told[1] == whole()[1]


@pytest.mark.parametrize("file", sorted(path for name in BUILT for path in ROOT.glob(name)), ids=lambda path: path.name)
def test_no_source_of_the_plugin_says_it_again(file: Path) -> None:
    said = re.findall(r"\d+\.\d+\.\d+", file.read_text(encoding="utf-8"))
    assert not said, f"{file} has {said}: LLAMA_FLASH_VERSION is the version"


def test_the_engine_s_part_is_that_of_the_pin() -> None:
    engine, _ = whole()
    assert re.search(rf"^llama-cpp-python=={re.escape(engine)} ", text("ci/engine/requirements.txt"), re.MULTILINE)


@pytest.mark.parametrize("name", ["README.md", "docs/reference/api.md", "ci/tools/api_reference.py"])
def test_pages_have_it_whole(name: str) -> None:
    assert set(re.findall(r"[\d.]+\+flash\.[\d.]+", text(name))) == {"+flash.".join(whole())}


def test_the_changelog_begins_with_it() -> None:
    heading = re.search(r"^## (\S+)$", text("CHANGELOG.md"), re.MULTILINE)
    assert heading and heading[1] == whole()[1]

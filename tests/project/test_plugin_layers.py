"""The plugin's arrows point one way: no circle of files, no folder that reaches above itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from plugin_parts import PLUGIN

SRC = PLUGIN / "src"
TOP = "."  # what belongs to the session, and the C interface

# what a folder may include, beside its own files
BELOW: dict[str, set[str]] = {
    "base": set(),
    "memory": {"base"},
    "io": {"base", "memory"},
    "kernels": {"base"},
    "store": {"base", "memory", "io", "kernels"},
    "ops": {"base", "memory", "io", "kernels", "store"},
    TOP: {"base", "memory", "io", "kernels", "store", "ops"},
    "observe": {"base", "memory", "io", "kernels", "store", "ops", TOP},
}
FILES = sorted(path.relative_to(SRC) for path in SRC.rglob("*") if path.suffix in (".h", ".cpp"))


def includes(file: Path) -> list[str]:
    return re.findall(r'^#include [<"]([^">]+)[">]', (SRC / file).read_text(), re.MULTILINE)


def ours(file: Path) -> list[Path]:
    return [Path(name) for name in includes(file) if (SRC / name).is_file()]


def folder(file: Path) -> str:
    return file.parts[0] if len(file.parts) > 1 else TOP


def test_each_folder_is_known_and_says_what_lives_in_it() -> None:
    assert {folder(file) for file in FILES} == set(BELOW)
    for name in BELOW:
        assert len((SRC / name / "README.md").read_text().splitlines()) <= 10


@pytest.mark.parametrize("file", FILES, ids=str)
def test_no_file_reaches_above_its_folder(file: Path) -> None:
    allowed = BELOW[folder(file)] | {folder(file)}
    if file == Path("llama_flash.cpp"):
        allowed = allowed | {"observe"}
    up = [str(name) for name in ours(file) if folder(name) not in allowed]
    assert not up, f"{file} includes {up}"


@pytest.mark.parametrize("file", FILES, ids=str)
def test_our_headers_are_named_by_their_path(file: Path) -> None:
    names = {path.name for path in FILES} - {"ops.h"}
    bare = [name for name in includes(file) if name in names and not (SRC / name).is_file()]
    assert not bare, f"{file} includes {bare}"


def test_files_are_no_circle() -> None:
    """A header and its source count as one."""
    graph: dict[Path, set[Path]] = {}
    for file in FILES:
        module = file.with_suffix("")
        graph.setdefault(module, set()).update(name.with_suffix("") for name in ours(file))
    left = {module: names - {module} for module, names in graph.items()}
    while ends := [module for module, names in left.items() if not names & left.keys()]:
        for module in ends:
            del left[module]
    assert not left, f"a circle: {sorted(map(str, left))}"


def test_memory_and_reads_know_no_ggml() -> None:
    for file in FILES:
        if folder(file) in ("base", "memory", "io"):
            assert not [name for name in includes(file) if "ggml" in name], file


def test_ops_do_not_reach_the_reader() -> None:
    for file in FILES:
        if folder(file) == "ops":
            assert not [name for name in includes(file) if name.startswith("io/") and name != "io/read_queue.h"], file

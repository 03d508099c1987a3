"""Runs the programs of plugin/tests; `make sanitize` runs the same ones through ctest."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from plugin_parts import PLUGIN, built_plugin, compile_cpp, sources, uring_flags

PROGRAMS = sorted((PLUGIN / "tests").glob("*.cpp"))
# these compute with ggml: they are linked with the engine and the plugin's objects, as `make build` has left them
ON_THE_ENGINE = {
    "test_bundle_check",
    "test_device_memory",
    "test_neuron_resize",
    "test_neuron_store",
    "test_predictor",
    "test_sparse",
    "test_threads",
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that link the parts in, compiled once for all programs."""
    folder = tmp_path_factory.mktemp("parts")
    uring = uring_flags(folder)
    defines, libraries = uring[:1], uring[1:]
    objects = []
    memory = ("memory/cache", "memory/layout", "memory/mapping", "memory/ring")
    io = ("io/checksum", "io/load", "io/probe", "io/reader", "io/reader_uring", "io/reader_pread")
    for source in sources("base/status", "ops/trial", *memory, *io):
        objects.append(str(compile_cpp(folder / f"{source.stem}.o", "-c", source, *defines)))
    return [*objects, *libraries]


def test_there_are_programs() -> None:
    assert len(PROGRAMS) >= 7


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_program(program: Path, parts: list[str], tmp_path: Path) -> None:
    arguments = parts
    if program.stem in ON_THE_ENGINE:
        if not (arguments := built_plugin()):
            pytest.skip("no compiled plugin in build/cmake")
        arguments += uring_flags(tmp_path)[1:]
    binary = compile_cpp(tmp_path / program.stem, program, *arguments)
    done = subprocess.run([binary], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}{done.stderr}"

"""python/llama_flash/native/bindings.py says what the plugin's header says."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
from repository import ROOT

import llama_flash
from llama_flash.native import bindings


def test_bindings_are_generated_from_the_current_header() -> None:
    check = subprocess.run(
        [sys.executable, ROOT / "ci/tools/generate_bindings.py", "--check"], capture_output=True, text=True
    )
    assert check.returncode == 0, check.stdout + check.stderr


@pytest.mark.parametrize("structure", bindings.STRUCTURES, ids=lambda structure: structure.__name__)
def test_structures_have_no_hidden_padding(structure: type[ctypes.Structure]) -> None:
    # so their layout is the same for every compiler, and the one that ctypes computes
    assert ctypes.sizeof(structure) == sum(getattr(structure, name).size for name, *_ in structure._fields_)


def test_every_prototype_is_in_the_library() -> None:
    lib = bindings.load()
    for name, (restype, argtypes) in bindings._PROTOTYPES.items():
        function = getattr(lib, name)
        assert function.restype is restype
        assert function.argtypes == argtypes


def test_library_reports_the_version_and_the_io_engines_built_in() -> None:
    info = bindings.load().llama_flash_build_info().decode()
    assert info.startswith(f"llama-flash {llama_flash.__version__}, ")
    assert "pread" in info

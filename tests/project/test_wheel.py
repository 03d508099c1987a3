"""The wheel on other machines than the one that built it: CPUs, versions of CPython, and users' type checkers."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import llama_cpp
import pytest
from exclusive import exclusive
from repository import ROOT

LIBRARIES = Path(llama_cpp.__file__).parent / "lib"
VERSIONS = ("3.10", "3.11", "3.12", "3.13")

GENERATE = """
import importlib.resources, llama_cpp
model = importlib.resources.files("llama_flash") / "models" / "stdlib-moe-q8_0.gguf"
llm = llama_cpp.Llama(str(model), flash_offload={"what": "experts"}, n_ctx=128, n_threads=2, verbose=False)
text = llm("def read_file(path):", max_tokens=16, temperature=0)["choices"][0]["text"]
print(llm.flash.stats().mode, repr(text))
"""

USER_PROGRAM = """
import llama_cpp
import llama_flash
from gguf_tools.format import read_flash

options = llama_flash.FlashOffload(dram_budget="2GiB", what="ffn")
reveal_type(llama_flash.plan("model.gguf", "2GiB", n_ctx=2048).smallest)
reveal_type(llama_flash.run_capped("1GiB", ["true"]).peak_bytes)
llm = llama_cpp.Llama("model.gguf", flash_offload=options)
assert llm.flash is not None
reveal_type(llm.flash.stats().decode.bytes_per_token)
llama_flash.FlashOffload(what="everything")
llama_cpp.Llama("model.gguf", flash_offload=3)
"""


def run(*command: object, timeout: float = 300, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=timeout, env={**os.environ, **env}
    )


def test_users_programs_are_type_checked_against_the_installed_wheel(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(USER_PROGRAM)
    # beside nothing of this repository: what mypy finds is what is installed
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-color-output", program.name],
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "MYPYPATH")},
        capture_output=True,
        text=True,
    )
    revealed = re.findall(r'Revealed type is "(.*)"', result.stdout)
    assert revealed == ["int", "int | None", "float"], result.stdout + result.stderr
    errors = re.findall(r"error: (Argument \"\w+\") .*\[([\w-]+)\]", result.stdout)
    assert errors == [('Argument "what"', "arg-type"), ('Argument "flash_offload"', "arg-type")], result.stdout
    assert "Found 2 errors" in result.stdout


def test_import_on_a_cpu_that_lacks_something_says_what_in_one_line(tmp_path: Path) -> None:
    """The check of libraries that need AVX512ER: of CPUs with it none is made any more."""
    for library in LIBRARIES.glob("*.so"):
        (tmp_path / library.name).symlink_to(library)
    check = tmp_path / "libllama_flash_cpu.so"
    check.unlink()
    sources = [ROOT / "plugin/cpu" / name for name in ("check.cpp", "needs.cpp")]
    compiled = run("c++", "-std=c++17", "-O1", "-fPIC", "-shared", "-D__AVX512ER__", "-o", check, *sources)
    assert compiled.returncode == 0, compiled.stderr

    result = run(sys.executable, "-c", "import llama_cpp", LLAMA_CPP_LIB_PATH=str(tmp_path))
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert re.fullmatch(r"llama_flash\.errors\.FlashCpuError: this CPU has no AVX512ER, .*make wheel.*", last)

    command_line = run(sys.executable, "-m", "llama_flash", "plan", LLAMA_CPP_LIB_PATH=str(tmp_path))
    assert command_line.returncode == 1
    assert len(command_line.stderr.strip().splitlines()) == 1
    assert command_line.stderr.startswith("llama-flash: this CPU has no AVX512ER,")


@cache
def portable_wheel() -> Path:
    with exclusive("make"):
        result = run("make", "--no-print-directory", "-C", ROOT, "wheel", timeout=1800)
    assert result.returncode == 0, result.stderr
    (wheel,) = (ROOT / "dist").glob(f"*_{platform.machine()}.whl")
    return wheel


def interpreter(version: str) -> Path:
    """Of that CPython: from PATH, pyenv or uv."""
    home = Path.home()
    found = [path for path in [shutil.which(f"python{version}")] if path]
    pyenv = Path(os.environ.get("PYENV_ROOT", home / ".pyenv")) / "versions"
    uv = Path(os.environ.get("UV_PYTHON_INSTALL_DIR", home / ".local/share/uv/python"))
    for folder, pattern in ((pyenv, f"{version}.*/bin/python"), (uv, f"cpython-{version}.*/bin/python{version}")):
        found += map(str, sorted(folder.glob(pattern)))
    for path in found:
        # a shim of pyenv is there also where the version is not
        if run(path, "-c", "import venv, ensurepip").returncode == 0:
            return Path(path)
    pytest.fail(f"no CPython {version} here to try the wheel on: install it (`uv python install {version}`)")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Python of a new environment that holds the portable wheel, by version."""

    @cache
    def make(version: str) -> Path:
        folder = tmp_path_factory.mktemp(f"python{version}")
        created = run(interpreter(version), "-m", "venv", folder)
        assert created.returncode == 0, created.stderr
        python = folder / "bin/python"
        result = run(python, "-m", "pip", "install", "--quiet", portable_wheel(), timeout=900)
        assert result.returncode == 0, result.stderr
        return python

    return make


@pytest.mark.full
def test_portable_wheel_is_tagged_for_the_glibc_that_it_needs() -> None:
    """As installers read it. What is newer than that of Debian 12 (2.36) would be refused there."""
    tag = re.search(r"-py3-none-manylinux_2_(\d+)_\w+\.whl$", portable_wheel().name)
    assert tag, portable_wheel().name
    needed = set()
    with zipfile.ZipFile(portable_wheel()) as wheel:
        for name in wheel.namelist():
            if name.endswith(".so"):
                needed |= {int(minor) for minor in re.findall(rb"\0GLIBC_2\.(\d+)\0", wheel.read(name))}
    assert needed and max(needed) <= int(tag[1])


@pytest.mark.full
@pytest.mark.parametrize("version", VERSIONS)
def test_portable_wheel_generates_text_on(version: str, installed: Callable[[str], Path]) -> None:
    result = run(installed(version), "-c", GENERATE)
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r"flash '.{20,}'\n", result.stdout), result.stdout


@pytest.mark.full
def test_portable_wheel_on_other_cpus(installed: Callable[[str], Path]) -> None:
    """Emulated: Haswell has AVX2 and nothing newer, Nehalem has neither AVX2 nor AVX."""
    assert zipfile.ZipFile(portable_wheel()).testzip() is None
    qemu = shutil.which("qemu-x86_64") or shutil.which("qemu-x86_64-static")
    assert qemu, "this test emulates other CPUs: install qemu-user"
    python = installed(".".join(map(str, sys.version_info[:2])))

    here = run(python, "-c", GENERATE)
    haswell = run(qemu, "-cpu", "Haswell", python, "-c", GENERATE, timeout=600)
    assert haswell.returncode == 0, haswell.stderr
    assert haswell.stdout == here.stdout

    nehalem = run(qemu, "-cpu", "Nehalem", python, "-c", "import llama_cpp")
    assert nehalem.returncode == 1
    assert "FlashCpuError: this CPU has no BMI2, AVX, FMA, F16C, AVX2," in nehalem.stderr.splitlines()[-1]

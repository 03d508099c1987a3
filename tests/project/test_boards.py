"""The wheel for aarch64, compiled on another machine and run by qemu-user, which has no io_uring."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from exclusive import exclusive
from repository import ROOT

SITE = ROOT / "build/aarch64/site"
NEEDED = {"aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu", "qemu-aarch64": "qemu-user", "apt-get": "apt"}
PROMPT = "def read_file(path):"

# argv: model, prompt
PROGRAM = """
import hashlib, importlib.resources, json, platform, sys
import llama_cpp

model = str(importlib.resources.files("llama_flash") / "models" / sys.argv[1])
told = {"machine": platform.machine()}
for offload in (False, {"what": "experts" if "moe" in model else "ffn"}):
    llm = llama_cpp.Llama(model, flash_offload=offload, n_ctx=128, n_threads=2, verbose=False, logits_all=True)
    text = llm(sys.argv[2], max_tokens=24, temperature=0)["choices"][0]["text"]
    bits = hashlib.sha256(llm.scores[: llm.n_tokens].tobytes()).hexdigest()
    told["flash" if offload else "resident"] = [text, bits]
    tokens = llm.tokenize(sys.argv[2].encode()) * 3
    for width in (1, 2, 5, len(tokens)):
        llm.reset()
        for begin in range(0, len(tokens), width):
            llm.eval(tokens[begin : begin + width])
        bits = hashlib.sha256(llm.scores[: llm.n_tokens].tobytes()).hexdigest()
        told.setdefault("widths", []).append(bits)
    if offload:
        stats = llm.flash.stats()
        told |= {"mode": stats.mode, "io_engine": stats.io_engine, "bytes_read": stats.total.bytes_read}
    llm.close()
print(json.dumps(told))
"""


def emulated(cpu: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The aarch64 Python, on an emulated CPU."""
    (python,) = (ROOT / "build/aarch64/root/usr/bin").glob("python3.[0-9][0-9]")
    command = ["qemu-aarch64", "-cpu", cpu, "-L", ROOT / "build/aarch64/root", python, *arguments]
    env = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "PYTHONPATH": str(SITE)}
    return subprocess.run([str(part) for part in command], env=env, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def made() -> str:
    """What `make test-boards` prints."""
    if platform.machine() == "aarch64":
        pytest.skip("on aarch64 itself `make build` and all other tests are of it")
    if lacking := [package for program, package in NEEDED.items() if not shutil.which(program)]:
        pytest.skip(f"nothing was compiled for aarch64 or emulated: apt install {' '.join(lacking)}")
    with exclusive("make"):
        result = subprocess.run(
            ["make", "--no-print-directory", "-C", ROOT, "test-boards"], capture_output=True, text=True, timeout=3600
        )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.full
def test_the_plugins_tests_pass(made: str) -> None:
    match = re.search(r"^plugin tests under qemu-aarch64: (\d+) passed, not run: (.*)$", made, re.MULTILINE)
    assert match, made
    n_tests = len(list((ROOT / "plugin/tests").glob("*.cpp")))
    assert (int(match[1]), match[2]) == (n_tests - 1, "test_threads")


@pytest.mark.full
def test_the_wheel_is_tagged_for_what_it_needs(made: str) -> None:
    (wheel,) = (ROOT / "dist").glob("*_aarch64.whl")
    tag = re.search(r"-py3-none-manylinux_2_(\d+)_aarch64\.whl$", wheel.name)
    assert tag and int(tag[1]) <= 36, "Debian 12 has glibc 2.36"
    needed = emulated(
        "cortex-a76",
        "-c",
        "import llama_flash.native.cpu as c, pathlib, sys; print(c.needed(pathlib.Path(sys.argv[1])))",
        SITE / "llama_cpp/lib",
    )
    assert {"LSE", "RDM", "DOTPROD"} <= set(needed.stdout.strip().split(", ")), needed.stderr
    assert not {"FP16", "SVE", "I8MM"} & set(needed.stdout.strip().split(", "))


@pytest.mark.full
@pytest.mark.parametrize("model", ["stdlib-moe-q8_0.gguf", "stdlib-arcee-q8_0.gguf"])
def test_models_answer_as_they_do_here(model: str, made: str) -> None:
    here = subprocess.run([sys.executable, "-c", PROGRAM, model, PROMPT], capture_output=True, text=True, timeout=300)
    assert here.returncode == 0, here.stderr
    there = emulated("cortex-a76", "-c", PROGRAM, model, PROMPT)
    assert there.returncode == 0, there.stderr
    told, expected = json.loads(there.stdout), json.loads(here.stdout)
    assert (told["machine"], told["mode"], told["io_engine"]) == ("aarch64", "flash", "pread")
    assert told["bytes_read"] > 0
    assert told["flash"] == told["resident"], "on one machine flash offload changes no bit"
    assert len(told["widths"]) == 8 and len(set(told["widths"])) == 1, "nor does the number of tokens computed at once"
    assert told["flash"][0] == expected["flash"][0], "the same text as here: logits differ in rounding alone"


@pytest.mark.full
def test_a_cpu_without_dot_products_is_told_so(made: str) -> None:
    """Of the Raspberry Pi 4."""
    result = emulated("cortex-a72", "-c", "import llama_cpp")
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("llama_flash.errors.FlashCpuError: this CPU has no LSE, RDM, DOTPROD, for which"), last


def test_without_a_compiler_the_wheel_says_what_to_install(tmp_path: Path) -> None:
    """Before anything is built."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("make", "sh"):
        found = shutil.which(name)
        assert found
        (tools / name).symlink_to(found)
    said = {"sparc64": "no cross-build for sparc64"}
    if platform.machine() != "aarch64":
        said["aarch64"] = "aarch64-linux-gnu-g++ is not there (Debian: apt install g++-aarch64-linux-gnu)"
    for arch, line in said.items():
        result = subprocess.run(
            ["make", "--no-print-directory", "-C", ROOT, "wheel", f"ARCH={arch}", f"PYTHON={sys.executable}"],
            env={"PATH": str(tools)},
            capture_output=True,
            text=True,
        )
        assert result.returncode != 0 and line in result.stderr, result.stdout + result.stderr

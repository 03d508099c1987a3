"""`llama-flash doctor`: what it finds on this machine, and on one from which something was taken away."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ModelFile
from system_calls import refuse_io_uring

from llama_flash.cli import checks as doctor


def examine(
    *arguments: object, before: Callable[[], None] | None = None, **environment: str
) -> tuple[int, dict[str, Any]]:
    """Exit code, and findings by check."""
    result = subprocess.run(
        [sys.executable, "-m", "llama_flash", "doctor", "--json", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, **environment},
        preexec_fn=before,
    )
    report = json.loads(result.stdout)
    assert report["usable"] is (result.returncode == 0), result.stderr
    return result.returncode, {finding["check"]: finding for finding in report["findings"]}


def before_all(folder: Path) -> str:
    """PYTHONPATH with `folder` first."""
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


def test_this_machine_and_the_shipped_model_are_fine() -> None:
    code, found = examine()
    assert code == 0
    assert not [finding for finding in found.values() if finding["level"] == "problem"]
    for check in ("package", "engine", "CPU", "model", "cache folder", "system", "overcommit"):
        assert found[check]["level"] == "ok", found[check]
    assert set(found) >= {"memory", "memory cgroup", "cap", "direct reads", "readahead", "io_uring", "disk", "device"}


def test_each_line_says_how_it_is_and_what_to_do(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "llama_flash", "doctor", tmp_path],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "LLAMA_FLASH_CACHE": "/dev/null/cache", "COLUMNS": "200"},
    )
    assert result.returncode == 0, result.stdout
    lines = result.stdout.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("warning  cache folder"))
    assert "Not a directory" in lines[at]
    assert "name another one in LLAMA_FLASH_CACHE" in lines[at + 1]
    assert "flash offload works here" in lines[-1]
    assert list(tmp_path.iterdir()) == []


def test_io_uring_that_is_forbidden_is_a_warning_with_its_reason(model_file: ModelFile) -> None:
    code, found = examine(model_file("qwen3moe"), before=refuse_io_uring(errno.EPERM))
    assert code == 0
    assert found["io_uring"]["level"] == "warning"
    assert "not allowed: Operation not permitted" in found["io_uring"]["found"]
    assert "seccomp" in found["io_uring"]["mend"] or "io_uring_disabled" in found["io_uring"]["mend"]
    assert "the plugin reads" in found["reads"]["found"], "through the pread threads"


def test_a_stock_package_in_its_place_is_a_problem(tmp_path: Path) -> None:
    package = tmp_path / "llama_cpp"
    package.mkdir()
    (package / "__init__.py").write_text(
        "class Llama: pass\ndef llama_print_system_info(): return b'CPU : AVX = 1 | AVX2 = 1'\n"
    )
    code, found = examine(tmp_path, PYTHONPATH=before_all(tmp_path))
    assert code == 1
    assert found["engine"]["level"] == "problem" and "stock llama-cpp-python" in found["engine"]["found"]
    assert found["reads"]["level"] == "problem"


def test_an_engine_that_this_cpu_cannot_run_is_a_problem(tmp_path: Path) -> None:
    package = tmp_path / "llama_cpp"
    package.mkdir()
    (package / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    code, found = examine(tmp_path, PYTHONPATH=before_all(tmp_path))
    assert code == 1
    assert "illegal instruction" in found["engine"]["found"] and "on this machine" in found["engine"]["mend"]


def test_a_damaged_model_is_a_problem_and_a_limit_of_address_space_a_warning(tmp_path: Path) -> None:
    path, limit = tmp_path / "a.gguf", 256 << 30
    path.write_bytes(b"GGUF" + os.urandom(8192))
    code, found = examine(path, before=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)))
    assert code == 1 and found["model"]["level"] == "problem"
    assert found["memory"]["level"] == "warning" and "ulimit -v unlimited" in found["memory"]["mend"]


def test_a_file_system_without_direct_reads_is_a_warning() -> None:
    found = doctor._direct(Path("/proc/self/status"))
    assert found.level == "warning" and "has no O_DIRECT" in found.found


def test_a_folder_that_cannot_be_written_is_a_warning_with_what_to_name_instead() -> None:
    code, found = examine("/proc/self")
    assert code == 0
    for check in ("direct reads", "reads"):
        assert found[check]["level"] == "warning" and found[check]["mend"] == "name a model file in it"
    assert "cache folder" in found


@pytest.mark.parametrize(
    ("system", "level", "said"),
    [
        ("CPU : SSE3 = 1 | AVX = 1 | ", "warning", "without AVX2"),
        ("CPU : " + " | ".join(f"{name} = 1" for name in doctor._X86.values()), "ok", "built for all of it"),
        ("", "warning", "not told"),
    ],
)
def test_a_build_for_a_lesser_cpu_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, system: str, level: str, said: str
) -> None:
    monkeypatch.setattr(doctor, "_text", lambda _path: "processor : 0\nflags\t\t: fpu avx avx2 fma avx512f\n")
    monkeypatch.setattr(doctor.platform, "machine", lambda: "x86_64")
    found = doctor._cpu(system)
    assert found.level == level and said in found.found

"""Capped runs are really capped. These tests run where memory can be capped, and fail where root cannot do it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama_flash import FlashCapError, run_capped
from llama_flash.budget import capped
from llama_flash.budget.cgroup import Controller, memory_controller

MIB = 1 << 20
ALLOCATE = "import sys; block = bytearray(int(sys.argv[1]) << 20); block[::4096] = b'x' * len(block[::4096])"


@pytest.fixture(autouse=True)
def _capping_works() -> None:
    try:
        run_capped("64MiB", ["true"])
    except FlashCapError as error:
        if os.geteuid() == 0 and memory_controller() is not None:
            raise
        pytest.skip(str(error))


def groups_left() -> list[Path]:
    controller = memory_controller()
    assert controller is not None
    return [path for parent in controller.lineage() for path in parent.glob(f"llama-flash-{os.getpid()}-*")]


def test_a_command_below_the_cap_runs_and_its_peak_is_reported() -> None:
    result = run_capped("200MiB", [sys.executable, "-S", "-c", ALLOCATE, "100"])
    assert result.returncode == 0
    assert result.oom_kills == 0
    assert result.peak_bytes is not None
    assert 100 * MIB < result.peak_bytes < 150 * MIB
    assert result.limit_bytes == 200 * MIB


def test_a_command_above_the_cap_is_killed_and_that_is_reported() -> None:
    result = run_capped("64MiB", [sys.executable, "-S", "-c", ALLOCATE, "100"])
    assert result.returncode == -signal.SIGKILL
    assert result.exit_code == 137
    assert result.oom_kills == 1
    assert result.peak_bytes is not None
    assert result.peak_bytes <= 64 * MIB


def test_page_cache_counts_but_does_not_kill(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with file.open("wb") as stream:
        for _ in range(96):
            stream.write(os.urandom(MIB))
        stream.flush()
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    result = run_capped("48MiB", ["cat", str(file)], capture_output=True)
    assert result.oom_kills == 0
    assert result.returncode == 0
    assert result.peak_bytes is not None
    assert 32 * MIB < result.peak_bytes <= 48 * MIB


def test_children_of_the_command_are_capped_too() -> None:
    script = f'{sys.executable} -S -c "{ALLOCATE}" 100; exit 7'
    result = run_capped("64MiB", ["sh", "-c", script], capture_output=True)
    assert result.oom_kills == 1
    assert result.returncode == 7


def test_output_and_exit_code_are_the_commands() -> None:
    result = run_capped("64MiB", ["sh", "-c", "echo out; echo err >&2; exit 3"], capture_output=True)
    assert (result.returncode, result.stdout, result.stderr) == (3, "out\n", "err\n")


def test_environment_and_directory_are_passed(tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "GREETING": "hello"}
    result = run_capped(
        "64MiB", ["sh", "-c", "echo $GREETING; pwd"], env=environment, cwd=tmp_path, capture_output=True
    )
    assert result.stdout == f"hello\n{tmp_path}\n"


def test_the_group_is_removed_with_what_was_left_in_it() -> None:
    started = time.monotonic()
    run_capped("64MiB", ["sh", "-c", "sleep 600 >/dev/null 2>&1 & sleep 600 >/dev/null 2>&1 & exit 0"])
    assert time.monotonic() - started < 500, "it waits for them"
    assert groups_left() == []


def test_a_timeout_kills_the_command_and_its_children() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        run_capped("64MiB", ["sh", "-c", "sleep 60 & sleep 60"], timeout=0.5)
    assert groups_left() == []


def commands_in(controller: Controller, pattern: str) -> list[str]:
    """Names of what runs in groups that are called so."""
    found = []
    for group in (group for parent in controller.lineage() for group in parent.glob(pattern)):
        with contextlib.suppress(OSError):  # it has ended
            pids = (group / "cgroup.procs").read_text().split()
            found += [Path(f"/proc/{pid}/comm").read_text().strip() for pid in pids]
    return found


def test_a_signal_reaches_the_command_and_the_group_is_removed() -> None:
    controller = memory_controller()
    assert controller is not None
    code = "from llama_flash import run_capped; r = run_capped('64MiB', ['sleep', '60']); print(r.returncode)"
    for number in (signal.SIGTERM, signal.SIGINT):
        outer = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        pattern = f"llama-flash-{outer.pid}-*"
        deadline = time.monotonic() + 200
        while "sleep" not in commands_in(controller, pattern):  # which the shell becomes
            assert time.monotonic() < deadline
            time.sleep(0.02)
        outer.send_signal(number)
        stdout, _ = outer.communicate(timeout=200)
        assert stdout.strip() == str(-number)
        assert not [g for p in controller.lineage() for g in p.glob(pattern)]


def test_a_missing_command_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="no-such-command"):
        run_capped("64MiB", ["no-such-command"])


@pytest.mark.parametrize("limit", ["-1", "5 parsecs", 0, "4K"])
def test_bad_caps_are_refused(limit: int | str) -> None:
    with pytest.raises(ValueError, match=r"accepted|too small"):
        run_capped(limit, ["true"])


def test_where_nothing_works_the_error_names_what_to_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capped, "memory_controller", lambda: None)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(FlashCapError, match=r"Allow one of.*cgroup.*systemd"):
        run_capped("64MiB", ["/bin/true"])


def test_systemd_run_is_used_where_cgroups_may_not_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # a systemd-run that says how it was called, and runs the command
    fake = tmp_path / "systemd-run"
    fake.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nwhile [ "$1" != -- ]; do shift; done; shift; exec "$@"\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(capped, "_make_directory", refuse)
    result = run_capped("64MiB", ["sh", "-c", "echo ran"], capture_output=True)
    assert result.method == "systemd"
    assert result.stdout == "ran\n"
    call = (tmp_path / "calls").read_text().splitlines()[-1]
    assert call.startswith("--user --scope")
    assert f"--property=MemoryMax={64 * MIB}" in call
    assert "--property=MemorySwapMax=0" in call

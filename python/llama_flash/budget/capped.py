"""Running a command under a memory cap: a fresh memory cgroup (v1 or v2), or a systemd scope.

Page cache counts, swap does not help. The group lies below this process' own, so the limits above stay in force.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from ..errors import FlashCapError
from ..sizes import format_size, parse_size
from .cgroup import Controller, memory_controller, parse_limit

__all__ = ["CapResult", "run_capped"]

_SMALLEST_CAP = 1 << 20  # below this not even a shell starts
_POLL = 0.02  # seconds, where a peak has to be sampled

# $1: cgroup.procs of the group. The shell enters the group before it becomes the command.
_ENTER = 'echo $$ > "$1" || exit 126; shift; exec "$@"'


@dataclass(frozen=True)
class CapResult:
    """What became of a capped command."""

    returncode: int  # as subprocess has it: negative for a signal
    limit_bytes: int  # as the kernel rounded it
    peak_bytes: int | None  # highest usage, page cache included; None where the kernel does not tell
    oom_kills: int  # processes killed because the cap was reached
    seconds: float
    method: str  # "cgroup v1", "cgroup v2" or "systemd"
    stdout: str | None = None  # with capture_output
    stderr: str | None = None
    interrupted: bool = False  # there was a SIGINT, which was passed on; a command that is just starting may lose it

    @property
    def exit_code(self) -> int:
        """As a shell has it: 128 + signal."""
        return 128 - self.returncode if self.returncode < 0 else self.returncode


def run_capped(
    limit: int | str,
    argv: Sequence[str | os.PathLike[str]],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    capture_output: bool = False,
    timeout: float | None = None,
) -> CapResult:
    """Runs `argv` in a fresh memory group of at most `limit` bytes, and waits for it.

    Signals that end this process are passed on to the command. The group is removed in any case, together with
    processes that the command has left behind in it.

    Args:
        limit: bytes or a size ("2GiB").
        timeout: seconds; the command is killed when they have passed.

    Raises:
        FlashCapError: no way to limit memory here; the message names what to allow.
        FileNotFoundError: no such command.
        subprocess.TimeoutExpired: after `timeout`.
        ValueError: not a size, or too small to start anything.
    """
    size = parse_size(limit)
    if size < _SMALLEST_CAP:
        raise ValueError(f"a cap of {format_size(size)} is too small to start a command in; the least is 1 MiB")
    command = [os.fspath(argument) for argument in argv]
    if not command:
        raise ValueError("no command given")
    if shutil.which(command[0], path=None if env is None else env.get("PATH")) is None:
        raise FileNotFoundError(f"no such command: {command[0]}")
    with _make_group(size) as group:
        started = time.monotonic()
        pipe = subprocess.PIPE if capture_output else None
        process = subprocess.Popen(
            group.wrap(command), env=env, cwd=cwd, stdout=pipe, stderr=pipe, text=True, errors="replace"
        )
        try:
            with _signals_passed_to(process) as passed, _sampled(group, process.pid):
                stdout, stderr = process.communicate(timeout=timeout)
        except BaseException:
            group.kill()
            process.kill()
            process.wait()
            raise
        seconds = time.monotonic() - started
        return CapResult(
            process.returncode,
            group.limit,
            group.peak(),
            group.oom_kills(),
            seconds,
            group.method,
            stdout,
            stderr,
            signal.SIGINT in passed,
        )


class _Group(ABC):
    """A limited group, for the time of a `with`."""

    method: str
    limit: int

    @abstractmethod
    def wrap(self, command: list[str]) -> list[str]:
        """The command line that runs `command` in the group."""

    @abstractmethod
    def peak(self) -> int | None: ...

    @abstractmethod
    def oom_kills(self) -> int: ...

    @abstractmethod
    def kill(self) -> None:
        """Kills what is in the group."""

    @abstractmethod
    def remove(self) -> None: ...

    @property
    def needs_sampling(self) -> bool:
        return False

    def sample(self, pid: int) -> None:
        """Notes usage while the command runs, where the kernel keeps no peak for afterwards."""
        return

    def __enter__(self) -> _Group:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class _CgroupDirectory(_Group):
    """A cgroup made by ourselves."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.limit = 0

    def wrap(self, command: list[str]) -> list[str]:
        return ["/bin/sh", "-c", _ENTER, "sh", str(self.path / "cgroup.procs"), *command]

    def kill(self) -> None:
        deadline = time.monotonic() + 10
        while (pids := _pids(self.path)) and time.monotonic() < deadline:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)

    def remove(self) -> None:
        self.kill()
        deadline = time.monotonic() + 5
        while True:
            try:
                self.path.rmdir()
                return
            except FileNotFoundError:
                return
            except OSError:  # the last process is still being taken down
                if time.monotonic() > deadline:
                    print(f"llama-flash: cannot remove {self.path}", file=sys.stderr)
                    return
                time.sleep(0.01)


class _GroupV1(_CgroupDirectory):
    method = "cgroup v1"

    def set_limit(self, size: int) -> None:
        (self.path / "memory.limit_in_bytes").write_text(str(size))
        with_swap = self.path / "memory.memsw.limit_in_bytes"
        if with_swap.exists():
            with_swap.write_text(str(size))
        else:
            with contextlib.suppress(OSError):
                (self.path / "memory.swappiness").write_text("0")
        self.limit = int((self.path / "memory.limit_in_bytes").read_text())

    def peak(self) -> int | None:
        return int((self.path / "memory.max_usage_in_bytes").read_text())

    def oom_kills(self) -> int:
        return _field(self.path / "memory.oom_control", "oom_kill")


class _GroupV2(_CgroupDirectory):
    method = "cgroup v2"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._sampled: int | None = None

    def set_limit(self, size: int) -> None:
        (self.path / "memory.max").write_text(str(size))
        with contextlib.suppress(OSError):  # a kernel without swap accounting
            (self.path / "memory.swap.max").write_text("0")
        self.limit = parse_limit((self.path / "memory.max").read_text()) or size

    @property
    def needs_sampling(self) -> bool:
        return not (self.path / "memory.peak").exists()  # before Linux 5.19

    def sample(self, pid: int) -> None:
        with contextlib.suppress(OSError, ValueError):
            usage = int((self.path / "memory.current").read_text())
            self._sampled = max(usage, self._sampled or 0)

    def peak(self) -> int | None:
        try:
            return int((self.path / "memory.peak").read_text())
        except (OSError, ValueError):
            return self._sampled

    def oom_kills(self) -> int:
        return _field(self.path / "memory.events", "oom_kill")

    def kill(self) -> None:
        with contextlib.suppress(OSError):  # Linux 5.14
            (self.path / "cgroup.kill").write_text("1")
        super().kill()


class _SystemdScope(_Group):
    """A scope that systemd makes on our behalf. It is gone when the command ends, so it is watched while it runs."""

    method = "systemd"

    def __init__(self, size: int, *, user: bool) -> None:
        self.limit = size
        self._unit = f"llama-flash-{os.getpid()}-{uuid.uuid4().hex[:8]}.scope"
        self._mode = ["--user"] if user else []
        self._path: Path | None = None
        self._peak: int | None = None
        self._oom_kills = 0

    def wrap(self, command: list[str]) -> list[str]:
        return [
            "systemd-run",
            *self._mode,
            "--scope",
            "--quiet",
            "--collect",
            f"--unit={self._unit}",
            f"--property=MemoryMax={self.limit}",
            "--property=MemorySwapMax=0",
            "--",
            *command,
        ]

    @property
    def needs_sampling(self) -> bool:
        return True

    def sample(self, pid: int) -> None:
        if self._path is None:
            controller = memory_controller(pid=pid) if Path(f"/proc/{pid}").exists() else None
            if controller is None or controller.group.name != self._unit:
                return
            self._path = controller.group
        for name in ("memory.peak", "memory.current", "memory.max_usage_in_bytes"):
            with contextlib.suppress(OSError, ValueError):
                self._peak = max(int((self._path / name).read_text()), self._peak or 0)
                break
        for name in ("memory.events", "memory.oom_control"):
            self._oom_kills = max(self._oom_kills, _field(self._path / name, "oom_kill"))

    def peak(self) -> int | None:
        return self._peak

    def oom_kills(self) -> int:
        return self._oom_kills

    def kill(self) -> None:
        self._systemctl("kill", "--signal=SIGKILL", self._unit)

    def remove(self) -> None:
        if self._path is not None and self._path.exists():
            self._systemctl("stop", self._unit)

    def _systemctl(self, *arguments: str) -> None:
        subprocess.run(
            ["systemctl", *self._mode, *arguments],
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


def _make_group(size: int) -> _Group:
    reasons = []
    controller = memory_controller()
    if controller is None:
        reasons.append("no memory cgroup controller is visible (is /sys/fs/cgroup mounted?)")
    else:
        for parent in controller.lineage():
            try:
                return _make_directory(controller, parent, size)
            except OSError as error:
                reasons.append(f"{parent}: {error.strerror or error}")
    for user in (True, False):
        if not user and os.geteuid() != 0:
            continue
        problem = _systemd_problem(user)
        if problem is None:
            return _SystemdScope(size, user=user)
        reasons.append(f"systemd-run{' --user' if user else ''}: {problem}")
    raise FlashCapError(
        "cannot limit memory here. Allow one of: writing to this process' memory cgroup (as root, or in a delegated "
        "or privileged container with /sys/fs/cgroup mounted read-write), or a systemd user session (loginctl "
        "enable-linger, XDG_RUNTIME_DIR set). Tried: " + "; ".join(reasons)
    )


def _make_directory(controller: Controller, parent: Path, size: int) -> _Group:
    """A limited group below `parent`. OSError where that is not allowed, leaving nothing behind."""
    path = parent / f"llama-flash-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    if controller.version == 2 and "memory" not in (parent / "cgroup.subtree_control").read_text().split():
        # only possible for groups without processes of their own
        (parent / "cgroup.subtree_control").write_text("+memory")
    path.mkdir()
    group = _GroupV1(path) if controller.version == 1 else _GroupV2(path)
    try:
        group.set_limit(size)
        if not os.access(path / "cgroup.procs", os.W_OK):
            raise PermissionError(f"{path}/cgroup.procs cannot be written")
    except BaseException:
        path.rmdir()
        raise
    return group


def _systemd_problem(user: bool) -> str | None:
    """Why systemd cannot make a scope for us; None if it can."""
    if shutil.which("systemd-run") is None:
        return "not installed"
    probe = subprocess.run(
        ["systemd-run", *(["--user"] if user else []), "--scope", "--quiet", "--property=MemoryMax=64M", "--", "true"],
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    return None if probe.returncode == 0 else (probe.stderr.strip().splitlines() or ["failed"])[-1]


@contextlib.contextmanager
def _signals_passed_to(process: subprocess.Popen[Any]) -> Iterator[set[int]]:
    """Passes SIGTERM, SIGHUP and SIGINT on, so that we live to remove the group. Yields those that there were."""
    passed: set[int] = set()
    if threading.current_thread() is not threading.main_thread():
        yield passed
        return

    def forward(number: int, _frame: FrameType | None) -> None:
        passed.add(number)
        if number == signal.SIGINT and _typed_at_terminal():
            return  # the terminal has sent it to the command as well
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)

    before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {
        number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield passed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _typed_at_terminal() -> bool:
    try:
        with open("/dev/tty", "rb") as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False


@contextlib.contextmanager
def _sampled(group: _Group, pid: int) -> Iterator[None]:
    if not group.needs_sampling:
        yield
        return
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            group.sample(pid)
            done.wait(_POLL)

    thread = threading.Thread(target=watch, name="llama-flash-cap", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _pids(path: Path) -> list[int]:
    try:
        return [int(line) for line in (path / "cgroup.procs").read_text().split()]
    except (OSError, ValueError):
        return []


def _field(path: Path, name: str) -> int:
    try:
        for line in path.read_text().splitlines():
            fields = line.split()
            if len(fields) == 2 and fields[0] == name:
                return int(fields[1])
    except (OSError, ValueError):
        pass
    return 0

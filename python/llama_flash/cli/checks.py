"""Whether this machine can do what flash offload needs: each check tries the thing itself.

Nothing here is needed to run a model. What a check finds is said with what it means and how it is mended; "problem" is
what stops flash offload, "warning" what makes it slower or takes a command away.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from ..budget.capped import run_capped
from ..budget.cgroup import cpu_groups, memory_controller
from ..budget.cores import choose_threads, explain_throttling
from ..budget.rooms import rooms
from ..device.identity import device_of
from ..errors import FlashBudgetError, FlashCapError, FlashError, FlashFormatError
from ..file_kind import kind_of_file
from ..kept_files import cache_folder
from ..model.gguf import read_gguf
from ..native.kernel import io_uring_refused
from ..sizes import format_size

__all__ = ["Finding", "Level", "examine"]

Level = Literal["ok", "warning", "problem"]

_GIB = 1 << 30
_LEAST_ROOM = 256 << 20  # bytes; an interpreter with the engine takes a third of it
_LEAST_DISK = _GIB  # bytes that a device profile writes, at most
_BLOCK = 4096  # bytes, of a direct read
_SLOW = 4e6  # nanoseconds until a block arrives: hard disks need more
_REMOTE = ("nfs", "cifs", "smb", "9p", "fuse", "ceph", "virtiofs")  # beginnings of file systems' names

# what decides the speed of the kernels: the name in /proc/cpuinfo and in llama_print_system_info()
_X86 = {
    "avx": "AVX",
    "avx2": "AVX2",
    "f16c": "F16C",
    "fma": "FMA",
    "bmi2": "BMI2",
    "avx512f": "AVX512",
    "avx512_vnni": "AVX512_VNNI",
}
_ARM = {"asimd": "NEON", "asimddp": "DOTPROD", "i8mm": "MATMUL_INT8", "sve": "SVE"}

_ASK_ENGINE = """
import json, llama_cpp
from llama_flash.native.library import library
try:
    library()
    problem = None
except Exception as error:
    problem = str(error)
system = llama_cpp.llama_print_system_info().decode()
print(json.dumps({"file": llama_cpp.__file__, "patched": hasattr(llama_cpp.Llama, "flash"), "problem": problem,
                  "system": system}))
"""


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    check: str
    level: Level
    found: str
    mend: str = ""  # what it means, and what to do about it; "" if all is well


def examine(path: Path) -> Iterator[Finding]:
    """Checks the machine, and the device of `path`: a GGUF file, which is checked, too, or a folder for models.

    Raises:
        FileNotFoundError: there is no such path.
        FlashFormatError: it is a pipe, a device, a socket.
    """
    path = path.absolute()
    folder = path if path.is_dir() else path.parent
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    if (kind := kind_of_file(path)) and not path.is_dir():
        raise FlashFormatError(f"{path}: {kind}; a model file is expected, or a folder for models")
    engine = _Engine.ask()
    checks: list[Callable[[], Finding]] = [
        _system,
        _wheel,
        engine.finding,
        lambda: _cpu(engine.system),
        _threads,
        _memory,
        _controller,
        _cap,
        _overcommit,
        _huge_pages,
        lambda: _device(path),
        lambda: _direct(path),
        lambda: _readahead(path),
        lambda: _io_uring(path, engine.works),
        lambda: _pread(path, engine.works),
        lambda: _disk(folder),
        _cache,
    ]
    if path.is_file():
        checks.append(lambda: _model(path, engine.works))
    for check in checks:
        yield check()


@dataclass(frozen=True)
class _Engine:
    """What a process of its own says of the engine: it may be of instructions that this CPU does not have."""

    answer: dict[str, Any]
    failure: str
    code: int

    @classmethod
    def ask(cls) -> _Engine:
        try:
            done = subprocess.run(
                [sys.executable, "-c", _ASK_ENGINE], capture_output=True, text=True, timeout=300, errors="replace"
            )
        except subprocess.TimeoutExpired:
            return cls({}, "importing llama_cpp took more than 5 minutes", 1)
        try:
            return cls(json.loads(done.stdout.splitlines()[-1]), "", done.returncode)
        except (ValueError, IndexError):
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            return cls({}, lines[-1] if lines else "", done.returncode)

    @property
    def works(self) -> bool:
        return bool(self.answer) and self.answer["patched"] and self.answer["problem"] is None

    @property
    def system(self) -> str:
        return str(self.answer.get("system", ""))

    def finding(self) -> Finding:
        if self.code == -signal.SIGILL:
            return Finding(
                "engine",
                "problem",
                "the engine was compiled for a newer CPU: it ends with an illegal instruction",
                "build it on this machine: pip install . in the source tree, or make build",
            )
        if not self.answer:
            return Finding(
                "engine", "problem", f"llama_cpp cannot be imported: {self.failure or self.code}", "install the wheel"
            )
        if not self.answer["patched"]:
            return Finding(
                "engine",
                "problem",
                f"{self.answer['file']} is stock llama-cpp-python: it knows no flash_offload",
                "it was installed over the patched one: install the wheel again with pip install --force-reinstall",
            )
        if self.answer["problem"]:
            return Finding("engine", "problem", self.answer["problem"], "install the wheel again, or build it here")
        return Finding("engine", "ok", f"{Path(self.answer['file']).parent}, with the flash buffer type")


def _system() -> Finding:
    said = f"{platform.system()} {platform.release()}, {platform.machine()}, Python {platform.python_version()}"
    if platform.system() != "Linux":
        return Finding("system", "problem", said, "flash offload needs Linux")
    return Finding("system", "ok", said)


def _wheel() -> Finding:
    try:
        version = metadata.version("llama_cpp_python")
    except metadata.PackageNotFoundError:
        return Finding(
            "package", "warning", "llama_cpp_python is not installed as a package", "pip cannot tell what is here"
        )
    if "+flash" not in version:
        return Finding(
            "package",
            "warning",
            f"pip knows llama_cpp_python {version}, which is not the patched one",
            "another package may have replaced it: install the wheel again with pip install --force-reinstall",
        )
    return Finding("package", "ok", f"llama_cpp_python {version}")


def _cpu(system: str) -> Finding:
    cpu = _text(Path("/proc/cpuinfo"))
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", cpu, re.MULTILINE)
    words = set(match[1].split()) if match else set()
    names = _ARM if platform.machine() in ("aarch64", "arm64") else _X86
    has = [name for flag, name in names.items() if flag in words]
    built = re.findall(r"\b(\w+) = 1\b", system)
    if not words or not built:
        return Finding("CPU", "warning", "what the CPU can do, or the engine was built for, is not told")
    unused = [name for name in has if name not in built]
    if unused:
        return Finding(
            "CPU",
            "warning",
            f"the engine was built without {', '.join(unused)}, which this CPU has",
            "it computes slower than it could: build it on this machine (pip install . in the source tree)",
        )
    return Finding("CPU", "ok", f"{', '.join(has) or 'no vector instructions'}: the engine was built for all of it")


def _threads() -> Finding:
    """How many compute by default, and whether a quota has stopped this process' group before."""
    chosen = choose_threads()
    stopped = max(((group.throttled, group.throttled_seconds) for group in cpu_groups()), default=(0, 0.0))
    if stopped[0]:
        return Finding("threads", "warning", str(chosen), f"since it was made: {explain_throttling(*stopped)}")
    return Finding("threads", "ok", str(chosen))


def _memory() -> Finding:
    tightest = min(rooms(), key=lambda room: room.bytes)
    said = (
        f"{format_size(tightest.bytes)} for a process, by {tightest.name} "
        f"({format_size(tightest.limit)}, others hold {format_size(tightest.others)})"
    )
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        return Finding(
            "memory",
            "warning",
            f"{said}; address space is limited to {format_size(limit)}",
            "weights reserve more addresses than memory: ulimit -v unlimited; limit memory with llama-flash cap",
        )
    if tightest.bytes < _LEAST_ROOM:
        return Finding(
            "memory", "warning", said, "hardly more than the interpreter takes: raise the limit, or end other programs"
        )
    return Finding("memory", "ok", said)


def _controller() -> Finding:
    controller = memory_controller()
    if controller is None:
        return Finding(
            "memory cgroup",
            "warning",
            "no memory controller is visible",
            "budgets follow the machine's free memory only: mount /sys/fs/cgroup, or enable the memory controller",
        )
    return Finding("memory cgroup", "ok", f"v{controller.version}, {controller.group}")


def _cap() -> Finding:
    try:
        result = run_capped("64MiB", ["true"])
    except (FlashCapError, OSError) as error:
        return Finding(
            "cap",
            "warning",
            "no group can be made: llama-flash cap and --cap do not work, --dram-budget does",
            str(error),
        )
    if result.returncode != 0:
        return Finding(
            "cap", "warning", f"a command in a group of 64 MiB ended with {result.exit_code}", "--dram-budget works"
        )
    return Finding("cap", "ok", f"a command ran below 64 MiB ({result.method})")


def _overcommit() -> Finding:
    mode = _text(Path("/proc/sys/vm/overcommit_memory"))
    if mode == "2":
        return Finding(
            "overcommit",
            "warning",
            "vm.overcommit_memory is 2: memory counts when it is reserved",
            "slots may get less than the budget: sysctl vm.overcommit_memory=0",
        )
    return Finding("overcommit", "ok", f"vm.overcommit_memory is {mode or 'not told'}")


def _huge_pages() -> Finding:
    if mmap.PAGESIZE != 4096:  # a large one has as many of these as fit: 32 MiB and more
        return Finding("large pages", "ok", f"slots are in this kernel's pages of {mmap.PAGESIZE >> 10} KiB")
    match = re.search(r"\[(\w+)\]", _text(Path("/sys/kernel/mm/transparent_hugepage/enabled")))
    mode = match[1] if match else "not told"
    effect = "slots are in large pages" if mode in ("always", "madvise") else "slots are in small pages, hardly slower"
    return Finding("large pages", "ok", f"{mode}: {effect}")


def _device(path: Path) -> Finding:
    device = device_of(path)
    if device.file_system.startswith(_REMOTE):
        return Finding(
            "device", "warning", f"{device} is not a local disk", "keep models on one: each token waits for its reads"
        )
    if device.file_system in ("tmpfs", "ramfs"):
        return Finding(
            "device", "warning", f"{device}: this is memory", "files in it count as memory: keep models on a disk"
        )
    return Finding("device", "ok", str(device))


def _direct(path: Path) -> Finding:
    try:
        with _file_at(path) as name:
            done = _read_direct(name)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return Finding(
                "direct reads",
                "warning",
                f"the file system of {path} has no O_DIRECT",
                "reads go through the page cache: slower, and the cache counts as memory. ext4, xfs and btrfs have it",
            )
        if path.is_dir():
            return _no_file(path, "direct reads", error)
        return Finding("direct reads", "problem", f"{path}: {error.strerror or error}", "the file must be readable")
    return Finding("direct reads", "ok", f"{done} bytes read past the page cache")


def _readahead(path: Path) -> Finding:
    number = os.stat(path).st_dev
    text = _text(Path(f"/sys/class/bdi/{os.major(number)}:{os.minor(number)}/read_ahead_kb"))
    if not text.isdigit():
        return Finding("readahead", "ok", "not told; direct reads have none")
    return Finding("readahead", "ok", f"{text} KiB; direct reads have none, stock llama.cpp's mmap has")


def _io_uring(path: Path, engine_works: bool) -> Finding:
    slower = "the pread threads are used, which is slower for many small reads"
    if refused := io_uring_refused():
        disabled = _text(Path("/proc/sys/kernel/io_uring_disabled"))
        if disabled in ("1", "2"):
            mend = f"{slower}; sysctl kernel.io_uring_disabled=0 allows it"
        elif refused == errno.ENOSYS:
            mend = f"{slower}; the kernel has none (before 5.1), or a container forbids it"
        else:
            mend = f"{slower}; in a container, allow it in the seccomp profile"
        return Finding("io_uring", "warning", f"not allowed: {os.strerror(refused)}", mend)
    if not engine_works:
        return Finding("io_uring", "ok", "allowed; whether it is built in cannot be told without the engine")
    try:
        _probe(path, "io_uring")
    except OSError as error:
        return _no_file(path, "io_uring", error)
    except FlashError as error:
        return Finding(
            "io_uring", "warning", str(error), f"{slower}; install liburing (Debian: liburing-dev) and build again"
        )
    return Finding("io_uring", "ok", "allowed and built in")


def _pread(path: Path, engine_works: bool) -> Finding:
    if not engine_works:
        return Finding("reads", "problem", "cannot be tried without the engine", "see engine")
    try:
        probe = _probe(path, "auto")
        for _ in range(2):
            if probe.latency_ns > _SLOW:  # or the process was stopped meanwhile
                probe = min(probe, _probe(path, "auto"), key=lambda one: int(one.latency_ns))
    except OSError as error:
        return _no_file(path, "reads", error)
    except FlashError as error:
        return Finding("reads", "problem", str(error), "the plugin cannot read from this device")
    said = f"the plugin reads, {'past' if probe.direct else 'through'} the page cache; 4 KiB take "
    if probe.latency_ns > _SLOW:
        # measured: what virtual disks say of themselves (queue/rotational) is often wrong
        return Finding(
            "reads",
            "warning",
            f"{said}{probe.latency_ns / 1e6:.1f} ms",
            "as slow as a hard disk: keep models on an SSD",
        )
    return Finding("reads", "ok", f"{said}{probe.latency_ns / 1e3:.0f} µs")


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    said = f"{format_size(free)} free in {folder}"
    if free < _LEAST_DISK:
        return Finding("disk", "warning", said, "profile writes up to 1 GiB; convert and bundle need a model's size")
    return Finding("disk", "ok", said)


def _cache() -> Finding:
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        return Finding(
            "cache folder",
            "warning",
            f"{folder}: {error.strerror or error}",
            "profiles and warm starts are not kept: make it writable, or name another one in LLAMA_FLASH_CACHE",
        )
    return Finding("cache folder", "ok", f"{folder} can be written")


def _model(path: Path, engine_works: bool) -> Finding:
    try:
        meta = read_gguf(path)
        if not engine_works:
            return Finding(
                "model", "ok", f"{meta.architecture}, {format_size(meta.file_bytes)}; not planned: see engine"
            )
        from ..planning.planner import plan

        made = plan(path, n_ctx=min(meta.number("context_length", 2048), 2048))
    except FlashBudgetError as error:
        return Finding("model", "problem", str(error), "")
    except FlashFormatError as error:
        return Finding("model", "problem", error.problem, error.mend)
    except (FlashError, ValueError, OSError) as error:
        return Finding("model", "problem", str(error), "")
    said = f"{meta.architecture}, {format_size(meta.file_bytes)}"
    if made.mode == "resident":
        return Finding("model", "ok", f"{said}: fits into memory, nothing stays on flash")
    if made.mode == "nothing":
        return Finding(
            "model", "warning", f"{said}: no weight of it can stay on flash", "it runs as stock, with all its memory"
        )
    flash = f"{format_size(made.flash_weights)} on flash, smallest budget {made.smallest >> 20} MiB"
    return Finding("model", "ok", f"{said}: {flash}")


def _no_file(path: Path, check: str, error: OSError) -> Finding:
    """Nothing could be tried: `path` is a folder in which no file can be made."""
    return Finding(
        check, "warning", f"no file can be written to {path}: {error.strerror or error}", "name a model file in it"
    )


@contextlib.contextmanager
def _file_at(path: Path) -> Iterator[str]:
    """Name of a file to read: `path` itself, or one of 1 MiB in that folder that is gone afterwards."""
    if path.is_file():
        yield str(path)
        return
    with tempfile.TemporaryFile(dir=path, buffering=0) as file:
        file.write(os.urandom(1 << 20))
        os.fsync(file.fileno())
        yield f"/proc/self/fd/{file.fileno()}"


def _read_direct(name: str) -> int:
    """Bytes that one direct read returned."""
    fd = os.open(name, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        with mmap.mmap(-1, _BLOCK) as block:  # aligned, as a direct read wants it
            return os.preadv(fd, [block], 0)
    finally:
        os.close(fd)


def _probe(path: Path, io_engine: Literal["auto", "io_uring"]) -> Any:
    """Reads with the plugin's reader, one block after the other; what llama_flash_probe_reads tells.

    Raises:
        FlashError: it cannot.
    """
    from ..native.calls import probe_reads

    with _file_at(path) as name:
        return probe_reads(name, _BLOCK, 1, 0.05, io_engine)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""

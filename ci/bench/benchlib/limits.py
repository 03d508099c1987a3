"""The physical limit: the slower of two clocks. Both are read in the run that they are compared with.

Flash: the bytes that a token (or a prompt) made the device read, at the rate of raw reads of the same size with as many
in flight, nothing computed meanwhile. Arithmetic: the same work with all weights in DRAM; where they do not fit there,
the kernels' time of the run itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchlib.runs import Run
from llama_flash.native.calls import probe_reads

_SECTOR = 4096
_SECONDS = 1.0  # of raw reads after each run


@dataclass(frozen=True)
class RawRate:
    """Raw random reads."""

    chunk: int  # bytes
    depth: int  # in flight
    bytes_per_second: float


def raw_rate(path: Path, run: Run) -> RawRate | None:
    """Raw reads like those that `run` made, from the same file; None if it made none."""
    counters = run.measured.get("flash_counters")
    if counters is None:  # a load
        return _probe(path, 1 << 20, run.measured["io_depth"])
    if not counters["reads"]:
        return None
    size = min(1 << 20, counters["bytes_read"] / counters["reads"])
    chunk = max(_SECTOR, round(size / _SECTOR) * _SECTOR)
    at_once = counters["reads"] / max(1, run.measured["tokens"])
    depth = int(max(1, min(run.measured["io_depth"], at_once)))
    return _probe(path, chunk, depth)


def _probe(path: Path, chunk: int, depth: int) -> RawRate:
    probe = probe_reads(path, chunk, depth, _SECONDS)
    return RawRate(chunk, depth, probe.bytes / (probe.ns / 1e9))


@dataclass(frozen=True)
class Limit:
    """Seconds for each token."""

    flash: float
    computing: float

    @property
    def tok_s(self) -> float:
        return 1 / max(self.flash, self.computing)

    @property
    def bound_by(self) -> str:
        return "flash" if self.flash > self.computing else "computing"


@dataclass(frozen=True)
class FirstToken:
    """Seconds."""

    total: float  # from the load's begin
    reading: float  # its bytes at the device's rate
    touching: float | None  # the machine's first touch of as much memory; None: not compared with

    @property
    def times(self) -> float:
        """Of the slower of these."""
        return self.total / max(self.reading, self.touching or 0.0)


_BESIDE_KERNELS = ("wait_seconds", "repack_seconds", "predict_seconds", "manage_seconds")


def kernel_seconds(run: Run) -> float | None:
    """Of each token, but for what the engine's counters say was spent beside kernels. None without flash offload."""
    counters = run.measured.get("flash_counters")
    if counters is None:
        return None
    beside = sum(counters[name] for name in _BESIDE_KERNELS)
    return float((run.measured["seconds"] - beside) / run.measured["tokens"])


def cpu_seconds(run: Run) -> float | None:
    """CPU time of all threads for each token, the kernel's included; None where it was not measured."""
    measured = run.measured
    if "user_seconds_per_token" not in measured:
        return None
    return float(measured["user_seconds_per_token"] + measured["system_seconds_per_token"])


def cpu_outside_kernels(run: Run) -> float | None:
    """CPU time for each token outside the arithmetic's kernels, in which all threads are or wait for each other.

    Less than there is (even below 0) where other processes took the cores meanwhile.
    """
    cpu, kernels = cpu_seconds(run), kernel_seconds(run)
    return None if cpu is None or kernels is None else cpu - run.measured["n_threads"] * kernels

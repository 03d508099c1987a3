"""What llama-server's /health and /metrics say of flash beside its own: a native.server.Pages.

Asked by threads of HTTP while another one computes; nothing here waits for a computation.
"""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..budget.cores import Throttling
from ..session.session import FlashSession
from ..version import version
from .figures import COUNTERS, EVENTS, GAUGES, TEXTS, TOKENS, WORKER_COUNTERS, WORKER_GAUGES, Tally, public

__all__ = ["FlashPages"]

_Samples = Iterable[tuple[dict[str, str], float]]  # labels, value


class FlashPages:
    """Of the one model of a server.

    Args:
        model: its name for clients.
        parallel: answers that are computed at the same time, at most.
    """

    def __init__(self, model: str, parallel: int) -> None:
        self._model, self._parallel = model, parallel
        self._lock = threading.Lock()  # of what a load replaces
        self._session: FlashSession | None = None
        self._is_loaded = True  # without flash offload, whoever is asked has loaded it
        self._tally = Tally()
        self._throttling = Throttling()

    def loaded(self, session: FlashSession) -> None:
        """The model has been loaded, and maybe was before."""
        session.on_event(lambda event: self._tally.events.update([event.kind]))
        with self._lock:
            if self._session is not None:
                self._tally.add(self._session.describe())
            self._session, self._is_loaded = session, True
            self._tally.loads += 1

    def unloaded(self) -> None:
        """The model is gone: it will be loaded again."""
        with self._lock:
            if self._session is not None:
                self._tally.add(self._session.describe())
            self._session, self._is_loaded = None, False

    def health(self) -> dict[str, Any]:
        with self._lock:
            stats = self._stats()
        return {"version": version(), "model": self._model, "parallel": self._parallel, "flash": public(stats)}

    def metrics(self) -> str:
        with self._lock:
            return "".join([*self._of_model(), *self._of_process()])

    def _stats(self) -> dict[str, Any] | None:
        return None if self._session is None else self._session.describe()

    def _of_model(self) -> Iterable[str]:
        now, tally, model = self._stats(), self._tally, {"model": self._model}
        yield _family("llama_flash_model_loaded", "gauge", TEXTS["model_loaded"], [(model, int(self._is_loaded))])
        for name, text, key in GAUGES:
            yield _family(f"llama_flash_{name}", "gauge", text, [(model, now[key])] if now else [])
        for name, text, part, key in COUNTERS:
            yield _counter(name, text, [(model, tally.count(part, key, now))])
        kinds = [({**model, "kind": kind}, tally.count(part, "tokens", now)) for kind, part in TOKENS]
        yield _counter("tokens", TEXTS["tokens"], kinds)
        yield _counter("events", TEXTS["events"], [({**model, "kind": kind}, tally.events[kind]) for kind in EVENTS])
        yield _counter("loads", TEXTS["loads"], [(model, tally.loads)])
        yield from self._of_workers(model)

    def _of_workers(self, model: dict[str, str]) -> Iterable[str]:
        """As of a second ago."""
        if self._session is None or not (told := self._session.worker_figures()):
            return
        of = {each["worker"]: {**model, "worker": each["worker"]} for each in told}
        up = [(of[each["worker"]], int(not each["lost"])) for each in told]
        yield _family("llama_flash_worker_up", "gauge", TEXTS["worker_up"], up)
        known = [each for each in told if "counters" in each]
        for name, text, key in WORKER_GAUGES:
            yield _family(f"llama_flash_{name}", "gauge", text, [(of[each["worker"]], each[key]) for each in known])
        for name, text, key in WORKER_COUNTERS:
            yield _counter(name, text, [(of[each["worker"]], each["counters"][key]) for each in known])

    def _of_process(self) -> Iterable[str]:
        times, seconds = self._throttling.since()
        yield _counter("throttled", TEXTS["throttled"], [({}, times)])
        yield _counter("throttled_seconds", TEXTS["throttled_seconds"], [({}, seconds)])
        # the names that Prometheus' own client libraries give them
        size, held = (int(n) * os.sysconf("SC_PAGE_SIZE") for n in Path("/proc/self/statm").read_text().split()[:2])
        times_used = os.times()
        for name, kind, text, value in (
            ("virtual_memory_bytes", "gauge", "Virtual memory size in bytes.", size),
            ("resident_memory_bytes", "gauge", "Resident memory size in bytes.", held),
            ("start_time_seconds", "gauge", "Start time of the process since unix epoch in seconds.", _began()),
            ("cpu_seconds_total", "counter", "CPU time spent in seconds.", times_used.user + times_used.system),
            ("open_fds", "gauge", "Number of open file descriptors.", len(os.listdir("/proc/self/fd"))),
            ("max_fds", "gauge", "Most open file descriptors.", resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
        ):
            yield _family(f"process_{name}", kind, text, [({}, value)])


def _began() -> float:
    """When the process was started: seconds since the epoch."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    (boot,) = (line.split()[1] for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime "))
    return int(boot) + ticks / os.sysconf("SC_CLK_TCK")


def _counter(name: str, text: str, samples: _Samples) -> str:
    return _family(f"llama_flash_{name}_total", "counter", text, samples)


def _family(name: str, kind: str, text: str, samples: _Samples) -> str:
    """In Prometheus' text format, version 0.0.4."""
    lines = [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
    for labels, value in samples:
        said = ",".join(f'{label}="{_escaped(of)}"' for label, of in labels.items())
        lines.append(f"{name}{{{said}}} {float(value)!r}" if said else f"{name} {float(value)!r}")
    return "\n".join(lines) + "\n"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

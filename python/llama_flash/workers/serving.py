"""The process of one client of a worker: what it asks on the control channel, and the session that computes for it.

Started by listen.py, which passes the control connection and a channel on which the connection for data comes. Ends
when the client leaves, and with it all that was allocated for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..budget.controller import Controller
from ..budget.cores import default_threads
from ..budget.held import held_by_all
from ..budget.rooms import held_by_process, kept_budget
from ..device.kept import recall
from ..errors import FlashBudgetError, FlashError, FlashFormatError, FlashReadError
from ..model.bundles import Bundles, read_bundles
from ..model.ggml_types import tensor_bytes
from ..model.gguf import GgufMeta, read_gguf
from ..model.shape import ContextShape
from ..native.handle import Session
from ..native.library import trim_heap
from ..native.params import Mode, Requirements, neuron_params
from ..native.remote import Worker
from ..observe.stats import Counters
from ..options import FlashOffload
from ..planning.placement import choose_predictor
from ..planning.reads import experts_ahead, io_choice
from ..sizes import format_size, parse_size
from .division import FLASH
from .identity import identity_of
from .remembered import HostRecords
from .share import WorkerShare
from .wire import Line, Pulse, Wire

__all__ = ["Serving", "main"]

_READ = 1 << 20  # bytes: reads of which a drive's rate is told
_TOO_MUCH = 1 << 62
_MOST_FEW = 1 << 16  # tokens
_LOOK = 0.1  # seconds, at most, from one look at what is waited for to the next
_GAVE_UP = 4  # exit code
_IDLE = 120.0  # seconds without a word from the client, which says every second that it is alive


class Serving:
    """Of one client. `answer` is asked line by line.

    Raises:
        FlashError, OSError: the model cannot be served.
    """

    def __init__(self, about: dict[str, Any], channel: socket.socket) -> None:
        import llama_cpp  # noqa: F401  # registers the plugin

        self._key, self._channel = str(about["key"]), channel
        self._options = FlashOffload(**about["options"])
        self._meta: GgufMeta = read_gguf(about["model"])
        self._n_threads = int(about["n_threads"]) or default_threads()
        self._budget = kept_budget(self._options.dram_budget, self._options.reserve, self._meta.file_bytes)
        # the process that listens: where a limit sets the budget, it is one of the others below it
        self._door = held_by_process(pid=os.getppid()) if self._budget.reason == "dram_budget" else 0
        self._native: Session | None = None
        self._worker: Worker | None = None
        self.pulse = 1.0  # seconds within which the client is to hear of what it has asked, answered or not
        self._share: WorkerShare | None = None  # where something is on flash
        self._bundles: Bundles | None = None  # of its layers
        self._predictor: Mode | None = None  # how active neurons of these are found
        self._read_timeout = float(about["read_timeout"])  # seconds; 0: a read may take as long as it does
        self._hot = HostRecords(self._meta.files, list(self._meta.tensors), self._options)

    def answer(self, line: Line) -> Line:
        """To one line of the client's."""
        asked = {
            "open": self._hello,
            "ping": lambda _: {},
            "plan": self._plan,
            "bound": self._bound,
            "attach": self._attach,
            "few": self._few,
            "check": self._check,
            "stats": self._stats,
            "budget": self._set_budget,
        }.get(str(line.get("op")))
        if asked is None:
            return _error("protocol", f"no such request: {line.get('op')!r}")
        try:
            return {"ok": True, **asked(line)}
        except FlashReadError as e:
            about = {"file": e.file, "offset": e.offset, "size": e.size, "errno": e.errno, "tensor": e.tensor}
            return _error("read", str(e), **about)
        except FlashBudgetError as e:
            return _error("budget", str(e), smallest=e.smallest, breakdown=e.breakdown)
        except FlashFormatError as e:
            return _error("format", str(e))
        except KeyError as e:
            return _error("refused", f"the request {line.get('op')!r} has no {e}")
        except (FlashError, OSError, ValueError, TypeError, ArithmeticError) as e:
            return _error("refused", str(e) or type(e).__name__)

    # what may be asked

    def _hello(self, _: Line) -> Line:
        return {
            "key": self._key,
            "identity": identity_of(self._meta),
            "budget": self._budget.total,
            "reason": self._budget.reason,
            "reserve": self._budget.reserve,
            "held": held_by_all() + self._door,
            "threads": self._n_threads,
            **self._rates(),
            "model": self._meta.files[0].name,
        }

    def _rates(self) -> Line:
        """Bytes per second of drive and memory, if `llama-flash profile` has measured them on this host."""
        profile = recall(self._meta.files[0])
        if profile is None:
            return {}
        return {"flash_rate": profile.rate(_READ, profile.depth_for(_READ)), "dram_rate": profile.dram}

    def _plan(self, line: Line) -> Line:
        """Which weights the client wants, and where each is to be. From then on the connection for data is served."""
        if self._worker is not None:
            raise FlashError("a plan was made before")
        homes, options = line["homes"], self._options
        self.pulse = min(1.0, max(0.02, float(line.get("pulse", 1.0))))
        if not isinstance(homes, dict):
            raise FlashError("homes is no object")
        bundles = self._bundles_of(homes)
        if bundles is not None:
            self._options = options = replace(options, **_neurons_of(line.get("neurons")))
        io_engine, io_depth = io_choice(options, bundles, None)
        native = Session(
            io_engine,
            io_depth=io_depth,
            io_threads=options.io_threads,
            lookahead=experts_ahead(options),
            tries_ahead=options.lookahead == "auto",
            panel_bytes=parse_size(options.panel_bytes),
            few_tokens=min(_MOST_FEW, _whole({"few_tokens": 0, **line}, "few_tokens", least=0)),
        )
        try:
            worker = self._worker_of(native, homes, bundles)
        except BaseException:
            native.close()
            raise
        self._native, self._worker, self._bundles = native, worker, bundles
        threading.Thread(target=self._serve, args=(worker,), daemon=True).start()
        return {}

    def _worker_of(self, native: Session, homes: dict[str, Any], bundles: Bundles | None) -> Worker:
        """With the weights that its client may ask for."""
        parts = [] if bundles is None else list(bundles.presented())
        for description in () if bundles is None else bundles.descriptions():
            native.add_bundle(description)
        limit = max(0, self._budget.total - self._budget.reserve)
        addresses = self._meta.file_bytes + sum(tensor_bytes(kind, shape) for _, kind, shape, _ in parts)
        worker = Worker(native, self._meta.files, self._n_threads, limit, addresses)
        try:
            worker.on_many(self._many)
            numbers = {path: i for i, path in enumerate(self._meta.files)}
            bundled = set() if bundles is None else {layer.tensor.name for layer in bundles.layers}
            for name in homes.keys() - bundled:
                tensor, home = self._meta.tensors[name], _whole(homes, name, least=0)
                worker.add_weight(name, tensor.type, tensor.shape, numbers[tensor.file], tensor.offset, home)
            for name, kind, shape, tensor in parts:
                worker.add_weight(name, kind, shape, numbers[tensor.file], tensor.offset, FLASH)
        except BaseException:
            worker.close()
            raise
        return worker

    def watch_reads(self, give_up: Callable[[str], None]) -> None:
        """Until a read has taken too long; then `give_up` is told which, and this returns."""
        while self._read_timeout > 0:
            time.sleep(min(_LOOK, self._read_timeout / 4))
            seconds, read = (0.0, "") if self._native is None else self._native.waiting()
            if seconds > self._read_timeout:
                give_up(f"{read}: its drive does not answer")
                return

    def keep(self) -> None:
        """Remembers what a next client will ask for. Waits for the op that is computed."""
        if self._share is not None:
            self._share.keep()

    def _bundles_of(self, homes: dict[str, Any]) -> Bundles | None:
        """Those of the client's weights. Raises FlashError where it wants what the file does not have."""
        for name in homes:
            if name not in self._meta.tensors:
                raise FlashError(f"the file has no tensor {name!r}")
        bundles = read_bundles(self._meta)
        if bundles is None:
            return None
        own = tuple(layer for layer in bundles.layers if layer.tensor.name in homes)
        return replace(bundles, layers=own) if own else None

    def _choose_predictor(self, bundles: Bundles, n_ubatch: int, left: int) -> Requirements:
        """How active neurons of its layers are found, and what that needs; left: bytes there are for it."""
        native, _ = self._session()

        def needs_of(mode: Mode) -> Requirements:
            self._predictor = mode
            native.set_neurons(neuron_params(mode, self._options, bundles.format.record_bytes, n_ubatch))
            return native.requirements()

        return choose_predictor(str(self._meta.files[0]), bundles, self._options.predictor, left, needs_of)

    def _bound(self, _: Line) -> Line:
        """The client has loaded its model: what is on flash is known."""
        native, worker = self._session()
        self._hot.note_files()
        worker.raise_refusal()
        native.raise_pending()
        native.bind_end()
        needs = native.requirements()
        return {"least": needs.min_memory, "most": needs.max_memory, "resident": worker.memory().resident}

    def _attach(self, line: Line) -> Line:
        """The client's context exists: what the budget has left is for flash."""
        native, worker = self._session()
        needs, memory = native.requirements(), worker.memory()
        trim_heap()
        # weights have been written, KV cache and graph buffers not yet
        beside = held_by_process() + self._door - memory.resident
        fixed = beside + memory.resident + memory.buffers
        left = self._budget.total - self._budget.reserve - fixed
        kv, shape = _context_of(line["context"])
        if self._bundles is not None and self._share is None:
            needs = self._choose_predictor(self._bundles, shape.n_ubatch, left)
        on_flash = needs.n_expert_tensors + needs.n_panel_tensors + needs.n_bundles > 0
        if (on_flash and left < needs.min_memory) or left < 0:
            short = fixed + (needs.min_memory if on_flash else 0) + self._budget.reserve
            raise FlashBudgetError(
                f"a DRAM budget of {format_size(self._budget.total)} ({self._budget.reason}) is too small: about "
                f"{format_size(short)} would do",
                breakdown={"interpreter": beside, "weights": memory.resident, "compute": memory.buffers},
                smallest=short,
            )
        if on_flash and self._share is None:
            path = self._meta.files[0]
            beside -= self._door
            share = WorkerShare(path, self._options, native, worker, self._budget, self._door, beside, self._hot)
            share.expect(kv, shape)
            share.give(left)
            self._share = share
        return self._memory()

    def _few(self, line: Line) -> Line:
        """Whether calls are of few tokens from now on. No call is under way."""
        if self._share is not None:
            self._share.compute_few(line["few"] is True)
        return {}

    def _many(self) -> None:
        """On the engine's thread: the client touches more than calls of few tokens do."""
        if self._share is not None:
            self._share.compute_many()

    def _check(self, line: Line) -> Line:
        """What has failed since it was asked last; tokens: of the call that has ended."""
        native, worker = self._session()
        n_tokens = _whole({"tokens": 0, **line}, "tokens", least=0)
        if self._share is not None:
            self._share.computed(n_tokens)
        native.raise_pending()
        worker.raise_refusal()
        return {}

    def _stats(self, _: Line) -> Line:
        native, _worker = self._session()
        counters = Counters.from_struct(native.stats()).as_dict()
        return {"counters": counters, "predictor": self._predictor or "none", **self._memory()}

    def _set_budget(self, line: Line) -> Line:
        """Another budget, while the model runs."""
        if self._share is None:
            raise FlashError("there is no flash memory to be moved: all of its weights are resident")
        self._share.set_budget(line["budget"], self._meta.file_bytes)
        return self._memory()

    def _memory(self) -> Line:
        native, worker = self._session()
        memory, given = worker.memory(), native.memory()
        return {
            "budget": self._share.budget.total if self._share else self._budget.total,
            "resident": memory.resident,
            "buffers": memory.buffers,
            "flash": self._share.granted if self._share else 0,
            "slots": given.slots,
            "pinned": given.pinned,
            "held": held_by_process() + self._door,
        }

    def _session(self) -> tuple[Session, Worker]:
        if self._native is None or self._worker is None:
            raise FlashError("there is no plan yet")
        return self._native, self._worker

    def _serve(self, worker: Worker) -> None:
        """The engine's thread: until the client leaves."""
        _, fds, _, _ = socket.recv_fds(self._channel, 1, 1)
        if fds:
            with contextlib.suppress(FlashError):
                worker.serve(socket.socket(fileno=fds[0]))


def _whole(line: Line, name: str, *, least: int) -> int:
    """Raises ValueError where that is no whole number from `least` on, KeyError where there is none."""
    value = line[name]
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < _TOO_MUCH:
        raise ValueError(f"{name}: {value!r} is not a whole number from {least} on")
    return value


def _context_of(line: object) -> tuple[int, ContextShape]:
    """Bytes of the KV cache, and the context. Raises ValueError or KeyError where it makes no sense."""
    if not isinstance(line, dict):
        raise ValueError(f"context: {line!r} is no object")
    n_ctx, n_ubatch, n_sequences = (_whole(line, name, least=1) for name in ("n_ctx", "n_ubatch", "n_sequences"))
    flash_attn = line["flash_attn"] is True
    shape = ContextShape(n_ctx=n_ctx, n_ubatch=n_ubatch, n_sequences=n_sequences, flash_attn=flash_attn)
    return _whole(line, "kv", least=0), shape


def _neurons_of(line: object) -> dict[str, Any]:
    """Options of FlashOffload. Raises ValueError where that is none of them."""
    if not isinstance(line, dict) or set(line) != {"predictor", "window"}:
        raise ValueError(f"neurons: {line!r} does not say how active ones are found")
    return line


def _error(kind: str, message: str, **about: object) -> Line:
    return {"error": {"kind": kind, "message": message, **about}}


def main() -> None:
    """Serves the client whose connections stdin names."""
    about = json.load(sys.stdin)
    Controller.of_process().companions.add(os.getppid())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal; who listens ends this process
    serving: Serving | None = None

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            if serving is not None:
                serving.keep()
        finally:
            os._exit(0)

    signal.signal(signal.SIGTERM, end)
    control = socket.socket(fileno=int(about["control"]))
    channel = socket.socket(fileno=int(about["channel"]))
    control.settimeout(_IDLE)
    wire, code = Wire(control), 0
    pulse = Pulse(wire)
    try:
        serving = Serving(about, channel)
    except (FlashError, OSError, ValueError) as error:
        with contextlib.suppress(OSError):
            wire.send(_error("refused", str(error)))
        os._exit(1)

    def give_up(why: str) -> None:
        print(f"llama-flash worker: {why}; the client is given up", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            pulse.give_up(why)
        os._exit(_GAVE_UP)  # the read may end later: what it writes to goes with the process

    threading.Thread(target=serving.watch_reads, args=(give_up,), name="llama-flash reads", daemon=True).start()
    line: Line | None = {"op": "open"}
    try:
        while line is not None:
            with pulse.working():
                answer = serving.answer(line)
            pulse.seconds = serving.pulse
            pulse.answer(answer)
            line = wire.receive()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it would keep the same, and wait for this
        serving.keep()
    except (OSError, FlashError) as error:
        print(f"llama-flash worker: the client was lost: {error}", file=sys.stderr, flush=True)
        code = 3
    sys.stdout.flush()
    os._exit(code)  # a graph may be under way


if __name__ == "__main__":
    main()

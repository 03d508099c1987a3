"""The workers of one model, seen from its client: opened before the load, asked after each call, closed with the model.

A worker is *lost* once it was not heard in time, left, or has sent nonsense. Then its connection for data is shut, so
that a call of the engine that waits for it returns at once; the call's results are void, and so is its KV cache.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import queue
import socket
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import FlashBudgetError, FlashError, FlashFormatError, FlashReadError, FlashWorkerError
from ..model.gguf import GgufMeta
from ..model.shape import ContextShape
from ..native import remote
from ..native.calls import discard_compute
from ..options import FlashOffload
from ..planning.lent import few_tokens
from .division import Offer, Part
from .identity import compare, identity_of, other_cpu
from .listen import read_token
from .placing import bundled_names, names_pattern
from .wire import Line, Wire, connect

__all__ = ["Remote", "Workers"]

logger = logging.getLogger("llama_flash")

_PULSE = 1.0  # seconds from one sign of life to the next
_STARTING = 60.0  # seconds that a worker's process for this client may take to begin
_TOO_MUCH = 1 << 63  # bytes
_AGAIN = "the model has to be loaded again, once the worker is there"


_live: weakref.WeakSet[Workers] = weakref.WeakSet()


class Remote:
    """One worker. Threads take turns.

    Raises:
        FlashWorkerError: it is not there, busy, has another model or build, or does not take the token.
    """

    def __init__(self, endpoint: str, options: FlashOffload, token: str, identity: dict[str, str]) -> None:
        self.endpoint, self._token, self._timeout = endpoint, token, float(options.worker_timeout)
        self.lost = ""  # why
        self.told: Line = {}  # statistics, as the last sign of life has told them
        self._lock = threading.Lock()
        self._data: socket.socket | None = None
        try:
            connection = connect(endpoint, self._timeout)
        except OSError as error:
            raise FlashWorkerError(
                f"worker {endpoint} cannot be reached: {_said(error)}; start it there (llama-flash worker), or name "
                "another",
                host=endpoint,
                is_away=True,
            ) from None
        self._wire = Wire(connection)
        connection.settimeout(_STARTING)
        hello = self.ask({"op": "open", "token": token})
        connection.settimeout(self._timeout)
        try:
            compare(identity, hello.get("identity"), endpoint)
            self.offer = replace(_offer_of(endpoint, hello), other_cpu=other_cpu(identity, hello.get("identity")))
        except FlashWorkerError:
            self.close()
            raise
        self._key = str(hello.get("key"))

    def open_data(self, homes: dict[str, int], few_tokens: int, neurons: Line) -> int:
        """The connection for data, of these weights; returns the worker's ggml_backend_dev_t.

        neurons: how active ones are found, where there are bundles.
        """
        pulse = self._timeout / 4
        self.ask({"op": "plan", "homes": homes, "few_tokens": few_tokens, "neurons": neurons, "pulse": pulse})
        try:
            connection = connect(self.endpoint, self._timeout)
            wire = Wire(connection)
            wire.send({"op": "data", "token": self._token, "key": self._key})
            answer = wire.receive(exactly=True)
        except OSError as error:
            raise self.lose(_said(error)) from None
        if answer != {"ok": True}:
            raise self.lose(f"its connection for data was refused: {answer}")
        connection.settimeout(None)  # the pulse says whether it is alive
        self._data = connection.dup()
        try:
            return remote.connect(self.endpoint, connection)
        except FlashReadError as error:
            raise self.lose(str(error)) from None

    def ask(self, line: Line) -> Line:
        """The answer to one line.

        Raises:
            FlashWorkerError: the worker is lost, or refuses.
            FlashReadError, FlashBudgetError, FlashFormatError: what it has to say of its file or budget.
        """
        with self._lock:
            if self.lost:
                raise self._error()
            try:
                answer = self._wire.ask(line)
            except (OSError, FlashError) as error:
                raise self.lose(_said(error)) from None
        told = answer.get("error")
        if isinstance(told, dict):
            raise self._told(told)
        return answer

    def settle(self) -> None:
        """Waits until it has done all that it was sent. Raises FlashWorkerError."""
        if remote.settle(self.endpoint):
            return
        why = "its connection for data has ended"
        try:
            self.ask({"op": "check"})  # it may have refused something, or have given up
        except FlashError as error:
            why = f"{why}: {error}"
        raise self.lose(why)

    def lose(self, why: str) -> FlashWorkerError:
        """Gives it up. Returns the error to raise."""
        self.lost = self.lost or why
        for connection in (self._data, self._wire.connection):
            if connection is not None:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        return self._error()

    def close(self, forked: bool = False) -> None:
        """May be called twice. forked: in a child of the process whose connections these are, and stay."""
        if not forked:
            self.lose("it was closed")
            if self._data is not None:
                remote.settle(self.endpoint)  # the engine knows it before Python ends, and with it the log
        if self._data is not None:
            self._data.close()
        self._wire.close()

    def _error(self) -> FlashWorkerError:
        said = f"worker {self.endpoint} is lost: {self.lost}; {_AGAIN}"
        return FlashWorkerError(said, host=self.endpoint, is_away=True)

    def _told(self, error: dict[str, Any]) -> FlashError:
        kind, said = error.get("kind"), f"worker {self.endpoint}: {error.get('message')}"
        if kind == "read":
            about = {name: error[name] for name in ("file", "offset", "size", "errno", "tensor") if name in error}
            return FlashReadError(said, **about)
        if kind == "budget":
            return FlashBudgetError(said, breakdown=error.get("breakdown", {}), smallest=int(error.get("smallest", 0)))
        if kind == "format":
            return FlashFormatError(said)
        return FlashWorkerError(said, host=self.endpoint, is_away=kind == "busy")


def _offer_of(endpoint: str, hello: Line) -> Offer:
    """What the greeting says that there is. Raises FlashWorkerError where that makes no sense."""

    def number(name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < _TOO_MUCH:  # NaN neither
            raise FlashWorkerError(f"worker {endpoint} says {value!r} where its {name} should be", host=endpoint)
        return value

    budget, held, reserve = (int(number(name, hello.get(name))) for name in ("budget", "held", "reserve"))
    flash_rate, dram_rate = (float(number(name, hello.get(name, 0))) for name in ("flash_rate", "dram_rate"))
    return Offer(endpoint, budget, held, reserve, flash_rate, dram_rate)


class Workers:
    """All workers of one model, in the order of its layers. To be closed after the model.

    Raises:
        FlashWorkerError: see Remote.
        FlashError, OSError: the token file cannot be used.
    """

    def __init__(self, options: FlashOffload, meta: GgufMeta) -> None:
        self._meta, self._pid = meta, os.getpid()
        token = read_token(_path(options.worker_token_file))
        identity = identity_of(meta)
        self.remotes: list[Remote] = []
        self.parts: list[Part] = []
        self._kept: list[object] = []  # what the engine has addresses of
        self._ended = threading.Event()
        self._is_attached = False
        self._context: Any = None  # llama_context pointer
        self._most_few = 0  # tokens of a call that generates, at most
        self._few: bool | None = False  # whether workers were told that calls are of few tokens; None: not all were
        self._asking = threading.Lock()
        self._askers: list[_Asker] = []  # of all but the first
        try:
            for endpoint in options.workers:
                self.remotes.append(Remote(endpoint, options, token, identity))
        except BaseException:
            self.close()
            raise
        self._askers += map(_Asker, self.remotes[1:])
        _live.add(self)
        for worker in self.remotes:  # one that takes long to answer keeps no other waiting for a sign of life
            threading.Thread(target=self._watch, args=(worker,), name="llama-flash workers", daemon=True).start()

    @property
    def offers(self) -> list[Offer]:
        """What they give."""
        return [remote.offer for remote in self.remotes]

    def place(
        self, model_params: Any, parts: Sequence[Part], few_tokens: int, options: FlashOffload
    ) -> list[tuple[list[str], int]]:
        """Enters them into llama_model_params, as devices with these parts.

        Returns patterns of names, and buffer types, of what has to be placed by name: bundles, which no device takes by
        itself.
        """
        self.parts = list(parts)
        for worker in self.remotes:
            if worker.offer.other_cpu:
                said = "worker %s has %s: answers are not promised to be those of one machine to the bit"
                logger.warning(said, worker.endpoint, worker.offer.other_cpu)
        neurons = {"predictor": options.predictor, "window": options.window}
        devices = [
            remote.open_data(dict(part.homes), few_tokens, neurons)
            for remote, part in zip(self.remotes, parts, strict=True)
        ]
        self._kept.append(remote.place_layers(model_params, devices, [len(part.layers) for part in parts]))
        bundled = [names_pattern(bundled_names(self._meta, part)) for part in parts]
        types = [remote.buffer_type_of(device) for device in devices]
        return [(names, kind) for names, kind in zip(bundled, types, strict=True) if names]

    @contextlib.contextmanager
    def binding(self) -> Iterator[None]:
        """Around the load of the model, in the thread that loads it."""
        try:
            with remote.binding(self._meta.files):
                yield
        except Exception as failure:
            self.raise_lost(failure)
            self.check(failure)  # the worker knows better
            raise
        for worker in self.remotes:
            worker.ask({"op": "bound"})

    def attach(self, context: Any, shape: ContextShape) -> None:
        """The context exists: each worker gives flash what its budget has left.

        Args:
            context: llama_context pointer; shape: of it.

        Raises:
            FlashBudgetError, FlashReadError, FlashWorkerError: from a worker, with its name.
        """
        about = {name: getattr(shape, name) for name in ("n_ctx", "n_ubatch", "n_sequences", "flash_attn")}
        for worker, part in zip(self.remotes, self.parts, strict=True):
            worker.settle()
            worker.ask({"op": "attach", "context": {**about, "kv": part.kv}})
        self._context, self._most_few, self._is_attached = context, few_tokens(shape.n_sequences), True

    def before_call(self, n_tokens: int = 0) -> None:
        """Before each call of the engine. n_tokens: of it; 0: nothing is computed.

        Raises:
            FlashWorkerError: a worker is lost.
            FlashError: in a forked child.
        """
        if os.getpid() != self._pid:
            raise FlashError(
                "this process is a child (fork) of the one that has loaded the model: load it in the child"
            )
        self.raise_lost()
        if n_tokens:
            self._tell_whether_few(n_tokens <= self._most_few)

    def _tell_whether_few(self, few: bool) -> None:
        """While calls are of few tokens, workers lend what only prompts need; before a prompt they take it back."""
        if few == self._few or not self._is_attached:
            return
        if few:
            discard_compute(self._context)  # at the workers, too
        self._few = None  # Ctrl-C may come in between
        for worker in self.remotes:
            worker.ask({"op": "few", "few": few})
        self._few = few

    def after_call(self, n_tokens: int = 0) -> None:
        """After each call of the engine, before its results are used. n_tokens: of it.

        Raises:
            FlashReadError: a read failed at a worker. The results are void; the model can be used again.
            FlashWorkerError: a worker is lost, or has refused something. The results are void.
        """
        with self._asking:
            for asker in self._askers:
                asker.ask(n_tokens)
            told = [_whether_well(self.remotes[0], n_tokens), *[asker.answer() for asker in self._askers]]
        for error in told:
            if error is not None:
                raise error

    def check(self, cause: BaseException | None = None) -> None:
        """Raises what workers have to say, the first of them; all are asked, so that none is left for the next call."""
        found: FlashError | None = None
        for worker in self.remotes:
            try:
                worker.ask({"op": "check"})
            except FlashError as error:
                found = found or error
        if found is not None:
            raise found from cause

    def stats(self) -> list[Line]:
        """What each worker has counted, and where its budget goes."""
        return [
            {"worker": worker.endpoint, "other_cpu": worker.offer.other_cpu, **worker.ask({"op": "stats"})}
            for worker in self.remotes
        ]

    def figures(self) -> list[Line]:
        """The same as of a second ago, and whether each is `lost`, without asking: nobody is waited for."""
        return [{**worker.told, "worker": worker.endpoint, "lost": worker.lost} for worker in self.remotes]

    @property
    def loss(self) -> FlashWorkerError | None:
        """The error that each call raises since a worker is lost."""
        try:
            self.raise_lost()
        except FlashWorkerError as error:
            return error
        return None

    def set_budget(self, endpoint: str, dram_budget: int | str) -> Line:
        """Another budget for the worker of that name, while the model runs. Returns where it goes.

        Raises:
            FlashBudgetError: it leaves too little; nothing has changed.
            FlashWorkerError: there is no such worker, it is lost, or it has nothing on flash.
        """
        for worker in self.remotes:
            if worker.endpoint == endpoint:
                return worker.ask({"op": "budget", "budget": dram_budget})
        raise FlashWorkerError(f"{endpoint} is none of the workers", host=endpoint)

    def explain(self, failure: Exception) -> None:
        """Raises FlashWorkerError if a load has failed because a worker is lost, and it does not say so itself."""
        if self._ended.is_set() or isinstance(failure, FlashWorkerError):
            return
        for worker in self.remotes:
            try:
                worker.settle()
            except FlashWorkerError as error:
                raise error from failure

    def raise_lost(self, cause: BaseException | None = None) -> None:
        """Raises FlashWorkerError where one is lost."""
        for worker in self.remotes:
            if worker.lost:
                raise worker.lose("") from cause

    def close(self) -> None:
        """May be called twice."""
        self._ended.set()
        forked = os.getpid() != self._pid
        for worker in self.remotes:
            worker.close(forked=forked)
        for asker in self._askers:
            asker.end()

    def _watch(self, worker: Remote) -> None:
        """Asks for signs of life: what does not answer in time is lost, also while a call waits for its results."""
        while not self._ended.wait(_PULSE):
            with contextlib.suppress(FlashError):
                if self._is_attached:
                    worker.told = worker.ask({"op": "stats"})
                else:
                    worker.ask({"op": "ping"})


@atexit.register
def _leave_all() -> None:
    """The engine's threads wait for answers: none come any more."""
    for workers in list(_live):
        workers.close()


class _Asker:
    """A thread that asks one worker while others are asked: distant workers cost their round trips once."""

    def __init__(self, worker: Remote) -> None:
        self._worker = worker
        self._n = self._n_tokens = 0  # questions so far; tokens of the last call
        self._asked: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()  # their numbers, 0: no more; tokens
        self._told: queue.SimpleQueue[tuple[int, FlashError | None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="llama-flash worker", daemon=True)
        self._thread.start()

    def ask(self, n_tokens: int) -> None:
        self._n, self._n_tokens = self._n + 1, n_tokens
        self._asked.put((self._n, n_tokens))

    def answer(self) -> FlashError | None:
        """To what was asked last. Where Ctrl-C came between, answers to what was asked before are there, too."""
        while True:
            try:
                number, error = self._told.get(timeout=_PULSE)
                if number == self._n:
                    return error
            except queue.Empty:
                if not self._thread.is_alive():
                    return _whether_well(self._worker, self._n_tokens)

    def end(self) -> None:
        self._asked.put((0, 0))

    def _run(self) -> None:
        number, n_tokens = self._asked.get()
        while number:
            self._told.put((number, _whether_well(self._worker, n_tokens)))
            number, n_tokens = self._asked.get()


def _whether_well(worker: Remote, n_tokens: int) -> FlashError | None:
    """Once it has done all that it was sent for so many tokens."""
    try:
        worker.settle()
        worker.ask({"op": "check", "tokens": n_tokens})
    except FlashError as error:
        return error
    return None


def _path(file: str | os.PathLike[str] | None) -> Path | None:
    return None if file is None else Path(file)


def _said(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "it did not answer in time"
    return getattr(error, "strerror", None) or str(error)

"""The engine's own tools with weights on flash: what they are told beside what the user says, and how they end.

    llama-flash exec -- perplexity ARGS  ->  the tool, in the main thread  ->  driver.py  ->  FlashSession

The tools read a terminal and wait for its signals, so they have the main thread.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..budget.cores import default_threads
from ..model.bundles import holds_bundles
from ..native.server import FAILED
from ..native.tools import run_tool
from ..options import FlashOffload
from ..session.session import FlashSession
from .driver import EngineDriver

__all__ = ["TOOLS", "run_engine_tool"]

_ENDS = (signal.SIGINT, signal.SIGTERM)
_PATIENCE = 2.0  # seconds that storing what was hot may take after a signal


@dataclass(frozen=True)
class _Default:
    """An option that is given where the user does not give it.

    Attributes:
        names: all that it has.
        value: None: it takes none. "": as many threads as may run.
        variable: of the environment, with which the user gives it, too.
    """

    names: tuple[str, ...]
    value: str | None
    variable: str = ""

    def arguments(self, given: Sequence[str]) -> list[str]:
        if any(name in given for name in self.names) or self.variable in os.environ:
            return []
        return [self.names[0], *([] if self.value is None else [self.value or str(default_threads())])]


_THREADS = _Default(("--threads", "-t"), "", "LLAMA_ARG_THREADS")
# the model would be loaded once more to look at it, and the context be as large as the machine allows
_NO_FIT = _Default(("--fit", "-fit"), "off")
# the logits of a pass are kept: 2048 rows of a large vocabulary, the default, are more than a GB
_BATCH = _Default(("--batch-size", "-b"), "512", "LLAMA_ARG_BATCH")
_NO_WARMUP = _Default(("--no-warmup", "--warmup"), None)
_LOADS = (_THREADS, _NO_FIT)

TOOLS: Mapping[str, tuple[_Default, ...]] = {
    "perplexity": (*_LOADS, _BATCH, _NO_WARMUP),
    "cli": (
        *(*_LOADS, _NO_WARMUP),
        _Default(("--ctx-size", "-c"), "4096", "LLAMA_ARG_CTX_SIZE"),  # else the most that the model was trained for
        _Default(("--cache-ram", "-cram"), "0", "LLAMA_ARG_CACHE_RAM"),  # 8 GiB that nobody counts
        _Default(("--ctx-checkpoints", "-ctxcp", "--swa-checkpoints"), "0", "LLAMA_ARG_CTX_CHECKPOINTS"),
    ),
    "imatrix": (*_LOADS, _BATCH),
    "bench": (_THREADS,),
    "quantize": (_Default(("--max-buffer-size",), "256"),),  # MiB of a tensor's rows, in place of 8 GiB: the same bytes
}
"""Without "llama-", and what each is told."""

_EVERY_LOGIT = ("perplexity", "imatrix")  # of a batch
_SAYS_REASONS = ("cli",)  # why a call has failed
# of llama-perplexity, which then keeps logits of its own
_KEEPS_LOGITS = (
    *("--kl-divergence", "--kl-divergence-base", "--save-all-logits", "--ppl-stride"),
    *("--hellaswag", "--winogrande", "--multiple-choice"),
)
_ADAPTERS = ("--lora", "--lora-scaled")
_PLACING = (
    *("--override-tensor", "-ot", "--cpu-moe", "-cmoe", "--n-cpu-moe", "-ncmoe"),
    *("--spec-draft-override-tensor", "-otd", "--override-tensor-draft"),
    *("--spec-draft-cpu-moe", "-cmoed", "--cpu-moe-draft"),
    *("--spec-draft-n-cpu-moe", "--spec-draft-ncmoe", "-ncmoed", "--n-cpu-moe-draft"),
    *("--fit-target", "-fitt", "--fit-ctx", "-fitc"),
    *("LLAMA_ARG_OVERRIDE_TENSOR", "LLAMA_ARG_CPU_MOE", "LLAMA_ARG_N_CPU_MOE"),
)


def run_engine_tool(
    name: str,
    arguments: Sequence[str],
    flash_offload: bool | FlashOffload,
    loaded: Callable[[FlashSession], None],
    failed: Callable[[str], None],
) -> int:
    """Runs a tool to its end, in the main thread. Some of its options and errors, and signals, end the process.

    Args:
        name: one of TOOLS, or that with "llama-" before it.
        arguments: the tool's own.
        flash_offload: as `Llama` takes it; False: the tool as it is.
        loaded: is called with each session, when its context exists.
        failed: is told why a call has failed, where the tool does not say it.

    Returns:
        Its exit status; 1 also where it is 0 and a call has failed.

    Raises:
        ValueError: no such tool, or an argument that does not go with flash.
        FlashError, OSError: a model could not be loaded.
    """
    tool = name.removeprefix("llama-")
    if tool not in TOOLS:
        raise ValueError(f"there is no tool {name}: there are {', '.join(sorted(TOOLS))}")
    if flash_offload:
        _refuse(arguments)
    driver = _ToolDriver(tool, arguments, flash_offload, loaded, failed)
    added = [argument for default in TOOLS[tool] for argument in default.arguments(arguments)]
    sys.stdout.flush()
    with _watched(driver.keep):
        status = run_tool(f"llama-{tool}", [*added, *arguments], driver)
    driver.close()
    if isinstance(driver.failure, FileNotFoundError):
        raise FileNotFoundError(f"no such model: {driver.failure.filename}")
    if driver.failure is not None:
        raise driver.failure
    return status or int(driver.call_failed)


def _refuse(arguments: Sequence[str]) -> None:
    """Raises ValueError for what would place weights elsewhere."""
    for given in (*arguments, *os.environ):
        if given in _PLACING:
            raise ValueError(f"{given} says where weights lie, which is decided here: leave it away, or use --no-flash")
    for name in _NO_FIT.names:
        if name in arguments and arguments[arguments.index(name) + 1 :][:1] != ["off"]:
            raise ValueError(f"{name}: the budget decides what fits: leave it away, or use --no-flash")


class _ToolDriver(EngineDriver):
    """Of one tool.

    Attributes:
        call_failed: whether one did.
    """

    def __init__(
        self,
        tool: str,
        arguments: Sequence[str],
        flash_offload: bool | FlashOffload,
        loaded: Callable[[FlashSession], None],
        failed: Callable[[str], None],
    ) -> None:
        super().__init__(flash_offload, loaded)
        self.call_failed = False
        self._failed = None if tool in _SAYS_REASONS else failed
        self._every_logit = tool in _EVERY_LOGIT
        self._keeps_logits = any(name in arguments for name in _KEEPS_LOGITS)
        self._adapters = bool(flash_offload) and any(name in arguments for name in _ADAPTERS)

    def load(self, path: str, model_params: Any, context_params: Any) -> int:
        if self._adapters and holds_bundles(path):
            self.failure = ValueError(f"{path} holds neuron bundles, to which no adapter is applied here: unbundle it")
            return 0
        if self._every_logit and not context_params.n_outputs_max:
            context_params.n_outputs_max = context_params.n_batch
        return super().load(path, model_params, context_params)

    def end(self, context: int, n_tokens: int, n_sequences: int, code: int) -> tuple[int, str]:
        code, reason = super().end(context, n_tokens, n_sequences, code)
        if code == FAILED and reason:
            self.call_failed = True
            if self._failed is not None:  # now: some tools end the process then
                self._failed(reason)
        return code, reason

    def keep(self) -> None:
        """Stores what was hot, from another thread."""
        for session in list(self._sessions.values()):
            with contextlib.suppress(Exception):  # the process is about to end
                session.keep()

    def _keeps_scores(self, context_params: Any) -> bool:
        """Also where a text is computed in several calls, whose logits are looked at together."""
        n_ctx = context_params.n_ctx // max(1, context_params.n_seq_max)
        return self._every_logit and (self._keeps_logits or n_ctx > context_params.n_batch)


@contextlib.contextmanager
def _watched(keep: Callable[[], None]) -> Iterator[None]:
    """SIGINT and SIGTERM end the process at once, after `keep`, unless the tool has handlers of its own.

    The main thread is in the tool and runs no handler of Python's: a thread waits for what their C part writes.
    """
    waits, tells = socket.socketpair()
    tells.setblocking(False)

    def watch() -> None:
        received = waits.recv(1)
        if received and received[0]:
            keeper = threading.Thread(target=keep, daemon=True)
            keeper.start()
            keeper.join(_PATIENCE)
            os._exit(128 + received[0])

    before = {
        number: signal.signal(number, lambda *_: None)
        for number in _ENDS
        if signal.getsignal(number) not in (signal.SIG_IGN, None)
    }
    wakeup = signal.set_wakeup_fd(tells.fileno())
    watcher = threading.Thread(target=watch, name="llama-flash-signals", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        tells.send(b"\0")
        watcher.join()
        waits.close()
        tells.close()

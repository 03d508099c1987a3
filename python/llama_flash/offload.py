"""Flash offload of one `llama_cpp.Llama`: the session behind `llm.flash`.

`Llama.__init__` calls, in this order: `open_session` before the model is loaded, `loading` around the load, `attach`
when the context exists; then `before_call` and `after_call` are around each llama_decode and llama_encode. Everything
that must stay in memory is there when `attach` divides the rest of the budget, so it is measured and not guessed.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import logging
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _bindings, engine, hot, usage
from .adapters import predictor_with
from .advice import advice_for
from .budget import Breakdown, Budget, held_by_process, refuse, reserve_of, resolve_budget
from .bundles import Bundles, holds_bundles
from .controller import Callback, Controller, FlashEvent
from .device_profile import DeviceProfile
from .errors import FlashBudgetError, FlashError, FlashFormatError
from .gguf_meta import (
    GgufMeta,
    check_is_model,
    check_vocabulary,
    claims_wide_heads,
    kind_of_file,
    read_gguf,
)
from .history import History
from .limits import check_addresses, check_threads, explain_files
from .options import FlashOffload
from .placement import ContextShape, Mode, Plan, choose_predictor, make_plan, work_bytes
from .profiles import recall
from .residency import Residency, Reuse, read_residency, read_reuse
from .sizes import format_size, parse_size
from .stats import Counters, FlashStats
from .trace import Recorder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .snapshot import Snapshot

__all__ = [
    "BufferTypeOverride",
    "FlashSession",
    "experts_ahead",
    "held_by_all",
    "io_choice",
    "neuron_params",
    "open_session",
]

logger = logging.getLogger("llama_flash")

_MODES = {
    "exact": _bindings.llama_flash_neuron_mode.LLAMA_FLASH_NEURONS_EXACT,
    "lowrank": _bindings.llama_flash_neuron_mode.LLAMA_FLASH_NEURONS_LOWRANK,
    "off": _bindings.llama_flash_neuron_mode.LLAMA_FLASH_NEURONS_OFF,
}
_PIECE = 1 << 20  # bytes of a read, at most
_NO_WINDOW = 0xFFFFFFFF
_MOVED = 0.05  # share of the memory that must have moved, for what was seen before not to count
_EXPERTS_AHEAD = 2  # of the next layer, most; see docs/measurements/2026-11-21-lookahead.md
_MERGE_GAP = 1.0  # of a record: what a read may cover without need to reach the next neuron
_IO_NAMES = {int(number): name for name, number in engine.IO_ENGINES.items()}

_NONE = Counters()

_live: weakref.WeakSet[FlashSession] = weakref.WeakSet()


class BufferTypeOverride(ctypes.Structure):
    """struct llama_model_tensor_buft_override"""

    _fields_ = (("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p))


@dataclass(frozen=True)
class _Progress:
    """What the calls so far have done; replaced as a whole, so that another thread may read it."""

    seen: Counters = _NONE  # the plugin's counters after the last call
    prompt: Counters = _NONE
    decode: Counters = _NONE
    last: Counters = _NONE


def neuron_params(mode: Mode, options: FlashOffload, bundles: Bundles, n_ubatch: int) -> Any:
    """`struct llama_flash_neuron_params` of a mode."""
    return _bindings.llama_flash_neuron_params(
        mode=_MODES[mode],
        window=_NO_WINDOW if options.window is None else options.window,
        n_ubatch=max(n_ubatch, 16),
        merge_gap=int(_MERGE_GAP * bundles.format.record_bytes),
        lookahead=options.lookahead,
    )


def experts_ahead(options: FlashOffload) -> int:
    """Most experts of the next layer that are read ahead of its router."""
    return _EXPERTS_AHEAD if options.lookahead else 0


def io_choice(options: FlashOffload, bundles: Bundles | None, profile: DeviceProfile | None) -> tuple[str, int]:
    """I/O engine and most reads in flight at once.

    Args:
        profile: of the device, if one was measured; it decides what the options leave open.
    """
    io_engine, depth = options.io_engine, options.io_depth or (128 if bundles else 32)
    if profile is not None and profile.source in ("measured", "cached"):
        if io_engine == "auto" and profile.faster == "pread":
            io_engine = "pread"
        depth = options.io_depth or profile.depth_for(bundles.format.record_bytes if bundles else _PIECE)
    return io_engine, depth


def open_session(
    flash_offload: bool | Mapping[str, Any] | FlashOffload | None,
    *,
    model_path: str,
    model_params: Any,
    context_params: Any,
    logits_all: bool,
    lora_path: str | None = None,
    verbose: bool = True,
) -> FlashSession | None:
    """Prepares flash offload of the model about to be loaded; None where `flash_offload` says off.

    Args:
        model_params: llama_model_params; the flash tensors are entered here, and the load mode becomes direct I/O, so
            that resident weights do not pass through the page cache.
        context_params: llama_context_params; gets the callback that stops a decode after a failed read.
        logits_all: whether logits of all tokens are kept (they take memory).
        lora_path: adapter that will be applied.
        verbose: print the line about the load to stderr.

    Raises:
        FlashBudgetError: the budget cannot work.
        FlashFormatError: not a GGUF file, shards missing, neuron bundles that contradict themselves; with flash offload
            off: no file at all (a folder, a pipe), or one with neuron bundles, which cannot be loaded without.
        FlashError: the plugin is missing.
        TypeError, ValueError: see FlashOffload.
    """
    options = FlashOffload.coerce(flash_offload)
    if options is None:
        if kind := kind_of_file(model_path):  # of which the engine would wait for the writer
            raise FlashFormatError(f"{model_path}: {kind}, not a GGUF file")
        if not model_params.vocab_only and holds_bundles(model_path):
            raise FlashFormatError(
                f"{model_path} holds neuron bundles: load it with flash_offload=True, or convert it back with "
                "`python -m gguf_tools unbundle`"
            )
        return None
    return FlashSession(options, model_path, model_params, context_params, logits_all, lora_path, verbose)


class FlashSession:
    """Flash offload of one model. `llm.flash` is one of these."""

    def __init__(
        self,
        options: FlashOffload,
        model_path: str,
        model_params: Any,
        context_params: Any,
        logits_all: bool,
        lora_path: str | None,
        verbose: bool,
    ) -> None:
        self.options = options
        self._handle: int | None = None  # struct llama_flash_session *
        self._pid = os.getpid()
        self._lib = engine.library()
        self._path = model_path
        self._verbose = verbose
        self._logits_all = logits_all
        self._lora_path = lora_path
        self._context_params = context_params
        self._progress = _Progress()
        self.history = History()  # of the last calls
        self.history.reset(None)
        self._final: FlashStats | None = None
        self._neuron_slots = 0
        self._beside = 0  # bytes of this model beside flash and interpreter
        self._granted = self._least = self._most = 0  # flash memory: on the way to, at least, at most
        self._moving = False
        self._settled = (0.0, 0)  # when memory was moved last, by time.monotonic(), and bytes of slots and pinned since
        self._hot: hot.Ids | None = None  # to be read in the background; None: not yet looked for
        self._hot_mark = ""
        self._callbacks: list[Callback] = []
        self._after_calls: list[Callable[[], None]] = []
        self._short = False
        self._urgent = False
        self._in_use = 0  # calls of the controller's under way
        self._close_later = False
        self.predictor = "none"  # how active neurons are found
        self.summary = ""  # the line about the load
        self.io_depth = 1  # most reads in flight
        self.recorder: Recorder | None = None  # of a trace (trace.py)

        Controller.of_process().begin_load(self)
        try:
            self._prepare(model_params, context_params)
        except BaseException as failure:
            Controller.of_process().end_load(self)
            if isinstance(failure, OSError):
                explain_files(failure, [model_path])
            raise

    def _prepare(self, model_params: Any, context_params: Any) -> None:
        options, model_path, logits_all = self.options, self._path, self._logits_all
        self._base = held_by_all(self)
        self.meta: GgufMeta = read_gguf(model_path)
        if not model_params.vocab_only:
            check_is_model(self.meta)
            if claims_wide_heads(self.meta):
                from .dry_run import check_model  # which needs this module

                check_model(model_path)
        check_vocabulary(self.meta, text=False)
        self.budget: Budget = resolve_budget(options.dram_budget, options.reserve, model_bytes=self.meta.file_bytes)
        if self.budget.asked is not None and self.budget.asked > self.budget.total:
            logger.warning(
                "dram_budget is %s, but %s leaves %s: that is used",
                format_size(self.budget.asked),
                self.budget.reason,
                format_size(self.budget.total),
            )
        if not logits_all and not context_params.embeddings:
            # Only the last token's logits are ever asked for: do not reserve n_ubatch rows of the vocabulary.
            context_params.n_outputs_max = 1
        self.plan: Plan = self._make_plan()
        self.memory: Breakdown = self.plan.expected
        if self.plan.bundles:
            how = predictor_with(self._lora_path, self.plan.bundles, options.predictor)
            if how != options.predictor:
                logger.warning("the LoRA adapter changes feed-forward blocks: active neurons are not looked for")
                self.options = options = replace(options, predictor=how)
        if model_params.vocab_only:
            self.plan = replace(self.plan, mode="nothing", tensors=())
        if self.plan.mode == "nothing":
            return
        needs = self.memory
        stacks = self._n_threads() * (8 << 20)
        check_addresses(needs.weights + needs.kv + needs.compute + needs.outputs + self.plan.flash_bytes + stacks)
        import llama_cpp

        if model_params.load_mode in (llama_cpp.LLAMA_LOAD_MODE_MLOCK, llama_cpp.LLAMA_LOAD_MODE_MMAP_MLOCK):
            logger.warning("use_mlock has no effect together with flash_offload")
        model_params.load_mode = llama_cpp.LLAMA_LOAD_MODE_DIRECT_IO
        model_params.lazy_mode = llama_cpp.LLAMA_LAZY_MODE_OFF  # tables that would be mapped go to flash
        if self.plan.mode == "flash":
            self._open()
            self._override(model_params)
            context_params.abort_callback = ctypes.cast(self._lib.llama_flash_abort, llama_cpp.ggml_abort_callback)
            context_params.abort_callback_data = self._handle

    def _make_plan(self) -> Plan:
        try:
            return make_plan(self.meta, self.options, self.budget, self._shape(), self._base - engine.settled())
        except FlashBudgetError as refused:
            if Controller.of_process().squeeze():  # other models have more than they need
                self._base = held_by_all(self)
                return self._make_plan()
            from . import planner  # which needs this module

            held = functools.partial(held_by_all, self)
            new = planner.smallest_budget_of(self.meta, self.options, self.budget, self._shape(), held, refused)
            raise new from None

    def _open(self) -> None:
        params = _bindings.llama_flash_params()
        io_engine, self.io_depth = io_choice(self.options, self.plan.bundles, recall(self._path))
        params.io_depth = self.io_depth
        params.io_engine = engine.IO_ENGINES[io_engine]
        params.io_threads = self.options.io_threads
        params.lookahead = experts_ahead(self.options)
        params.panel_bytes = parse_size(self.options.panel_bytes)
        error = _bindings.llama_flash_error()
        self._handle = self._lib.llama_flash_session_new(ctypes.byref(params), ctypes.byref(error))
        if not self._handle:
            engine.raise_error(error)
        _live.add(self)
        for name, only in self.plan.tables.items():
            self._call("llama_flash_session_add_rows", name.encode(), only)
        for bundle in self.plan.bundles.descriptions() if self.plan.bundles else ():
            self._call("llama_flash_session_add_bundle", ctypes.byref(bundle))

    def _override(self, model_params: Any) -> None:
        """Names the flash tensors' buffer type to the loader. The arrays must outlive the load."""
        patterns = [pattern.encode() for pattern in self.plan.patterns()]
        buft = self._lib.llama_flash_buffer_type()
        self._overrides = (BufferTypeOverride * (len(patterns) + 1))(
            *(BufferTypeOverride(pattern, buft) for pattern in patterns)
        )
        model_params.tensor_buft_overrides = ctypes.addressof(self._overrides)

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Around the load of the model, in the thread that loads it: binds the flash tensors.

        Raises:
            FlashError: what the plugin has to say, in place of the engine's own error.
        """
        if self._handle is None:
            yield
            return
        self._call("llama_flash_session_bind_begin")
        try:
            yield
        except Exception as failure:
            Controller.of_process().end_load(self)
            try:
                self._raise_pending()  # a weight that could not be read or bound
            except FlashError as error:
                raise error from failure
            finally:
                with contextlib.suppress(FlashError):  # what is missing is so because the engine stopped
                    self._call("llama_flash_session_bind_end")
            explain_files(failure, self.meta.files)
            raise
        else:
            self._call("llama_flash_session_bind_end")

    def attach(self, context: Any, scores_bytes: int) -> None:
        """Divides what the budget has left, when all that must stay in memory is there.

        Args:
            context: llama_context pointer.
            scores_bytes: bytes that the caller's own array of logits will take.

        Raises:
            FlashBudgetError: too little is left.
            FlashReadError: filling pinned panels failed.
        """
        try:
            self._attach(context, scores_bytes)
        finally:
            Controller.of_process().end_load(self)

    def _attach(self, context: Any, scores_bytes: int) -> None:
        if self.plan.mode == "nothing":
            self.memory = replace(self.memory, reserve=0)
            kind = "" if self.options.what == "auto" else f" of what={self.options.what!r}"
            self._say(f"{os.path.basename(self._path)} has no weights{kind} that could stay on flash: it runs as stock")
            return
        engine.trim_heap()
        buffers = _bindings.llama_flash_context_memory()
        if self._lib.llama_flash_get_context_memory(context, ctypes.byref(buffers)) != 0:
            raise FlashError("the engine does not tell the sizes of its buffers")
        # weights and KV cache have been written, graph buffers not yet
        held = held_by_process() - buffers.model - buffers.context
        shape = self._shape()
        n_outputs = shape.n_outputs * 4 * (self.meta.n_vocab + self.meta.number("embedding_length"))
        self.memory = Breakdown(
            interpreter=max(self._base, held + _promised(self)),
            weights=buffers.model,
            kv=buffers.context,
            compute=buffers.compute + work_bytes(self.meta, shape),
            outputs=n_outputs + scores_bytes,
            reserve=self.budget.reserve,
        )
        if self.plan.mode == "resident":
            if self.memory.fixed > self.budget.total:
                raise refuse(self.budget, self.memory, 0, self.options.reserve, advice=self._advice())
        else:
            self._divide()
        self._say(self._describe())
        if self.plan.mode == "flash" and self.options.follow:
            with contextlib.suppress(OSError):  # the file is gone already
                self._hot_mark = hot.fingerprint(self.meta.files, self._layout())
            Controller.of_process().join(self)
        check_threads(self._n_threads())

    def _advice(self) -> tuple[str, ...]:
        return advice_for(self.meta, self.plan, self.options, self._shape())

    def _divide(self) -> None:
        left = self.budget.total - self.memory.total
        needs = self._choose_predictor(left) if self.plan.bundles else self._requirements()
        if left < needs.min_memory:
            raise refuse(self.budget, self.memory, needs.min_memory, self.options.reserve, advice=self._advice())
        memory = self.memory
        self._beside = memory.fixed - memory.interpreter
        self._granted, self._most = min(left, needs.max_memory), needs.max_memory
        self._call("llama_flash_session_set_memory", self._granted)
        state = _bindings.llama_flash_resize()
        self._call("llama_flash_session_resize", self._granted, False, ctypes.byref(state))
        self._least = state.least
        self._note_memory()
        raw = self._raw()
        self._progress = _Progress(seen=Counters.from_struct(raw))
        self.history.reset(raw)

    def _note_memory(self) -> None:
        given = _bindings.llama_flash_memory()
        self._lib.llama_flash_session_memory(self._handle, ctypes.byref(given))
        before = self.memory
        self.memory = replace(
            before,
            slots=given.slots,
            pinned=given.pinned,
            stream=given.stream,
            bookkeeping=given.bookkeeping,
            weights=self._beside - before.kv - before.compute - before.outputs + given.resident,
        )
        self._neuron_slots = given.n_neuron_slots
        held = given.slots + given.pinned
        if abs(held - self._settled[1]) > _MOVED * held:
            self._settled = (time.monotonic(), held)

    # what the controller knows of it

    @property
    def asked(self) -> int | None:
        return self.budget.asked

    def reserve(self, total: int) -> int:
        return reserve_of(total, self.options.reserve)

    @property
    def fixed(self) -> int:
        return self._beside

    @property
    def certain(self) -> int:
        return self._beside - self.memory.compute - self.memory.outputs

    @property
    def interpreter(self) -> int:
        return self.memory.interpreter

    @property
    def granted(self) -> int:
        return self._granted

    @property
    def least(self) -> int:
        return self._least

    @property
    def most(self) -> int:
        return self._most

    @property
    def touched(self) -> int:
        with self._using() as handle:
            return 0 if handle is None else int(self._raw().resident_bytes)

    def move(self, n_bytes: int, urgent: bool) -> bool:
        with self._using() as handle:
            if handle is None or (n_bytes == self._granted and not self._moving):
                return True
            # what has begun in a hurry ends in a hurry
            self._urgent = urgent or (self._urgent and self._moving and n_bytes == self._granted)
            self._granted = n_bytes
            state = _bindings.llama_flash_resize()
            self._call("llama_flash_session_resize", n_bytes, self._urgent, ctypes.byref(state))
            self._moving = not state.done
            if state.done:
                self._note_memory()
            return bool(state.done)

    def limited(self, total: int, reserve: int, beside: int, reason: str) -> None:
        self.budget = replace(self.budget, total=total, reserve=reserve, reason=reason)
        self.memory = replace(self.memory, reserve=reserve, interpreter=beside)

    def warm(self) -> bool:
        with self._using() as handle:
            if handle is None or not self.options.warm_start or not hot.wanted():
                return False
            if self._hot is None:
                self._hot = hot.load(self.meta.files[0], self._hot_mark)
            if not len(self._hot):
                return False
            ids = np.ascontiguousarray(self._hot[:4096])
            done = ctypes.c_uint64()
            pointer = ids.ctypes.data_as(ctypes.POINTER(ctypes.c_uint64))
            self._call("llama_flash_session_warm", pointer, len(ids), ctypes.byref(done))
            self._hot = self._hot[done.value :]
            return len(self._hot) > 0

    def tell(self, event: FlashEvent) -> None:
        if event.kind == "short":
            if self._short:
                return  # once is enough
            logger.warning(
                "%s: %s leaves less than the %s of flash memory that cannot be given back while the model is loaded",
                os.path.basename(self._path),
                event.reason,
                format_size(event.after),
            )
        self._short = event.kind == "short" or (self._short and event.kind != "grow")
        for callback in list(self._callbacks):
            try:
                callback(event)
            except Exception:
                logger.exception("a callback of on_event failed")

    def describe(self) -> dict[str, object]:
        flash = {"granted": self._granted, "least": self._least, "most": self._most}
        with self._using():
            return {"path": os.path.abspath(self._path), **flash, **self.stats().as_dict()}

    @contextlib.contextmanager
    def _using(self) -> Iterator[int | None]:
        """The plugin's session, not freed meanwhile: garbage collection may want to close it in this very thread."""
        self._in_use += 1
        try:
            yield self._handle
        finally:
            self._in_use -= 1
            if self._close_later and not self._in_use:
                self._close_later = False
                self.close()

    # for users

    @property
    def window(self) -> float | None:
        """Tokens whose neurons fit into the slots: as set, else as many as have room; None without neuron bundles.

        An estimate from what the tokens generated so far have used.
        """
        if self.options.window is not None or not self.plan.bundles:
            return self.options.window
        decode = self._progress.decode
        if not decode.tokens or not decode.neurons_newly_active:
            return None
        active, newly = decode.neurons_per_token, decode.neurons_newly_active / decode.tokens
        return max(0.0, (self._neuron_slots - active) / newly)

    def set_budget(self, dram_budget: int | str) -> None:
        """Sets the DRAM budget of the process ("auto", bytes, a size, or a share of the model), while the model runs.

        Returns when what must be given back is given back. More memory is used as it is needed.

        Raises:
            FlashBudgetError: it leaves too little; nothing has changed.
            FlashError: the session does not follow limits (`follow=False`), or has nothing on flash.
            ValueError: not a budget.
        """
        self._check_process()
        replace(self.options, dram_budget=dram_budget)  # checks it
        if self._handle is None or not self.options.follow:
            raise FlashError("there is no flash memory to be moved: everything is resident, or follow=False")
        budget = resolve_budget(dram_budget, self.options.reserve, model_bytes=self.meta.file_bytes)

        def check(needed: int) -> None:
            if budget.total - budget.reserve < needed:
                rest = needed - self._least - self._beside
                bare = replace(self.memory, interpreter=rest, slots=0, pinned=0, bookkeeping=0, reserve=budget.reserve)
                bare = replace(bare, weights=bare.weights - self._kept())
                raise refuse(budget, bare, self._least, self.options.reserve)

        Controller.of_process().ask(self, budget.asked, check)

    def on_event(self, callback: Callback) -> None:
        """Calls `callback(event)`, a FlashEvent, whenever flash memory is given back or taken. From another thread."""
        self._callbacks.append(callback)

    def on_call(self, callback: Callable[[], None]) -> None:
        """Calls `callback()` after each llama_decode or llama_encode, in the thread that made it.

        What it raises ends the generation that the call belongs to; the model can be used again.
        """
        self._after_calls.append(callback)

    def _kept(self) -> int:
        """Bytes of resident parts that count as weights and are part of the flash memory."""
        return self.memory.weights + self.memory.kv + self.memory.compute + self.memory.outputs - self._beside

    def _layout(self) -> str:
        options = self.options
        return f"{[t.name for t in self.plan.tensors]} {options.panel_bytes} {self.plan.n_neurons}"

    def _keep_hot(self) -> None:
        """Remembers what is in slots, for the next load."""
        n = int(self._lib.llama_flash_session_hot(self._handle, None, 0))
        if not (n and self.options.warm_start and hot.wanted() and self.stats().total.tokens):
            return
        ids = np.empty(n, np.uint64)
        pointer = ids.ctypes.data_as(ctypes.POINTER(ctypes.c_uint64))
        n = min(n, int(self._lib.llama_flash_session_hot(self._handle, pointer, n)))
        with contextlib.suppress(OSError):  # the model is gone
            mark = self._hot_mark or hot.fingerprint(self.meta.files, self._layout())
            hot.save(self.meta.files[0], mark, ids[:n])

    def _keep_usage(self) -> None:
        """Remembers how experts and neurons were used, for plans."""
        if self.plan.mode != "flash" or not (self.options.warm_start and hot.wanted()):
            return
        calls = [call for call in self.history.calls() if call.began > self._settled[0]]
        seen = usage.observe(calls, self.plan, self.memory, self._requirements(), self.predictor)
        if seen is not None:
            with contextlib.suppress(OSError):  # the model is gone
                usage.save(self.meta.files, seen)

    def _requirements(self) -> Any:
        """`struct llama_flash_requirements`: what the flash tensors need."""
        needs = _bindings.llama_flash_requirements()
        self._lib.llama_flash_session_requirements(self._handle, ctypes.byref(needs))
        return needs

    def _choose_predictor(self, left: int) -> Any:
        """How active neurons are found, and what that needs; left: bytes there are for it."""
        assert self.plan.bundles is not None
        return choose_predictor(self._path, self.plan.bundles, self.options.predictor, left, self._set_predictor)

    def _set_predictor(self, mode: Mode) -> Any:
        assert self.plan.bundles is not None
        self.predictor = mode
        params = neuron_params(mode, self.options, self.plan.bundles, self._context_params.n_ubatch)
        self._call("llama_flash_session_set_neurons", ctypes.byref(params))
        return self._requirements()

    def before_call(self) -> None:
        """Before each llama_decode or llama_encode.

        Raises:
            FlashError: the process is a child of the one that has loaded the model.
        """
        self._check_process()
        self.history.begin()

    def after_call(self, n_tokens: int) -> None:
        """After each llama_decode or llama_encode of `n_tokens` tokens, whatever it returned.

        Raises:
            FlashReadError: a read failed during the call. Its results are void; the model can be used again.
        """
        self._check_process()
        before = self._progress
        raw = None if self._handle is None else self._raw()
        self.history.end(n_tokens, raw)
        seen = before.seen if raw is None else Counters.from_struct(raw)
        last = replace(seen - before.seen, tokens=n_tokens, calls=1)
        if n_tokens == 1:
            self._progress = _Progress(seen, before.prompt, before.decode + last, last)
        else:
            self._progress = _Progress(seen, before.prompt + last, before.decode, last)
        self._raise_pending()
        if self.recorder is not None:
            self.recorder.drain()
        for callback in self._after_calls:
            callback()

    def stats(self) -> FlashStats:
        """Budget, memory by part, and what was read: in total, for prompts, for generation and by the last call."""
        if self._final is not None:
            return self._final
        progress = self._progress
        now, in_use, io_engine = progress.seen, 0, "none"
        if self._handle is not None and not self._forked:
            raw = self._raw()
            now, in_use, io_engine = Counters.from_struct(raw), raw.resident_bytes, _IO_NAMES.get(raw.io_engine, "?")
        done = progress.prompt + progress.decode
        return FlashStats(
            mode=self.plan.mode,
            predictor=self.predictor,
            io_engine=io_engine,
            budget=self.budget,
            memory=self.memory,
            slots_in_use=in_use,
            resident_weights=self.plan.resident_bytes,
            flash_weights=self.plan.flash_bytes,
            n_neurons=self.plan.n_neurons,
            total=replace(now, tokens=done.tokens, calls=done.calls),
            prompt=progress.prompt,
            decode=progress.decode,
            last=progress.last,
        )

    def residency(self) -> Residency | None:
        """Which weights are in memory, when they were last used; None where nothing is on flash, or after close()."""
        with self._using() as handle:
            return None if handle is None else read_residency(self._lib, handle, self._call)

    def reuse(self) -> Reuse:
        """How soon experts and active neurons were used again; empty where residency() is None."""
        with self._using() as handle:
            return np.zeros(0, np.uint64) if handle is None else read_reuse(self._call)

    def snapshot(self) -> Snapshot:
        """What pictures are made of, as it is now. It can be saved, and drawn by another process."""
        from .snapshot import take

        return take(self)

    def plot(self, what: str | Sequence[str] = "all", path: str | os.PathLike[str] | None = None) -> Figure:
        """Pictures of the last 4096 calls, of what is in memory and of the device: docs/how-to/pictures.md.

        Args:
            what: "latency", "hits", "bytes", "reuse", "residency", "device", or several of these in one figure; "all":
                those that there is something to show for.
            path: where to write the figure to, too: .png, .svg or .pdf.

        Returns:
            A matplotlib Figure; a notebook shows it.

        Raises:
            FlashError: matplotlib (the extra `plot`) is missing, or there is nothing to show yet.
            ValueError: no such picture, or another kind of file.
            OSError: the file cannot be written.
        """
        from .pictures import draw

        return draw(self.snapshot(), what, path)

    def close(self) -> None:
        """Frees slots and closes files. `stats` keeps answering with the last numbers. May be called twice."""
        handle, lib = self._handle, self._lib
        if handle is None:
            return
        Controller.of_process().end_load(self)
        Controller.of_process().leave(self)
        if self._in_use and not self._forked:  # the threads that used it are the parent's
            self._close_later = True
            return
        if not sys.is_finalizing() and not self._forked:  # at the end of the interpreter it was done before
            self._keep_hot()
            self._keep_usage()
        self._final = self.stats()
        self._handle = None
        _live.discard(self)
        lib.llama_flash_session_free(handle)

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.close()

    @property
    def _forked(self) -> bool:
        """The process is a child of the one that has loaded the model."""
        return self._pid != os.getpid()

    def _check_process(self) -> None:
        if self._handle is not None and self._forked:
            raise FlashError(
                f"{self._path}: this process is a child (fork) of the one that has loaded the model, and cannot use "
                "it: load it in the child"
            )

    def _n_threads(self) -> int:
        return max(1, int(self._context_params.n_threads), int(self._context_params.n_threads_batch))

    def _shape(self) -> ContextShape:
        context = self._context_params
        n_ctx = context.n_ctx or self.meta.number("context_length", 4096)
        every = self._logits_all or bool(context.embeddings)
        return ContextShape(
            n_ctx=n_ctx,
            n_batch=context.n_batch,
            n_ubatch=context.n_ubatch,
            n_outputs=context.n_batch if every else 1,
            n_scores=n_ctx if self._logits_all else 0,
            type_k=context.type_k,
            type_v=context.type_v,
            flash_attn=context.flash_attn_type == 1,
            embedding=bool(context.embeddings),
        )

    def _raw(self) -> Any:
        raw = _bindings.llama_flash_stats()
        self._lib.llama_flash_session_stats(self._handle, ctypes.byref(raw))
        return raw

    def _call(self, function: str, *arguments: Any) -> None:
        error = _bindings.llama_flash_error()
        if getattr(self._lib, function)(self._handle, *arguments, ctypes.byref(error)) != 0:
            engine.raise_error(error)

    def _raise_pending(self) -> None:
        if self._handle is None:
            return
        error = _bindings.llama_flash_error()
        if self._lib.llama_flash_session_take_error(self._handle, ctypes.byref(error)) != 0:
            engine.raise_error(error)

    def _promised_bytes(self) -> int:
        """Bytes granted to this session that it has not touched yet."""
        with self._using() as handle:
            touched = 0 if handle is None else int(self._raw().resident_bytes) - self._kept()
            return 0 if handle is None else max(0, self.memory.flash - touched)

    def _describe(self) -> str:
        plan, memory, name = self.plan, self.memory, os.path.basename(self._path)
        budget = f"DRAM budget {format_size(self.budget.total)} ({self.budget.reason})"
        if plan.mode == "resident":
            return (
                f"{name}: all {format_size(memory.weights)} of weights resident, nothing on flash; {budget}; "
                "0 B read per token"
            )
        n_expert, n_used = max(1, self.meta.number("expert_count")), self.meta.number("expert_used_count")
        experts = plan.expert_bytes * n_used // n_expert
        missed = 1 - min(1.0, memory.slots / plan.expert_bytes) if plan.expert_bytes else 0.0
        per_token = int(experts * missed) + max(0, plan.panel_bytes - memory.pinned)
        if plan.bundles:
            return self._describe_neurons()
        return (
            f"{name}: {format_size(memory.weights)} of weights resident, {format_size(plan.flash_bytes)} on flash; "
            f"{budget}: {format_size(memory.slots)} of expert slots, {format_size(memory.pinned)} pinned, "
            f"{format_size(memory.stream)} ring; expected from flash: {format_size(per_token)} per token"
            + (" with uniform routing" if experts and missed else "")
        )

    def _describe_neurons(self) -> str:
        plan, memory = self.plan, self.memory
        assert plan.bundles is not None
        how = {
            "exact": "exact (gate resident)" if plan.bundles.format.gated else "exact (up resident)",
            "lowrank": "by low-rank predictors (lossy)",
            "off": f"off: whole {'experts' if plan.bundles.n_expert_used else 'layers'} are read",
        }[self.predictor]
        return (
            f"{os.path.basename(self._path)}: {format_size(memory.weights)} of weights resident, "
            f"{format_size(plan.flash_bytes)} on flash; active neurons {how}; DRAM budget "
            f"{format_size(self.budget.total)} ({self.budget.reason}): {format_size(memory.slots)} of slots for "
            f"{self._neuron_slots} of {plan.n_neurons} neurons, {format_size(memory.pinned)} pinned, "
            f"{format_size(memory.stream)} ring"
        )

    def _say(self, line: str) -> None:
        """One line, through logging if somebody listens, else on stderr."""
        self.summary = line
        logger.info("%s", line)
        if self._verbose and not (logger.isEnabledFor(logging.INFO) and logger.hasHandlers()):
            print(f"llama-flash: {line}", file=sys.stderr, flush=True)


@atexit.register
def _keep_all() -> None:
    for session in list(_live):
        if session._handle is not None and not session._forked:
            session._keep_hot()
            session._keep_usage()


def held_by_all(asking: FlashSession | None = None) -> int:
    """Bytes that this process holds before a model is loaded, with those that were granted to other models."""
    engine.trim_heap()
    return held_by_process() + _promised(asking)


def _promised(asking: FlashSession | None) -> int:
    with Controller.of_process().locked():
        return sum(session._promised_bytes() for session in list(_live) if session is not asking)

"""Flash offload of one `llama_cpp.Llama`: the session behind `llm.flash`, from before the load to its close.

`Llama.__init__` calls, in this order: `open_session` before the model is loaded, `loading` around the load, `attach`
when the context exists; then `before_call` and `after_call` are around each llama_decode and llama_encode. Everything
that must stay in memory is there when `attach` divides the rest of the budget, so it is measured and not guessed.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..budget.controller import Callback, Controller
from ..budget.held import granted, held_by_all, promised_by_all
from ..budget.limits import check_addresses, check_threads, explain_files
from ..budget.rooms import Breakdown, Budget, held_by_process, refuse, resolve_budget
from ..device.kept import recall
from ..errors import FlashBudgetError, FlashError, FlashFormatError
from ..file_kind import kind_of_file
from ..model.adapters import predictor_with
from ..model.bundles import holds_bundles
from ..model.gguf import GgufMeta, check_is_model, check_vocabulary, claims_wide_heads, read_gguf
from ..model.shape import ContextShape
from ..native import handle
from ..native.calls import abort_callback, context_memory, flash_buffer_type, override
from ..native.library import settled, trim_heap
from ..native.params import Mode, Requirements, neuron_params
from ..observe.history import History
from ..observe.residency import Residency, Reuse, read_residency
from ..observe.stats import FlashStats
from ..observe.trace import Recorder
from ..options import FlashOffload
from ..planning.advice import advice_for
from ..planning.dry_run import check_model
from ..planning.placed import Plan
from ..planning.placement import choose_predictor, make_plan, work_bytes
from ..planning.planner import smallest_budget_of
from ..planning.reads import experts_ahead, io_choice
from ..sizes import format_size, parse_size
from .account import Account
from .describe import line_about, nothing_to_offload
from .memento import Memento
from .share import Share

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..observe.snapshot import Snapshot

__all__ = ["FlashSession", "open_session"]

logger = logging.getLogger("llama_flash")

_STACK = 8 << 20  # bytes of addresses of a thread

_live: weakref.WeakSet[FlashSession] = weakref.WeakSet()


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
        self.account = Account()
        self.share = Share(model_path, options, self.account)
        self._path = model_path
        self._verbose = verbose
        self._logits_all = logits_all
        self._lora_path = lora_path
        self._context_params = context_params
        self._after_calls: list[Callable[[], None]] = []
        self.summary = ""  # the line about the load
        self.io_depth = 1  # most reads in flight
        self.recorder: Recorder | None = None  # of a trace (observe/trace.py)

        Controller.of_process().begin_load(self)
        try:
            self._prepare(model_params, context_params)
        except BaseException as failure:
            Controller.of_process().end_load(self)
            if isinstance(failure, OSError):
                explain_files(failure, [model_path])
            raise

    # the load

    def _prepare(self, model_params: Any, context_params: Any) -> None:
        options, model_path, logits_all = self.options, self._path, self._logits_all
        self._base = held_by_all(self.share)
        self.meta: GgufMeta = read_gguf(model_path)
        if not model_params.vocab_only:
            check_is_model(self.meta)
            if claims_wide_heads(self.meta):
                check_model(model_path)
        check_vocabulary(self.meta, text=False)
        self.share.budget = resolve_budget(options.dram_budget, options.reserve, model_bytes=self.meta.file_bytes)
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
        self.account.plan = self._make_plan()
        self.share.memory = self.plan.expected
        if self.plan.bundles:
            how = predictor_with(self._lora_path, self.plan.bundles, options.predictor)
            if how != options.predictor:
                logger.warning("the LoRA adapter changes feed-forward blocks: active neurons are not looked for")
                self.options = replace(options, predictor=how)
        if model_params.vocab_only:
            self.account.plan = replace(self.plan, mode="nothing", tensors=())
        if self.plan.mode == "nothing":
            return
        needs = self.memory
        stacks = self._n_threads() * _STACK
        check_addresses(needs.weights + needs.kv + needs.compute + needs.outputs + self.plan.flash_bytes + stacks)
        self._set_load_mode(model_params)
        if self.plan.mode == "flash":
            native = self._open()
            self._overrides = override(model_params, self.plan.patterns(), flash_buffer_type())
            context_params.abort_callback = abort_callback()
            context_params.abort_callback_data = native.address

    def _make_plan(self) -> Plan:
        try:
            return make_plan(self.meta, self.options, self.budget, self._shape(), self._base - settled())
        except FlashBudgetError as refused:
            if Controller.of_process().squeeze():  # other models have more than they need
                self._base = held_by_all(self.share)
                return self._make_plan()
            held = functools.partial(held_by_all, self.share)
            raise smallest_budget_of(self.meta, self.options, self.budget, self._shape(), held, refused) from None

    @staticmethod
    def _set_load_mode(model_params: Any) -> None:
        import llama_cpp

        if model_params.load_mode in (llama_cpp.LLAMA_LOAD_MODE_MLOCK, llama_cpp.LLAMA_LOAD_MODE_MMAP_MLOCK):
            logger.warning("use_mlock has no effect together with flash_offload")
        model_params.load_mode = llama_cpp.LLAMA_LOAD_MODE_DIRECT_IO
        model_params.lazy_mode = llama_cpp.LLAMA_LAZY_MODE_OFF  # tables that would be mapped go to flash

    def _open(self) -> handle.Session:
        io_engine, self.io_depth = io_choice(self.options, self.plan.bundles, recall(self._path))
        native = self.share.native = handle.Session(
            io_engine,
            io_depth=self.io_depth,
            io_threads=self.options.io_threads,
            lookahead=experts_ahead(self.options),
            panel_bytes=parse_size(self.options.panel_bytes),
        )
        self.share.memento = Memento(self.meta, self.options, self.plan)
        granted.add(self.share)
        _live.add(self)
        for name, only in self.plan.tables.items():
            native.add_rows(name, only)
        for bundle in self.plan.bundles.descriptions() if self.plan.bundles else ():
            native.add_bundle(bundle)
        return native

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Around the load of the model, in the thread that loads it: binds the flash tensors.

        Raises:
            FlashError: what the plugin has to say, in place of the engine's own error.
        """
        native = self.native
        if native is None:
            yield
            return
        native.bind_begin()
        try:
            yield
        except Exception as failure:
            Controller.of_process().end_load(self)
            try:
                native.raise_pending()  # a weight that could not be read or bound
            except FlashError as error:
                raise error from failure
            finally:
                with contextlib.suppress(FlashError):  # what is missing is so because the engine stopped
                    native.bind_end()
            explain_files(failure, self.meta.files)
            raise
        else:
            native.bind_end()

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
            self.share.memory = replace(self.memory, reserve=0)
            self._say(nothing_to_offload(self.name, self.options.what))
            return
        self.share.memory = self._measured(context, scores_bytes)
        if self.plan.mode == "resident":
            if self.memory.fixed > self.budget.total:
                raise refuse(self.budget, self.memory, 0, self.options.reserve, advice=self._advice())
        else:
            self._divide()
        self._say(self._line())
        if self.plan.mode == "flash" and self.options.follow:
            assert self.share.memento is not None
            self.share.memento.note_files()
            Controller.of_process().join(self.share)
        check_threads(self._n_threads())

    def _measured(self, context: Any, scores_bytes: int) -> Breakdown:
        """What is there before flash gets memory."""
        trim_heap()
        buffers = context_memory(context)
        # weights and KV cache have been written, graph buffers not yet
        held = held_by_process() - buffers.model - buffers.context
        shape = self._shape()
        n_outputs = shape.n_outputs * 4 * (self.meta.n_vocab + self.meta.number("embedding_length"))
        return Breakdown(
            interpreter=max(self._base, held + promised_by_all(self.share)),
            weights=buffers.model,
            kv=buffers.context,
            compute=buffers.compute + work_bytes(self.meta, shape),
            outputs=n_outputs + scores_bytes,
            reserve=self.budget.reserve,
        )

    def _divide(self) -> None:
        native = self.native
        assert native is not None
        left = self.budget.total - self.memory.total
        needs = self._choose_predictor(left) if self.plan.bundles else native.requirements()
        if left < needs.min_memory:
            raise refuse(self.budget, self.memory, needs.min_memory, self.options.reserve, advice=self._advice())
        self.share.give(left, needs)
        self.account.begin(native)

    def _choose_predictor(self, left: int) -> Requirements:
        """How active neurons are found, and what that needs; left: bytes there are for it."""
        assert self.plan.bundles is not None
        return choose_predictor(self._path, self.plan.bundles, self.options.predictor, left, self._set_predictor)

    def _set_predictor(self, mode: Mode) -> Requirements:
        native, bundles = self.native, self.plan.bundles
        assert native is not None and bundles is not None
        self.account.predictor = mode
        n_ubatch = self._context_params.n_ubatch
        native.set_neurons(neuron_params(mode, self.options, bundles.format.record_bytes, n_ubatch))
        return native.requirements()

    def _advice(self) -> tuple[str, ...]:
        return advice_for(self.meta, self.plan, self.options, self._shape())

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

    def _n_threads(self) -> int:
        return max(1, int(self._context_params.n_threads), int(self._context_params.n_threads_batch))

    def _line(self) -> str:
        share = self.share
        return line_about(
            self.name, self.meta, self.plan, share.budget, share.memory, self.predictor, share.neuron_slots
        )

    def _say(self, line: str) -> None:
        """One line, through logging if somebody listens, else on stderr."""
        self.summary = line
        logger.info("%s", line)
        if self._verbose and not (logger.isEnabledFor(logging.INFO) and logger.hasHandlers()):
            print(f"llama-flash: {line}", file=sys.stderr, flush=True)

    # calls of the engine

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
        native = self.native
        self.account.add(n_tokens, native)
        if native is not None:
            native.raise_pending()
        if self.recorder is not None:
            self.recorder.drain()
        for callback in self._after_calls:
            callback()

    def _check_process(self) -> None:
        native = self.native
        if native is not None and native.forked:
            raise FlashError(
                f"{self._path}: this process is a child (fork) of the one that has loaded the model, and cannot use "
                "it: load it in the child"
            )

    # what it is

    @property
    def native(self) -> handle.Session | None:
        """The plugin's session; None where nothing is on flash, or after close()."""
        return self.share.native

    @property
    def name(self) -> str:
        """Of the model's file."""
        return os.path.basename(self._path)

    @property
    def ubatches(self) -> int:
        """That a call is computed in, at most."""
        params = self._context_params
        return -(-max(1, params.n_batch) // max(1, params.n_ubatch))

    @property
    def plan(self) -> Plan:
        """What is on flash, and why."""
        return self.account.plan

    @property
    def predictor(self) -> str:
        """How active neurons are found; "none" without neuron bundles."""
        return self.account.predictor

    @property
    def history(self) -> History:
        """Of the last calls."""
        return self.account.history

    @property
    def budget(self) -> Budget:
        """Of the process, as it is now."""
        return self.share.budget

    @property
    def memory(self) -> Breakdown:
        """Where the budget goes, as it is now."""
        return self.share.memory

    # for users

    @property
    def window(self) -> float | None:
        """Tokens whose neurons fit into the slots: as set, else as many as have room; None without neuron bundles.

        An estimate from what the tokens generated so far have used.
        """
        if self.options.window is not None or not self.plan.bundles:
            return self.options.window
        decode = self.account.decode
        if not decode.tokens or not decode.neurons_newly_active:
            return None
        active, newly = decode.neurons_per_token, decode.neurons_newly_active / decode.tokens
        return max(0.0, (self.share.neuron_slots - active) / newly)

    def set_budget(self, dram_budget: int | str) -> None:
        """Sets the DRAM budget of the process ("auto", bytes, a size, or a share of the model), while the model runs.

        Returns when what must be given back is given back. More memory is used as it is needed.

        Raises:
            FlashBudgetError: it leaves too little; nothing has changed.
            FlashError: the session does not follow limits (`follow=False`), or has nothing on flash.
            ValueError: not a budget.
        """
        self._check_process()
        self.share.set_budget(dram_budget, self.meta.file_bytes)

    def on_event(self, callback: Callback) -> None:
        """Calls `callback(event)`, a FlashEvent, whenever flash memory is given back or taken. From another thread."""
        self.share.on_event(callback)

    def on_call(self, callback: Callable[[], None]) -> None:
        """Calls `callback()` after each llama_decode or llama_encode, in the thread that made it.

        What it raises ends the generation that the call belongs to; the model can be used again.
        """
        self._after_calls.append(callback)

    def stats(self) -> FlashStats:
        """Budget, memory by part, and what was read: in total, for prompts, for generation and by the last call."""
        return self.account.stats(self.budget, self.memory, self.native)

    def describe(self) -> dict[str, object]:
        """What `llama-flash top` and the server show of it."""
        return self.share.describe()

    def residency(self) -> Residency | None:
        """Which weights are in memory, when they were last used; None where nothing is on flash, or after close()."""
        native = self.native
        if native is None:
            return None
        with native.using() as is_open:
            return read_residency(native) if is_open else None

    def reuse(self) -> Reuse:
        """How soon experts and active neurons were used again; empty where residency() is None."""
        native = self.native
        if native is None:
            return np.zeros(0, np.uint64)
        with native.using() as is_open:
            return native.reuse() if is_open else np.zeros(0, np.uint64)

    def snapshot(self) -> Snapshot:
        """What pictures are made of, as it is now. It can be saved, and drawn by another process."""
        from ..observe.snapshot import take

        stats, bundles = self.stats(), self.plan.bundles
        return take(
            self.meta.files[0],
            stats,
            self.history.calls(),
            window=self.window,
            picks_neurons=bundles is not None and (stats.predictor != "off" or bundles.n_expert_used > 0),
            reuse=self.reuse(),
            residency=self.residency(),
        )

    def plot(self, what: str | Sequence[str] = "all", path: str | os.PathLike[str] | None = None) -> Figure:
        """Pictures of the last 4096 calls, of what is in memory and of the device: docs/pictures.md.

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
        from ..observe.pictures import draw

        return draw(self.snapshot(), what, path)

    # the end

    def close(self) -> None:
        """Frees slots and closes files. `stats` keeps answering with the last numbers. May be called twice."""
        native = self.native
        if native is None:
            return
        Controller.of_process().end_load(self)
        Controller.of_process().leave(self.share)
        if not native.forked and native.postpone(self.close):  # in a child, the threads that use it are the parent's
            return
        if not sys.is_finalizing() and not native.forked:  # at the end of the interpreter it was done before
            self._keep()
        self.account.finish(self.budget, self.memory, native)
        self.share.native = None
        granted.discard(self.share)
        _live.discard(self)
        native.close()

    def __del__(self) -> None:
        if "share" in self.__dict__ and self.native is not None:
            self.close()

    def _keep(self) -> None:
        """Remembers what is of use for the next load, and for plans."""
        native, memento = self.native, self.share.memento
        if native is None or memento is None or native.forked:
            return
        if self.stats().total.tokens:
            memento.keep_hot(native)
        memento.keep_usage(native, self.history, self.share.settled, self.memory, self.predictor)


@atexit.register
def _keep_all() -> None:
    for session in list(_live):
        session._keep()

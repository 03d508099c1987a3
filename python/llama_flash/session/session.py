"""Flash offload of one `llama_cpp.Llama`: the session behind `llm.flash`, from before the load to its close.

`Llama.__init__` calls, in this order: `open_session` before the model is loaded, `loading` around the load, `attach`
when the context exists; then `before_call` and `after_call` are around each llama_decode and llama_encode.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..budget.controller import Callback, Controller
from ..budget.rooms import Breakdown, Budget
from ..drafts.drafter import Drafter
from ..errors import FlashError, FlashFormatError, FlashWorkerError
from ..file_kind import kind_of_file
from ..model.bundles import holds_bundles
from ..model.gguf import GgufMeta
from ..native import handle
from ..native.prompts import Tokens
from ..observe.history import History
from ..observe.residency import Residency, Reuse, read_residency
from ..observe.stats import FlashStats
from ..observe.trace import Recorder
from ..options import FlashOffload
from ..planning.lent import FEW_TOKENS
from ..planning.placed import Plan
from ..prompts.store import PromptStore
from .account import Account
from .keeper import PromptKeeper
from .loading import Load
from .share import Share
from .steps import Steps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..observe.snapshot import Snapshot

__all__ = ["FlashSession", "open_session"]

logger = logging.getLogger("llama_flash")

_live: weakref.WeakSet[FlashSession] = weakref.WeakSet()


def open_session(
    flash_offload: bool | Mapping[str, Any] | FlashOffload | None,
    *,
    model_path: str,
    model_params: Any,
    context_params: Any,
    logits_all: bool,
    lora_path: str | None = None,
    aside: int = 0,
    drafts: bool = True,
    verbose: bool = True,
) -> FlashSession | None:
    """Prepares flash offload of the model about to be loaded; None where `flash_offload` says off.

    Args:
        model_params: llama_model_params; the flash tensors are entered here, and the load mode becomes direct I/O, so
            that resident weights do not pass through the page cache.
        context_params: llama_context_params; gets the callback that stops a decode after a failed read.
        logits_all: whether logits of all tokens are kept (they take memory).
        lora_path: adapter that will be applied.
        aside: bytes that the caller will keep beside the context, as in ContextShape.
        drafts: False: the caller has guesses of its own, so what the options say of drafts is left out.
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
    if not drafts:
        options = replace(options, draft="off")
    return FlashSession(options, model_path, model_params, context_params, logits_all, lora_path, aside, verbose)


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
        aside: int,
        verbose: bool,
    ) -> None:
        self.account = Account()
        self.share = Share(model_path, options, self.account)
        self.recorder: Recorder | None = None  # of a trace (observe/trace.py)
        self.prompts: PromptStore | None = None  # what is kept of prompts, and who does it for a Llama
        self.keeper: PromptKeeper | None = None
        self.drafter: Drafter | None = None  # what `Llama` asks for guesses
        self.steps: Steps | None = None  # of calls with several sequences, where all tokens take the same weights
        self._began = 0.0  # of the call under way, by time.perf_counter()
        self._computing = 0  # tokens of it, with those for nothing
        self._after_calls: list[Callable[[], None]] = []
        self._context: Any = None
        self._load = Load(
            model_path,
            options,
            self.share,
            self.account,
            model_params=model_params,
            context_params=context_params,
            logits_all=logits_all,
            lora_path=lora_path,
            aside=aside,
            verbose=verbose,
        )
        if self.native is not None or self.options.prompt_cache is not False:
            _live.add(self)

    # the load

    def loading(self) -> AbstractContextManager[None]:
        """Around the load of the model, in the thread that loads it: binds the flash tensors.

        Raises:
            FlashError: what the plugin has to say, in place of the engine's own error.
        """
        return self._load.loading()

    def attach(self, context: Any, scores_bytes: int) -> None:
        """Divides what the budget has left, when all that must stay in memory is there.

        Args:
            context: llama_context pointer.
            scores_bytes: bytes that the caller's own array of logits will take.

        Raises:
            FlashBudgetError: too little is left.
            FlashReadError: filling pinned panels failed.
        """
        self._load.attach(context, scores_bytes)
        self._context = context
        self.prompts = self._load.open_prompts(context)
        if self.prompts is not None:
            self._load.summary += f"; prompts are kept in {self.prompts.folder.path}"
            self.account.prompts = lambda store=self.prompts: store.stats  # type: ignore[misc]
        self.steps = self._load.steps(context)
        if self.steps is not None:
            self.account.steps = lambda steps=self.steps: steps.stats  # type: ignore[misc]
        self.drafter = self._load.drafter(context)
        if self.drafter is not None:
            self.account.drafts = lambda drafter=self.drafter: drafter.stats  # type: ignore[misc]
            self.drafter.on_accepted(self.account.accepted)

    # calls of the engine

    def even(self, counts: Sequence[int]) -> Sequence[int]:
        """Before a call in which sequence i has counts[i] tokens: how many to compute, some of them for nothing."""
        return counts if self.steps is None else self.steps.even(counts)

    def before_call(self, n_tokens: int) -> None:
        """Before each llama_decode or llama_encode of `n_tokens` tokens, those for nothing included.

        Raises:
            FlashError: the process is a child of the one that has loaded the model.
            FlashWorkerError: a worker is lost.
        """
        self.check_process()
        if self._load.workers is not None:
            self._load.workers.before_call(n_tokens)
        self.share.before_call(n_tokens)
        self.history.begin()
        self._computing, self._began = n_tokens, time.perf_counter()

    def before_state(self) -> None:
        """Before a saved state is loaded into the KV cache.

        Raises:
            FlashError: see before_call.
        """
        self.check_process()
        if self._load.workers is not None:
            self._load.workers.before_call(self._load.n_ctx)
        self.share.before_call(self._load.n_ctx)

    def after_call(self, n_tokens: int, n_sequences: int = 1) -> None:
        """After each llama_decode or llama_encode of `n_tokens` tokens of so many sequences, whatever it returned.

        Tokens that were computed for nothing are not among them.

        Raises:
            FlashReadError: a read failed during the call, here or at a worker. Its results are void; the model can be
                used again.
            FlashWorkerError: a worker was lost. The results are void; the model has to be loaded again.
        """
        self.check_process()
        native, drafter, seconds = self.native, self.drafter, time.perf_counter() - self._began
        drafted = drafter.n_drafted if drafter and drafter.passed(n_tokens, seconds, self._computing) else 0
        if self.steps is not None:
            self.steps.took(self._computing, n_sequences, seconds)
        self.account.add(n_tokens, native, n_sequences, drafted)
        self.share.after_call(self._computing)
        try:
            if native is not None:
                native.raise_pending()
        finally:
            self._ask_workers(self._computing)
        if self.recorder is not None:
            self.recorder.drain()
        for callback in self._after_calls:
            callback()

    def computed(self, batch: Any) -> None:
        """After a llama_decode that has succeeded, with its llama_batch, whose tokens have one sequence each."""
        if self._load.head is not None and batch.token and not batch.embd:
            n = (batch.n_tokens,)
            sequences = np.array([batch.seq_id[i][0] for i in range(batch.n_tokens)], np.intc)
            self.follow(np.ctypeslib.as_array(batch.token, n), np.ctypeslib.as_array(batch.pos, n), sequences)

    def follow(self, tokens: Tokens, positions: Tokens, sequences: Tokens) -> None:
        """The model has computed these tokens, at these positions of these sequences; -1: a vector in place of a token.

        A head that cannot follow ends the drafts.
        """
        head, drafter = self._load.head, self.drafter
        if head is None or drafter is None or drafter.has_failed:
            return
        began = time.perf_counter()
        try:
            n_computed = head.computed(tokens, positions, sequences, worth=drafter.has_credit)
        except FlashError as error:
            drafter.fail(error)
            return
        if n_computed and len(tokens) <= FEW_TOKENS:  # of a prompt, it is what a draft model reads of it, too
            drafter.followed(time.perf_counter() - began)

    def leave_context(self) -> None:
        """Before the model's context is freed, and the model. May be called twice."""
        if self._load.head is not None:
            self._load.close_draft()

    def leave_workers(self, failure: Exception) -> None:
        """The load has failed. Raises FlashWorkerError if that was because a worker is lost."""
        workers = self._load.workers
        if workers is not None:
            try:
                workers.explain(failure)
            finally:
                workers.close()

    def check_workers(self) -> None:
        """Whether all workers are there, and what they have done so far holds.

        Raises:
            FlashWorkerError: one is lost.
            FlashReadError: a read has failed at one.
        """
        if self._load.workers is not None:
            self._load.workers.before_call()
            self._ask_workers()

    def _ask_workers(self, n_tokens: int = 0) -> None:
        """Whether what they have computed holds, once all of it has been."""
        if self._load.workers is not None:
            import llama_cpp

            llama_cpp.llama_synchronize(self._context)
            self._load.workers.after_call(n_tokens)

    def worker_stats(self) -> list[dict[str, Any]]:
        """What each worker has read, where its budget goes and how it finds active neurons ("predictor"; "none" without
        bundles), in the order of the layers; empty without workers.

        Raises:
            FlashWorkerError: one is lost.
        """
        return [] if self._load.workers is None else self._load.workers.stats()

    def worker_figures(self) -> list[dict[str, Any]]:
        """What worker_stats says, as of a second ago, and of each in `lost` why it is lost ("": it is not). Nobody is
        asked or waited for."""
        return [] if self._load.workers is None else self._load.workers.figures()

    @property
    def loss(self) -> FlashWorkerError | None:
        """Why the model has to be loaded again, if a worker is lost."""
        return None if self._load.workers is None else self._load.workers.loss

    def set_worker_budget(self, worker: str, dram_budget: int | str) -> None:
        """Sets the DRAM budget of a worker ("host:port"), while the model runs; as `set_budget` does for this process.

        Raises:
            FlashBudgetError: it leaves too little; nothing has changed.
            FlashWorkerError: there is no such worker, it is lost, or it has nothing on flash.
        """
        if self._load.workers is None:
            raise FlashWorkerError(f"{worker} is none of the workers: there are none", host=worker)
        self._load.workers.set_budget(worker, dram_budget)

    def keeper_of(self, llm: Any) -> PromptKeeper | None:
        """Who keeps the prompts of this Llama; None where nobody does."""
        if self.prompts is None:
            return None
        if self.keeper is None:
            self.keeper = PromptKeeper(self.prompts, llm, self._load.lora_path)
        return self.keeper

    def check_process(self) -> None:
        """Raises FlashError in a forked child: what its parent's other threads were changing is half changed there."""
        native = self.native
        if native is not None and native.forked:
            raise FlashError(
                f"{self.share.path}: this process is a child (fork) of the one that has loaded the model, and cannot "
                "use it: load it in the child"
            )

    # what it is

    @property
    def native(self) -> handle.Session | None:
        """The plugin's session; None where nothing is on flash, or after close()."""
        return self.share.native

    @property
    def options(self) -> FlashOffload:
        """As they are in force."""
        return self._load.options

    @property
    def meta(self) -> GgufMeta:
        """What the model's file says."""
        return self._load.meta

    @property
    def name(self) -> str:
        """Of the model's file."""
        return self._load.name

    @property
    def summary(self) -> str:
        """The line about the load."""
        return self._load.summary

    @property
    def io_depth(self) -> int:
        """Most reads in flight."""
        return self._load.io_depth

    @property
    def ubatches(self) -> int:
        """That a call is computed in, at most."""
        return self._load.ubatches

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
        return self.share.told

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
        self.check_process()
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
            drafts=[(drafted, taken) for drafted, taken, *_ in self.drafter.last] if self.drafter else (),
        )

    def plot(self, what: str | Sequence[str] = "all", path: str | os.PathLike[str] | None = None) -> Figure:
        """Pictures of the last 4096 calls, of what is in memory and of the device: docs/how-to/pictures.md.

        Args:
            what: "latency", "hits", "bytes", "reuse", "residency", "device", "drafts", or several of these in one
                figure; "all": those that there is something to show for.
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
        if self.keeper is not None:
            self.keeper.stop()
        self._load.close_draft()
        self._load.close_workers()
        native = self.native
        if native is None:
            return
        self._load.end()
        Controller.of_process().leave(self.share)
        if not native.forked and native.postpone(self.close):  # in a child, the threads that use it are the parent's
            return
        if not sys.is_finalizing():  # at the end of the interpreter it was done before, and nobody asks for numbers
            if not native.forked:
                self.keep()
            self.account.finish(self.budget, self.memory, native)
        _live.discard(self)
        self.share.close()

    def __del__(self) -> None:
        if "share" in self.__dict__ and self.native is not None:
            self.close()

    def keep(self) -> None:
        """Remembers what is of use for the next load, and for plans."""
        native, memento = self.native, self.share.memento
        if native is None or memento is None or native.forked:
            return
        if self.stats().total.tokens:
            memento.hot.store(native)
        acceptance = self.account.drafts().acceptance
        memento.store_usage(native, self.history, self.share.settled, self.memory, self.predictor, acceptance)


@atexit.register
def _keep_all() -> None:
    for session in list(_live):
        session.keep()
        if session.keeper is not None:
            session.keeper.flush()

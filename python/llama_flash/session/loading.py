"""The load of one model with flash offload: a plan, the plugin's session, and the first memory.

`Llama.__init__` goes through it by way of session.py: `Load` before the model is loaded, `loading` around the load,
`attach` when the context exists. Everything that must stay in memory is there when `attach` divides the rest of the
budget, so it is measured and not guessed.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..budget.controller import Controller
from ..budget.cores import describe_threads
from ..budget.held import held_by_all, promised_by_all
from ..budget.limits import check_addresses, check_threads, explain_files
from ..budget.rooms import Breakdown, held_by_process, kept_budget, refuse
from ..device.kept import recall
from ..drafts.choice import checked, source_of
from ..drafts.drafter import Drafter, Source
from ..drafts.length import MOST
from ..drafts.mixed import MixedText
from ..drafts.model import ModelDraft, check_vocabularies
from ..drafts.mtp import MtpDraft
from ..drafts.ngram import TextDraft
from ..errors import FlashBudgetError, FlashError
from ..model.adapters import predictor_with
from ..model.devices import devices_of
from ..model.gguf import GgufMeta, check_is_model, check_vocabulary, claims_wide_heads, read_gguf
from ..model.graphs import graphs_of
from ..model.mtp import without_mtp
from ..model.shape import ContextShape
from ..model.values import read_floats
from ..native.calls import abort_callback, context_memory, cpu_buffer_type, discard_compute, flash_buffer_type, override
from ..native.handle import Session
from ..native.library import settled, trim_heap
from ..native.params import Mode, Requirements, neuron_params
from ..observe.stats import DraftStats
from ..options import FlashOffload
from ..planning.advice import advice_for
from ..planning.drafted import DraftSizes, mtp_sizes, pass_shape
from ..planning.drafting import chosen, no_room, rounds_otherwise
from ..planning.lent import few_tokens
from ..planning.placed import Plan
from ..planning.placement import choose_predictor, is_sure, make_plan, work_bytes
from ..planning.reads import experts_ahead, io_choice
from ..prompts.store import PromptStore, open_store, store_memory
from ..sizes import format_size, parse_size
from ..workers.client import Workers
from ..workers.placing import at_client, check_divisible, names_pattern, parts_of, plan_at_client
from .account import Account
from .describe import line_about, nothing_to_offload, workers_text
from .memento import Memento
from .share import Share
from .steps import Steps

__all__ = ["Load"]

logger = logging.getLogger("llama_flash")

_STACK = 8 << 20  # bytes of addresses of a thread


class Load:
    """Of one model, into `share` and `account`. To be ended with `end`, well or not.

    Args:
        model_params, context_params, logits_all, lora_path, aside, verbose: see open_session.

    Raises:
        FlashBudgetError, FlashFormatError, FlashError: see open_session.
    """

    def __init__(
        self,
        path: str,
        options: FlashOffload,
        share: Share,
        account: Account,
        *,
        model_params: Any,
        context_params: Any,
        logits_all: bool,
        lora_path: str | None,
        aside: int,
        verbose: bool,
    ) -> None:
        self.options = options
        self.summary = ""  # the line about the load
        self.io_depth = 1  # most reads in flight
        self._path, self._share, self._account = path, share, account
        self._context_params = context_params
        self._logits_all, self._lora_path, self._aside, self._verbose = logits_all, lora_path, aside, verbose
        self._draft: ModelDraft | MtpDraft | None = None
        self._mtp = DraftSizes()  # as it is planned, until there is a context
        self._no_head = ""  # why the head that "auto" has found makes no drafts
        self.workers: Workers | None = None

        Controller.of_process().begin_load(self)
        try:
            self._prepare(model_params)
        except BaseException as failure:
            self.end()
            self.close_draft()
            self.close_workers()
            share.close()
            if isinstance(failure, OSError):
                explain_files(failure, [path])
            raise

    def end(self) -> None:
        """Others may load. May be called twice."""
        Controller.of_process().end_load(self)

    @property
    def name(self) -> str:
        """Of the model's file."""
        return os.path.basename(self._path)

    @property
    def _plan(self) -> Plan:
        return self._account.plan

    @property
    def n_ctx(self) -> int:
        """Tokens that the context holds."""
        return self._shape().n_ctx

    @property
    def _widest(self) -> int:
        """Tokens that are computed together, at most."""
        return min(int(self._context_params.n_batch), int(self._context_params.n_ubatch))

    @property
    def ubatches(self) -> int:
        """That a call is computed in, at most."""
        params = self._context_params
        return -(-max(1, int(params.n_batch)) // max(1, int(params.n_ubatch)))

    def _prepare(self, model_params: Any) -> None:
        share, context_params = self._share, self._context_params
        self._vocab_only = bool(model_params.vocab_only)
        self._devices = None if self.options.workers else devices_of(model_params, context_params)
        self.meta: GgufMeta = read_gguf(self._path)
        self._prepare_drafts(model_params)
        options = self.options
        self._base = held_by_all(share)
        if not model_params.vocab_only:
            check_is_model(self.meta)
            if claims_wide_heads(self.meta):
                from ..planning.dry_run import check_model  # rarely needed: not in memory otherwise

                check_model(self._path)
        check_vocabulary(self.meta, text=False)
        share.budget = kept_budget(options.dram_budget, options.reserve, self.meta.file_bytes)
        if not self._logits_all and not context_params.embeddings:
            # Only the last token's logits are ever asked for: do not reserve n_ubatch rows of the vocabulary. A server
            # has said how many it asks for.
            drafted = 0 if options.draft == "off" else MOST
            context_params.n_outputs_max = context_params.n_outputs_max or min(1 + drafted, context_params.n_batch)
        if options.workers and not model_params.vocab_only:
            check_divisible(self._lora_path)
            self.workers = Workers(options, self.meta)
        self._account.plan = self._plan_with_head(model_params) or self._make_plan()
        share.memory = self._plan.expected
        if self._plan.bundles:
            how = predictor_with(self._lora_path, self._plan.bundles, options.predictor)
            if how != options.predictor:
                logger.warning("the LoRA adapter changes feed-forward blocks: active neurons are not looked for")
                self.options = replace(options, predictor=how)
        if model_params.vocab_only:
            self._account.plan = replace(self._plan, mode="nothing", tensors=())
        if self._plan.mode == "nothing":
            return
        needs = share.memory
        stacks = self._n_threads() * _STACK
        check_addresses(needs.weights + needs.kv + needs.compute + needs.outputs + self._plan.flash_bytes + stacks)
        self._set_load_mode(model_params)
        groups = [(self._plan.patterns(), flash_buffer_type())]
        if self.workers is not None:
            parts = parts_of(self.meta, self.workers.offers, options.what, self._shape())
            groups += self.workers.place(model_params, parts, few_tokens(self._shape().n_sequences), options)
            groups.append((names_pattern(at_client(self.meta).tensors), cpu_buffer_type()))
        self._overrides = override(model_params, *groups)
        if self._plan.mode == "flash":
            native = self._open()
            context_params.abort_callback = abort_callback()
            context_params.abort_callback_data = native.address

    def _prepare_drafts(self, model_params: Any) -> None:
        """A draft model is loaded, the model's own head will be, or is none of its weights."""
        params = self._context_params
        self._asked = self.options.draft
        possible = not (self._vocab_only or params.embeddings) and self._widest > 1
        rounded = rounds_otherwise(params.flash_attn_type == 1, params.type_k)
        self.options, self.meta = chosen(self.options, self.meta, possible=possible, rounded=rounded)
        options = self.options
        if options.drafts_by_model:
            checked(options)
            n_threads, n_texts = max(1, int(params.n_threads)), max(1, int(params.n_seq_max))
            self._draft = ModelDraft(options.draft, self.n_ctx, n_threads, n_texts)
        if options.draft == "mtp":
            check_is_model(self.meta)
            model_params.load_mtp = True
            self._mtp = mtp_sizes(self.meta, self._shape())

    def _plan_with_head(self, model_params: Any) -> Plan | None:
        """The plan with the head that "auto" has found. None: there is none, or it is left out, for want of room."""
        if self._asked != "auto" or self.options.draft != "mtp":
            return None
        budget = self._share.budget
        try:
            plan = make_plan(self.meta, self.options, budget, self._shape(), self._base - settled())
        except FlashBudgetError:
            plan = None
        if plan is not None and is_sure(self.meta, plan, self.options, budget):
            return plan
        self._no_head = no_room(self._mtp.bytes)
        self._mtp, model_params.load_mtp = DraftSizes(), False
        self.options, self.meta = replace(self.options, draft="ngram"), without_mtp(self.meta)
        return None

    def _make_plan(self) -> Plan:
        budget, shape, base = self._share.budget, self._shape(), self._base - settled()
        try:
            if self.workers is None:
                return make_plan(self.meta, self.options, budget, shape, base)
            return plan_at_client(self.meta, self.options, budget, shape, base, graphs_of(self.meta, shape))
        except FlashBudgetError as refused:
            if Controller.of_process().squeeze():  # other models have more than they need
                self._base = held_by_all(self._share)
                return self._make_plan()
            from ..planning.planner import smallest_budget_of  # not in memory where the budget is enough

            held = functools.partial(held_by_all, self._share)
            budget = self._share.budget
            # a draft model is held already, a head is not
            options = self.options if self.options.draft == "mtp" else replace(self.options, draft="off")
            shape = replace(self._shape(), aside=self._shape().aside - self._mtp.beside)
            raise smallest_budget_of(self.meta, options, budget, shape, held, refused) from None

    @staticmethod
    def _set_load_mode(model_params: Any) -> None:
        import llama_cpp

        if model_params.load_mode in (llama_cpp.LLAMA_LOAD_MODE_MLOCK, llama_cpp.LLAMA_LOAD_MODE_MMAP_MLOCK):
            logger.warning("use_mlock has no effect together with flash_offload")
        model_params.load_mode = llama_cpp.LLAMA_LOAD_MODE_DIRECT_IO
        model_params.lazy_mode = llama_cpp.LLAMA_LAZY_MODE_OFF  # tables that would be mapped go to flash

    def _open(self) -> Session:
        io_engine, self.io_depth = io_choice(self.options, self._plan.bundles, recall(self._path))
        native = Session(
            io_engine,
            io_depth=self.io_depth,
            io_threads=self.options.io_threads,
            lookahead=experts_ahead(self.options),
            tries_ahead=self.options.lookahead == "auto",
            panel_bytes=parse_size(self.options.panel_bytes),
            few_tokens=few_tokens(self._shape().n_sequences),
        )
        self._share.adopt(native)
        self._share.memento = Memento(self.meta, self.options, self._plan)
        for name, only in self._plan.tables.items():
            native.add_rows(name, only)
        for experts, (router, norm) in self._plan.routers.items():
            native.add_router(experts, read_floats(self.meta, router), read_floats(self.meta, norm) if norm else None)
        for bundle in self._plan.bundles.descriptions() if self._plan.bundles else ():
            native.add_bundle(bundle)
        return native

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Around the load of the model, in the thread that loads it: binds the flash tensors, names workers theirs.

        Raises:
            FlashError: what the plugin, or a worker, has to say, in place of the engine's own error.
        """
        try:
            with self.workers.binding() if self.workers is not None else contextlib.nullcontext(), self._binding():
                yield
        except BaseException:
            self.end()
            self.close_workers()  # whoever keeps the error keeps the model that failed: they must not wait for it
            raise

    @contextlib.contextmanager
    def _binding(self) -> Iterator[None]:
        native = self._share.native
        if native is None:
            yield
            return
        native.bind_begin()
        try:
            yield
        except Exception as failure:
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
            if self.workers is not None:
                self.workers.attach(context, self._shape())
        except BaseException:
            self.close_workers()
            raise
        finally:
            self.end()

    def open_prompts(self, context: Any) -> PromptStore | None:
        """The store of prompts, where one is asked for and can be used."""
        where, options = self.options.prompt_cache, self.options
        if where is False or self._vocab_only:
            return None
        return open_store(
            where if where is True else os.fspath(where),
            parse_size(options.prompt_cache_size),
            self.meta,
            context,
            self._context_params,
            self._account.predictor,
            options.io_engine,
        )

    @property
    def lora_path(self) -> str | None:
        """Adapter that is applied."""
        return self._lora_path

    def _attach(self, context: Any, scores_bytes: int) -> None:
        if self.options.draft == "mtp":
            self._draft = MtpDraft(self.name, context, self._context_params, self._mtp.weights, self._raise_pending)
        if self._plan.mode == "nothing":
            self._share.memory = replace(self._share.memory, reserve=0)
            self._say(nothing_to_offload(self.name, self.options.what))
            return
        self._share.memory = self._measured(context, scores_bytes)
        if self._plan.mode == "resident":
            if self._share.memory.fixed > self._share.budget.total:
                raise refuse(self._share.budget, self._share.memory, 0, self.options.reserve, advice=self._advice())
        else:
            self._divide(context)
        self._say(self.line())
        if self._plan.mode == "flash" and self.options.follow:
            assert self._share.memento is not None
            self._share.memento.hot.note_files()
            Controller.of_process().join(self._share)
        check_threads(self._n_threads())

    def _measured(self, context: Any, scores_bytes: int) -> Breakdown:
        """The memory in use before flash tensors get any."""
        if self._devices is not None:  # buffers may lie where weights have passed through
            discard_compute(context)
        trim_heap()
        buffers = context_memory(context)
        # weights have been written, KV cache and graph buffers not yet
        held = held_by_process() - buffers.model
        shape = self._shape()
        n_outputs = shape.n_outputs * 4 * (self.meta.n_vocab + self.meta.number("embedding_length"))
        draft = self._draft
        apart = draft.weights if isinstance(draft, ModelDraft) else 0  # in memory, and not among the model's
        return Breakdown(
            interpreter=max(self._base, held + promised_by_all(self._share, held)) - apart,
            weights=buffers.model - self._mtp.weights,
            kv=buffers.context,
            compute=buffers.compute + work_bytes(self.meta, shape),
            outputs=n_outputs + scores_bytes + self._aside + shape.prompts,
            draft=draft.bytes if draft else 0,
            reserve=self._share.budget.reserve,
        )

    def _divide(self, context: Any) -> None:
        native = self._share.native
        assert native is not None
        budget, memory = self._share.budget, self._share.memory
        left = budget.total - memory.total
        needs = self.choose_predictor(left) if self._plan.bundles else native.requirements()
        if left < needs.min_memory:
            raise refuse(budget, memory, needs.min_memory, self.options.reserve, advice=self._advice())
        self._share.give(left, needs, context, self._shape())
        self._account.begin(native)

    def drafter(self, context: Any) -> Drafter | None:
        """What makes drafts for the model of this context; None where none are to be made.

        Raises:
            FlashError: the draft model has another vocabulary.
        """
        import llama_cpp as engine

        options, model = self.options, engine.llama_get_model(context)
        name, reason = source_of(options, self._context_params, self._account.predictor, model)
        if self._widest < 2 and self._asked != "off":
            reason = "passes have one token (n_batch or n_ubatch is 1)"
        if reason and self._asked != "auto":
            logger.warning("no drafts: %s", reason)
        if reason:
            self._account.drafts = lambda: DraftStats(reason=reason)
        if name == "off":
            self.close_draft()
            return None
        if isinstance(self._draft, ModelDraft):
            check_vocabularies(self._draft, engine.llama_model_get_vocab(model), self.name)
        native = self._share.native
        needs = native.requirements() if native is not None else None
        shape = pass_shape(self.meta, self._plan, self._share.memory, needs)
        # a pass in two halves would read everything twice
        most = min(MOST, self._widest - 1)
        n_texts = max(1, int(self._context_params.n_seq_max))
        draft = self._draft

        def source(text: int) -> Source:
            return TextDraft() if draft is None else MixedText(draft.source(text))

        n_vocab = int(engine.llama_vocab_n_tokens(engine.llama_model_get_vocab(model)))
        return Drafter(source, self.n_ctx // n_texts, n_vocab, shape, most, reason=self._no_head)

    def steps(self, context: Any) -> Steps | None:
        """Of calls with several sequences; None where a token has weights of its own, which would be read for it."""
        import llama_cpp as engine

        if self.meta.number("expert_count") or self._plan.bundles is not None:
            return None
        few = few_tokens(int(self._context_params.n_seq_max))
        return Steps(engine.llama_n_ubatch(context), engine.llama_n_batch(context), few)

    def close_draft(self) -> None:
        """Frees the draft model, or the head's context, if there is one. May be called twice."""
        if self._draft is not None:
            self._draft.close()

    @property
    def head(self) -> MtpDraft | None:
        """The model's own, which makes drafts."""
        return self._draft if isinstance(self._draft, MtpDraft) else None

    def _raise_pending(self) -> None:
        if self._share.native is not None:
            self._share.native.raise_pending()

    def close_workers(self) -> None:
        """Leaves the workers, if there are any. May be called twice."""
        if self.workers is not None:
            self.workers.close()

    def choose_predictor(self, left: int) -> Requirements:
        """How active neurons are found, and what that needs; left: bytes there are for it."""
        assert self._plan.bundles is not None
        return choose_predictor(self._path, self._plan.bundles, self.options.predictor, left, self._set_predictor)

    def _set_predictor(self, mode: Mode) -> Requirements:
        native, bundles = self._share.native, self._plan.bundles
        assert native is not None and bundles is not None
        self._account.predictor = mode
        n_ubatch = self._context_params.n_ubatch
        native.set_neurons(neuron_params(mode, self.options, bundles.format.record_bytes, n_ubatch))
        return native.requirements()

    def _advice(self) -> tuple[str, ...]:
        advice = advice_for(self.meta, self._plan, self.options, self._shape())
        if self._draft is None:
            return advice
        what = "draft model" if self.head is None else "head of multi-token prediction"
        return (*advice, f"The {what} takes {format_size(self._draft.bytes)} of it.")

    def _shape(self) -> ContextShape:
        context = self._context_params
        n_ctx = context.n_ctx or self.meta.number("context_length", 4096)
        every = self._logits_all or bool(context.embeddings)
        return ContextShape(
            n_ctx=n_ctx,
            n_batch=context.n_batch,
            n_ubatch=context.n_ubatch,
            n_outputs=context.n_batch if every else max(1, int(context.n_outputs_max)),
            n_scores=n_ctx if self._logits_all else 0,
            type_k=context.type_k,
            type_v=context.type_v,
            flash_attn=context.flash_attn_type == 1,
            embedding=bool(context.embeddings),
            prompts=0 if self.options.prompt_cache is False else store_memory(self.meta),
            aside=self._aside + (self._mtp.beside if self._draft is None else self._draft.beside),
            n_sequences=max(1, int(context.n_seq_max)),
            devices=self._devices,
        )

    def _n_threads(self) -> int:
        return max(1, int(self._context_params.n_threads), int(self._context_params.n_threads_batch))

    def line(self) -> str:
        """About the model as it is now."""
        share = self._share
        model = (self.name, self.meta, self._plan, share.budget, share.memory)
        said = line_about(*model, self._account.predictor, share.neuron_slots)
        if self.workers is not None:
            said += workers_text(self.workers.parts)
        if self._no_head:
            said += f"; drafts from the text alone: {self._no_head}"
        return f"{said}; {describe_threads(int(self._context_params.n_threads))}"

    def _say(self, line: str) -> None:
        """One line, through logging if somebody listens, else on stderr."""
        self.summary = line
        logger.info("%s", line)
        if self._verbose and not (logger.isEnabledFor(logging.INFO) and logger.hasHandlers()):
            print(f"llama-flash: {line}", file=sys.stderr, flush=True)

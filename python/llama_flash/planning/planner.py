"""What loading a model with flash offload would give, before it is loaded: `llama_flash.plan`.

Decides nothing itself. Which weights go to flash is placement.py's answer, what is needed is the engine's and the
plugin's own (dry_run.py), what it costs is cost.py's: this puts them together for one budget and for others.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from ..budget.cores import Threads, choose_threads
from ..budget.held import held_by_all
from ..budget.requests import largest_body, memory_of, reserve_of_server
from ..budget.rooms import GROWTH, KERNEL, Breakdown, Budget, kept_budget, refuse, reserve_of, resolve_budget
from ..device.kept import profile_for
from ..device.profile import DeviceProfile
from ..errors import FlashBudgetError, FlashError, FlashFormatError
from ..model.bundles import Bundles, read_bundles
from ..model.gguf import GgufMeta, check_vocabulary, read_gguf
from ..model.mtp import without_mtp
from ..model.shape import ContextShape, context_shape
from ..native import server
from ..native.library import settled
from ..native.params import Mode, Requirements
from ..options import FlashOffload
from ..prompts.store import store_memory
from .advice import advice_for
from .cost import Cost, expect
from .drafted import ACCEPTANCES, MOST_DRAFTED, DraftPlan, DraftSizes, draft_sizes, drafted, mtp_sizes, pass_shape
from .drafting import chosen, no_room, rounds_otherwise
from .dry_run import EngineSizes, FlashNeeds, engine_sizes
from .lent import lent_of
from .placed import Plan
from .placement import choose_predictor, is_sure, make_plan, work_bytes
from .reads import experts_ahead, io_choice
from .together import Together, advised, counts
from .usage import usage_of

__all__ = ["LoadPlan", "Option", "plan", "smallest_budget_of", "speeds_together"]

logger = logging.getLogger("llama_flash")

_SHARES = (0.25, 0.5, 0.75, 1.0)  # of the model file: budgets that are shown for comparison
_SLACK = 4 << 20  # what a load takes that cannot be asked for beforehand: the heap grows, by earlier loads, too
_ROOM_TO_ASK = 16 << 20
_MIB = 1 << 20


@dataclass(frozen=True)
class Option:
    """What one budget would give."""

    budget: int  # bytes
    label: str  # what it is: "50% of the file"
    mode: Literal["flash", "resident", "nothing", "too small"]
    predictor: str
    memory: Breakdown | None
    cost: Cost | None


@dataclass(frozen=True)
class LoadPlan:
    """What loading a model would do. Sizes in bytes."""

    model: str
    budget: Budget
    smallest: int  # budget that works; 0: none is refused, as nothing could be left on flash
    mode: Literal["flash", "resident", "nothing"]  # as in `stats().mode`
    predictor: str  # how active neurons are found; "none" without bundles
    window: int | None  # tokens whose neurons stay; None: as many as have room
    io_engine: str
    io_depth: int  # most reads in flight
    memory: Breakdown  # where the budget goes: resident weights, KV cache, compute buffers, slots, ...
    lent: int  # of what is no flash memory there, flash memory while tokens are generated and the context is empty
    resident_weights: int
    flash_weights: int
    expert_bytes: int  # of those on flash
    panel_bytes: int
    neuron_bytes: int
    n_neurons: int
    neuron_slots: int  # neurons that slots hold
    cost: Cost  # of a decoded token
    profile: DeviceProfile
    others: tuple[Option, ...]  # what other budgets would give
    parallel: int  # sequences that the memory is planned for
    together: tuple[Together, ...]  # what numbers of sequences get that generate at the same time, within this budget
    threads: Threads  # that compute, where no number is given
    drafts: DraftPlan | None = None  # None: none are made

    @property
    def bytes_per_token(self) -> float:
        """Expected from flash for a decoded token; of a mixture that never ran the most, see bytes_per_token_range."""
        return self.cost.bytes_per_token

    @property
    def bytes_per_token_range(self) -> tuple[float, float]:
        """The least and the most: routing as most mixtures show it, and even routing. The same once a run was seen."""
        return self.cost.bytes_per_token_range

    @property
    def tokens_per_second(self) -> float:
        """Expected of decoding, if the device keeps to its profile and nothing but reading and DRAM takes time.

        Of a mixture that never ran the least, see tokens_per_second_range.
        """
        return self.cost.tokens_per_second

    @property
    def tokens_per_second_range(self) -> tuple[float, float]:
        """The least and the most: even routing, and routing as most mixtures show it. The same once a run was seen."""
        return self.cost.tokens_per_second_range

    @property
    def advised_parallel(self) -> int:
        """The most sequences of which each doubling brings at least a tenth more tokens per second in all."""
        return advised(self.together)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values["together"] = [option.as_dict() for option in self.together]
        values["advised_parallel"] = self.advised_parallel
        values["drafts"] = self.drafts.as_dict() if self.drafts else None
        values["budget"] = asdict(self.budget)
        values["memory"] = self.memory.as_dict()
        values["cost"] = self.cost.as_dict()
        values["profile"] = self.profile.as_dict()
        values["threads"] = asdict(self.threads)
        values["others"] = [
            {**asdict(other), "cost": other.cost.as_dict() if other.cost else None} for other in self.others
        ]
        derived = ("bytes_per_token", "bytes_per_token_range", "tokens_per_second", "tokens_per_second_range")
        return {**values, **{name: getattr(self, name) for name in derived}}


def plan(
    model: str | os.PathLike[str],
    dram_budget: int | str = "auto",
    *,
    n_ctx: int = 512,
    n_batch: int = 512,
    n_ubatch: int = 512,
    type_k: int | None = None,
    type_v: int | None = None,
    logits_all: bool = False,
    flash_attn: bool = False,
    flash_offload: bool | Mapping[str, Any] | FlashOffload | None = True,
    profile: DeviceProfile | None = None,
    parallel: int = 1,
) -> LoadPlan:
    """What `llama_cpp.Llama(model, flash_offload=...)` would do with these arguments, in this process, now.

    With `parallel`, what `llama-flash serve --parallel` would.

    Args:
        model: GGUF file, or its first shard.
        dram_budget: as in FlashOffload; "auto": that of `flash_offload`.
        n_ctx, n_batch, n_ubatch, type_k, type_v, logits_all, flash_attn: as `Llama` takes them.
        flash_offload: True, or options as `Llama` takes them.
        profile: of the device; None: the one kept for it, else a quick probe of the model file, else cautious defaults.
        parallel: sequences that are computed at the same time, each with a context of `n_ctx` tokens.

    Raises:
        FlashBudgetError: the budget is too small; it has the smallest that works.
        FlashFormatError, OSError: the file cannot be read.
        ValueError, TypeError: see FlashOffload.
    """
    options = _asked(flash_offload, dram_budget)
    if options.workers:
        raise ValueError("workers: `llama-flash plan --workers` asks them")
    meta = read_gguf(model)
    check_vocabulary(meta, text=False)
    n_drafted = MOST_DRAFTED if options.draft != "off" else 0
    shape = context_shape(meta, n_ctx, n_batch, n_ubatch, type_k, type_v, logits_all, flash_attn, parallel, n_drafted)
    import llama_cpp  # noqa: F401  # so that its size is counted

    if parallel > 1:
        options = _of_a_server(options, shape)
    asked = _planner_of(meta, options, shape)
    try:
        budget = kept_budget(options.dram_budget, options.reserve, meta.file_bytes)
        profile = profile or profile_for(meta.files[0], options.io_engine)
        planner = asked.within(budget)
        try:
            found = planner.outcome(budget)
        except FlashBudgetError as error:
            raise planner.too_small(budget, error) from None
        cost = planner.cost(found, profile)
        together = planner.together(found, budget, profile)
        smallest = 0 if found.plan.mode == "nothing" else asked.smallest()
        others = asked.others(smallest, profile)
        drafts = planner.drafts(found, budget, profile)
        return _load_plan(model, options, budget, smallest, found, cost, profile, others, parallel, together, drafts)
    finally:
        asked.close()


def _planner_of(meta: GgufMeta, options: FlashOffload, shape: ContextShape) -> _Planner:
    """Of a load with these options, with what it takes where there is no room for the head that "auto" has found."""
    rounded = rounds_otherwise(shape.flash_attn, shape.type_k)
    taken, loaded = chosen(options, meta, possible=shape.n_ubatch > 1, rounded=rounded)
    if options.draft != "auto" or taken.draft != "mtp":
        return _Planner(loaded, taken, shape, held_by_all)
    plain = _Planner(without_mtp(meta), replace(taken, draft="ngram"), shape, held_by_all)
    return _Planner(loaded, taken, shape, held_by_all, plain)


def _asked(flash_offload: bool | Mapping[str, Any] | FlashOffload | None, dram_budget: int | str) -> FlashOffload:
    options = FlashOffload.coerce(flash_offload)
    if options is None:
        raise ValueError("flash_offload: there is nothing to plan where it is off; True or options are expected")
    return options if dram_budget == "auto" else replace(options, dram_budget=dram_budget)


def _of_a_server(options: FlashOffload, shape: ContextShape) -> FlashOffload:
    """With what requests may take. Its library is loaded, so that its size is counted."""
    server.load()
    if options.reserve is not None:
        return options
    return replace(options, reserve=reserve_of_server(memory_of(largest_body(shape.n_ctx // shape.n_sequences))))


def _load_plan(
    model: str | os.PathLike[str],
    options: FlashOffload,
    budget: Budget,
    smallest: int,
    found: _Outcome,
    cost: Cost,
    profile: DeviceProfile,
    others: tuple[Option, ...],
    parallel: int,
    together: tuple[Together, ...],
    drafts: DraftPlan | None,
) -> LoadPlan:
    placed, memory = found.plan, found.memory
    io_engine, depth = io_choice(options, placed.bundles, profile)
    held = memory.slots // found.needs.neuron_record if found.needs and found.needs.neuron_record else 0
    return LoadPlan(
        model=os.fspath(model),
        budget=budget,
        smallest=smallest,
        mode=placed.mode,
        predictor=found.predictor,
        window=options.window,
        io_engine=profile.io_engine if io_engine == "auto" and profile.io_engine else io_engine,
        io_depth=depth,
        memory=memory,
        lent=(found.decoding.flash if found.decoding else memory.flash) - memory.flash,
        resident_weights=placed.resident_bytes,
        flash_weights=placed.flash_bytes,
        expert_bytes=placed.expert_bytes,
        panel_bytes=placed.panel_bytes,
        neuron_bytes=placed.neuron_bytes,
        n_neurons=placed.n_neurons,
        neuron_slots=0 if placed.expert_bytes else min(placed.n_neurons, held),
        cost=cost,
        profile=profile,
        others=others,
        parallel=parallel,
        together=together,
        threads=choose_threads(),
        drafts=drafts,
    )


@dataclass(frozen=True)
class _Outcome:
    """What a load within some budget comes to."""

    plan: Plan
    predictor: str
    needs: Requirements | None  # None where nothing is on flash
    memory: Breakdown
    decoding: Breakdown | None = None  # the same while tokens are generated, where that differs


def _sizes_of_drafts(meta: GgufMeta, options: FlashOffload, shape: ContextShape) -> DraftSizes:
    if options.drafts_by_model:
        return draft_sizes(options.draft, shape.n_ctx)
    return mtp_sizes(meta, shape) if options.draft == "mtp" else DraftSizes()


class _Planner:
    """Answers for one model and context; what the engine and the plugin said is remembered."""

    def __init__(
        self,
        meta: GgufMeta,
        options: FlashOffload,
        shape: ContextShape,
        held: Callable[[], int],
        plain: _Planner | None = None,
    ) -> None:
        """
        Args:
            held: tells the bytes that the process holds; asking engine and plugin adds to them, once.
            plain: takes this one's place where a budget is not sure to have room for the head.
        """
        self._plain, self._reason = plain, ""
        self._draft = _sizes_of_drafts(meta, options, shape)
        self._apart = self._draft.weights if options.drafts_by_model else 0  # not among the model's own
        self._aside = shape.aside
        shape = replace(shape, aside=shape.aside + self._draft.beside)
        if options.prompt_cache is not False:
            shape = replace(shape, prompts=store_memory(meta))
        self._meta, self._options, self._shape = meta, options, shape
        self._awake = choose_threads().awake
        self._bundles: Bundles | None = read_bundles(meta)
        self._held = held
        self._base = held()
        self._bare = self._base - settled()
        self._usage = usage_of(meta.files, options)
        self._sizes: EngineSizes = engine_sizes(without_mtp(meta), self._bundles, shape)
        self._asked: dict[tuple[str, ...], FlashNeeds] = {}

    def close(self) -> None:
        for needs in self._asked.values():
            needs.close()
        if self._plain is not None:
            self._plain.close()

    def within(self, budget: Budget) -> _Planner:
        """The one that answers for this budget."""
        if self._plain is None:
            return self
        bare = self._bare + self._apart + self._draft.heap
        try:
            placed = make_plan(self._meta, self._options, budget, self._shape, bare)
        except FlashBudgetError:
            placed = None
        if placed is not None and is_sure(self._meta, placed, self._options, budget):
            return self
        self._plain._reason = no_room(self._draft.bytes)
        return self._plain

    def outcome(self, budget: Budget, bare: int | None = None) -> _Outcome:
        """As a load within `budget` goes. Raises FlashBudgetError where that would.

        bare: bytes of the process, before any use of the engine; None: as it was before anything was asked.
        """
        bare = (self._bare if bare is None else bare) + self._apart + self._draft.heap
        placed = make_plan(self._meta, self._options, budget, self._shape, bare)
        n_vocab, n_embd = self._meta.n_vocab, self._meta.number("embedding_length")
        memory = Breakdown(
            interpreter=self._base + self._sizes.heap + placed.heap_bytes + _SLACK,
            weights=placed.resident_bytes
            - (self._draft.weights - self._apart)
            - (self._bundles.predictor_bytes if self._bundles else 0)
            + (0 if False in placed.tables.values() else self._sizes.doubled),  # an embedding that is the output, too
            kv=self._sizes.kv if self._shape.devices is None else placed.expected.kv,
            compute=self._compute(placed),
            outputs=4 * (self._shape.n_outputs * (n_vocab + n_embd) + self._shape.n_scores * n_vocab)
            + self._aside
            + self._shape.prompts,
            draft=self._draft.bytes,
            reserve=budget.reserve,
        )
        if placed.mode == "nothing":
            return _Outcome(placed, "none", None, replace(memory, reserve=0))
        if placed.mode == "resident":
            if memory.fixed > budget.total:
                raise refuse(budget, memory, 0, self._options.reserve, advice=self._advice(placed))
            return _Outcome(placed, "none", None, memory)
        return self._divide(placed, memory, budget)

    def _compute(self, placed: Plan) -> int:
        """Bytes of buffers of graphs, in main memory."""
        if self._shape.devices is not None:  # what is computed here depends on what is on flash
            return placed.expected.compute
        return self._sizes.compute + work_bytes(self._meta, self._shape)

    def _divide(self, placed: Plan, memory: Breakdown, budget: Budget) -> _Outcome:
        asked = self._needs(placed)
        left = budget.total - memory.total
        predictor = "none"

        def needs_of(mode: Mode) -> Requirements:
            nonlocal predictor
            predictor = mode
            return asked.requirements(mode)

        if placed.bundles:
            path = str(self._meta.files[0])
            needs = choose_predictor(path, placed.bundles, self._options.predictor, left, needs_of)
        else:
            needs = asked.requirements()
        if left < needs.min_memory:
            raise refuse(budget, memory, needs.min_memory, self._options.reserve, advice=self._advice(placed))

        def divided(n_bytes: int) -> Breakdown:
            given = asked.divide(min(n_bytes, needs.max_memory))
            return replace(
                memory,
                weights=memory.weights + given.resident,
                slots=given.slots,
                pinned=given.pinned,
                stream=given.stream,
                bookkeeping=given.bookkeeping,
            )

        lent = lent_of(memory, self._shape, budget, self._options.reserve) if self._options.follow else 0
        return _Outcome(placed, predictor, needs, divided(left), divided(left + lent))

    def _advice(self, placed: Plan) -> tuple[str, ...]:
        return advice_for(self._meta, placed, self._options, self._shape)

    def _needs(self, placed: Plan) -> FlashNeeds:
        key = tuple(tensor.name for tensor in placed.tensors)
        if key not in self._asked:
            self._asked[key] = FlashNeeds(placed, self._options, self._shape.n_ubatch)
        return self._asked[key]

    def smallest(self) -> int:
        """Smallest budget that works, in bytes; whole MiB. Also as the limit of a memory group of the process' own.

        It works in a process that has asked nothing yet, and in this one, which holds more now.
        """
        if self._plain is not None:
            return self._plain.smallest()
        self._search(self._bare)  # after which everything has been asked that will be
        return self._search(self._held() - settled() + GROWTH) * _MIB + KERNEL

    def _search(self, bare: int) -> int:
        low, high = 0, 1  # MiB: does not work, may work
        while not self._works(high, bare):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._works(middle, bare) else (middle, high)
        return high

    def _works(self, mib: int, bare: int) -> bool:
        budget = self._budget(mib * _MIB)
        try:
            for begin in {self._bare, bare}:
                self.outcome(budget, begin)
        except FlashBudgetError:
            return False
        return True

    def _budget(self, total: int) -> Budget:
        return Budget(total, reserve_of(total, self._options.reserve), "dram_budget")

    def too_small(self, budget: Budget, refused: FlashBudgetError) -> FlashBudgetError:
        """The error for `budget`, with the smallest one that works in place of one that is sure to, on estimates."""
        parts = Breakdown(**refused.breakdown)
        return refuse(
            budget, parts, parts.stream, self._options.reserve, smallest=self.smallest(), advice=refused.advice
        )

    def together(self, found: _Outcome, budget: Budget, profile: DeviceProfile) -> tuple[Together, ...]:
        """What numbers of sequences get, as far as they have room; found: the last outcome, within `budget`."""
        result: list[Together] = []
        planned = self._shape.n_sequences
        for n in counts(planned):
            memory = found.decoding or found.memory  # lent to passes with a token of each, of any number
            # contexts beside those that are planned for: their cells are no slots
            kv = max(0, n - planned) * memory.kv // planned
            short = kv - max(0, budget.total - found.memory.total)  # nothing where all weights have room, too
            if found.needs is not None and kv and short > 0:
                left = memory.flash - short
                if left < found.needs.min_memory:
                    break
                given = self._needs(found.plan).divide(min(left, found.needs.max_memory))
                moved = replace(memory, slots=given.slots, pinned=given.pinned, stream=given.stream)
            elif found.plan.mode == "resident" and memory.total + kv > budget.total:
                break
            else:
                moved = memory
            result.append(Together(n, self.cost(replace(found, decoding=moved), profile, n)))
        return tuple(result)

    def cost(self, found: _Outcome, profile: DeviceProfile, tokens: int = 1) -> Cost:
        return expect(
            self._meta,
            found.plan,
            found.decoding or found.memory,
            found.needs,
            profile,
            predictor=found.predictor,
            window=self._options.window,
            io_depth=io_choice(self._options, self._bundles, profile)[1],
            lookahead=experts_ahead(self._options),
            usage=self._usage,
            tokens=tokens,
            awake=self._awake,
        )

    def drafts(self, found: _Outcome, budget: Budget, profile: DeviceProfile) -> DraftPlan | None:
        """What drafts cost and bring; found: the outcome within `budget`, with them."""
        options = self._options
        if options.draft == "off" or found.predictor == "lowrank":
            return None
        cost = without = self.cost(found, profile)
        if options.draft == "mtp":
            without = self._without_head(budget, profile)
        elif self._draft.bytes:
            with_all = replace(budget, total=budget.total + self._draft.bytes)
            without = self.cost(self.outcome(with_all), profile)
        memory, skew = found.decoding or found.memory, self._usage.skew if self._usage else None
        shape = pass_shape(self._meta, found.plan, memory, found.needs, skew)
        per_guess = self._draft.read / profile.dram
        seen = self._usage.acceptance if self._usage else None
        return DraftPlan(
            source="model" if options.drafts_by_model else str(options.draft),
            bytes=self._draft.bytes,
            without=without.tokens_per_second,
            expected=tuple(drafted(cost, shape, acceptance, per_guess) for acceptance in ACCEPTANCES),
            seen=None if seen is None else drafted(cost, shape, seen, per_guess),
            reason=self._reason,
        )

    def _without_head(self, budget: Budget, profile: DeviceProfile) -> Cost:
        shape = replace(self._shape, aside=self._aside)
        plain = _Planner(without_mtp(self._meta), replace(self._options, draft="off"), shape, self._held)
        try:
            return plain.cost(plain.outcome(budget), profile)
        finally:
            plain.close()

    def others(self, smallest: int, profile: DeviceProfile) -> tuple[Option, ...]:
        """What some budgets give that are shown for comparison. smallest: budget that works."""
        # a share of a model that is smaller than the interpreter is no budget; see also `llama-flash run --cap 50%`
        file_bytes = self._meta.file_bytes
        beside, words = (smallest, "smallest + ") if file_bytes < smallest else (0, "")
        return tuple(
            self.option(beside + int(share * file_bytes), f"{words}{share:.0%} of the file", profile)
            for share in _SHARES
        )

    def option(self, total: int, label: str, profile: DeviceProfile) -> Option:
        budget = self._budget(total)
        planner = self.within(budget)
        try:
            found = planner.outcome(budget)
        except FlashBudgetError:
            return Option(total, label, "too small", "none", None, None)
        return Option(total, label, found.plan.mode, found.predictor, found.memory, planner.cost(found, profile))


def speeds_together(
    meta: GgufMeta, options: FlashOffload, budget: Budget, one: ContextShape, most: int
) -> dict[int, float]:
    """Tokens per second of all sequences together, by their number: powers of two up to `most` that have room.

    Each is planned by itself: beside many contexts more lies on flash. one: the context of a sequence.

    Raises:
        FlashBudgetError: there is no room for one.
        FlashFormatError, OSError: the file cannot be read.
    """
    plain = replace(options, draft="ngram") if options.draft == "mtp" else options
    profile = profile_for(meta.files[0], options.io_engine)
    speeds: dict[int, float] = {}
    for n in counts(1, most):
        shape = replace(one, n_ctx=n * one.n_ctx, n_outputs=max(n, one.n_outputs), n_sequences=n)
        planner = _Planner(without_mtp(meta), plain, shape, held_by_all)
        try:
            speeds[n] = planner.cost(planner.outcome(budget), profile, n).tokens_per_second
        except FlashBudgetError:
            if n == 1:
                raise
            break
        finally:
            planner.close()
    return speeds


def smallest_budget_of(
    meta: GgufMeta,
    options: FlashOffload,
    budget: Budget,
    shape: ContextShape,
    held: Callable[[], int],
    refused: FlashBudgetError,
) -> FlashBudgetError:
    """The error for `budget`, `refused` on estimates, with the smallest one that works, where that can be found out.

    held: tells the bytes that the process holds.
    """
    # it takes the engine's vocabulary, and this process may be under the cap that was too small
    if refused.breakdown["interpreter"] + _ROOM_TO_ASK > resolve_budget().total:
        return refused
    try:
        planner = _Planner(meta, options, shape, held)
    except FlashFormatError:
        raise  # no budget would work
    except (FlashError, OSError):
        return refused
    try:
        return planner.too_small(budget, refused)
    except (FlashError, OSError):
        return refused
    finally:
        planner.close()

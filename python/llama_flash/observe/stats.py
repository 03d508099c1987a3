"""What flash offload has done, in numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ..budget.cores import explain_throttling
from ..budget.rooms import Breakdown, Budget
from ..native import bindings
from ..sizes import format_size

__all__ = ["Counters", "DraftStats", "FlashStats"]


@dataclass(frozen=True)
class Counters:
    """Sums over some calls of the engine. Sizes in bytes, times in seconds."""

    tokens: int = 0
    calls: int = 0  # of llama_decode or llama_encode
    bytes_read: int = 0  # from flash, as asked of the device (whole sectors)
    bytes_used: int = 0  # of these, bytes of records
    reads: int = 0
    hits: int = 0  # experts and neurons found in slots
    misses: int = 0  # experts and neurons that had to be read
    panel_hits: int = 0  # panels that were pinned
    panel_reads: int = 0  # panels that were streamed
    rows_read: int = 0  # rows of embedding tables
    evictions: int = 0
    wait_seconds: float = 0.0  # compute threads idle for a read
    repack_seconds: float = 0.0
    op_seconds: float = 0.0  # inside flash ops, all of the above included
    neurons_active: int = 0  # sum over tokens and layers of the neurons that were computed
    neurons_newly_active: int = 0  # of these, not active for any of the 5 tokens before
    neurons_expected: int = 0  # read ahead
    experts_expected: int = 0  # records (parts of experts) read ahead of the next layer's router
    experts_foreseen: int = 0  # of these, those that it then chose, and that were there
    layers_repeated: int = 0  # passes made again because the graph's activations were not the expected ones
    predict_seconds: float = 0.0  # finding active sets
    manage_seconds: float = 0.0  # memory management: slots, copies into them
    retries: int = 0
    errors: int = 0

    @property
    def hit_rate(self) -> float | None:
        """Share of experts and neurons found in slots; None if none was asked for."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else None

    @property
    def bytes_per_token(self) -> float:
        return self.bytes_read / self.tokens if self.tokens else 0.0

    @property
    def reads_per_token(self) -> float:
        return self.reads / self.tokens if self.tokens else 0.0

    @property
    def neurons_per_token(self) -> float:
        """Active neurons of all layers; 0 where whole layers pass by, as for prompts of more than 16 tokens."""
        return self.neurons_active / self.tokens if self.tokens else 0.0

    @property
    def wait_per_token(self) -> float:
        """Seconds."""
        return self.wait_seconds / self.tokens if self.tokens else 0.0

    def __add__(self, other: Counters) -> Counters:
        return Counters(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: Counters) -> Counters:
        return Counters(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    @classmethod
    def from_struct(cls, raw: bindings.llama_flash_stats) -> Counters:
        """From the plugin's counters, which know nothing of tokens and calls."""
        return cls(
            bytes_read=raw.bytes_read,
            bytes_used=raw.bytes_used,
            reads=raw.reads,
            hits=raw.hits,
            misses=raw.misses,
            panel_hits=raw.panel_hits,
            panel_reads=raw.panel_reads,
            rows_read=raw.rows_read,
            evictions=raw.evictions,
            wait_seconds=raw.wait_ns / 1e9,
            repack_seconds=raw.repack_ns / 1e9,
            op_seconds=raw.op_ns / 1e9,
            neurons_active=raw.neurons_active,
            neurons_newly_active=raw.neurons_newly_active,
            neurons_expected=raw.neurons_expected,
            experts_expected=raw.experts_expected,
            experts_foreseen=raw.experts_foreseen,
            layers_repeated=raw.layers_repeated,
            predict_seconds=raw.predict_ns / 1e9,
            manage_seconds=raw.manage_ns / 1e9,
            retries=raw.retries,
            errors=raw.errors,
        )

    def as_dict(self) -> dict[str, int | float | None]:
        """All counters, and those derived from them."""
        result: dict[str, int | float | None] = {f.name: getattr(self, f.name) for f in fields(self)}
        result["hit_rate"] = self.hit_rate
        result["bytes_per_token"] = self.bytes_per_token
        result["reads_per_token"] = self.reads_per_token
        result["neurons_per_token"] = self.neurons_per_token
        result["wait_per_token"] = self.wait_per_token
        return result


@dataclass(frozen=True)
class DraftStats:
    """What drafts have brought. Times in seconds."""

    source: str = "off"  # where guesses come from: "ngram", "mtp", "model"; "off": nowhere
    reason: str = ""  # why it is off, where that was not asked for; or why not "mtp", where "auto" has found a head
    passes: int = 0  # that have continued texts, with a draft or without
    tokens: int = 0  # that they gave
    drafts: int = 0  # passes that checked a draft
    drafted: int = 0  # tokens of these drafts
    accepted: int = 0  # of these, those that the model would have said
    pass_seconds: float = 0.0  # of the passes
    draft_seconds: float = 0.0  # of drafting, the reading of prompts by a draft model or a head included

    @property
    def acceptance(self) -> float | None:
        """Share of the drafted tokens that were accepted; None where none were drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_pass(self) -> float | None:
        """None before the first pass."""
        return self.tokens / self.passes if self.passes else None

    def plus(self, texts: int, drafted: int, accepted: int, pass_seconds: float, draft_seconds: float) -> DraftStats:
        """With one more pass, which went on with so many texts and checked so many drafted tokens."""
        return replace(
            self,
            passes=self.passes + 1,
            tokens=self.tokens + texts + accepted,
            drafts=self.drafts + bool(drafted),
            drafted=self.drafted + drafted,
            accepted=self.accepted + accepted,
            pass_seconds=self.pass_seconds + pass_seconds,
            draft_seconds=self.draft_seconds + draft_seconds,
        )

    def since(self, before: DraftStats) -> DraftStats:
        """What has come since `before`."""
        counted = ("passes", "tokens", "drafts", "drafted", "accepted", "pass_seconds", "draft_seconds")
        return replace(self, **{name: getattr(self, name) - getattr(before, name) for name in counted})

    def as_dict(self) -> dict[str, Any]:
        """All fields, and those derived from them."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**values, "acceptance": self.acceptance, "tokens_per_pass": self.tokens_per_pass}

    def __str__(self) -> str:
        if self.source == "off":
            return f"drafts: off{f' ({self.reason})' if self.reason else ''}"
        source = f"{self.source}: {self.reason}" if self.reason else self.source
        if self.acceptance is None or self.tokens_per_pass is None:
            return f"drafts ({source}): none made in {self.passes} passes"
        return (
            f"drafts ({source}): {self.accepted} of {self.drafted} accepted ({self.acceptance:.0%}), "
            f"{self.tokens_per_pass:.2f} tokens per pass"
        )


@dataclass(frozen=True)
class PromptStats:
    """What a folder of prompts has brought (`prompt_cache`). Times in seconds."""

    folder: str = ""  # where they are kept; "": nowhere
    asked: int = 0  # prompts that were looked up
    found: int = 0  # of these, those whose beginning was read
    recalled: int = 0  # tokens that were read and not computed
    written: int = 0  # bytes
    recall_seconds: float = 0.0
    write_seconds: float = 0.0  # of the thread that writes, beside the answers

    def __str__(self) -> str:
        if not self.folder:
            return "prompt cache: off"
        return (
            f"prompt cache: {self.recalled} tokens of {self.found} of {self.asked} prompts read in "
            f"{self.recall_seconds:.2f} s, {format_size(self.written)} written"
        )


@dataclass(frozen=True)
class StepStats:
    """Calls of several sequences that were filled up to one length, so that they took fewer steps."""

    filled: int = 0  # tokens that were computed for nothing
    saved: int = 0  # steps, each of which reads the weights

    def __str__(self) -> str:
        return f"steps: {self.saved} saved by {self.filled} tokens computed for nothing"


@dataclass(frozen=True)
class FlashStats:
    """State of one model's flash offload. `llm.flash.stats()` returns it.

    `decode` counts calls with one token of each sequence and those that check a draft (generation; its tokens are those
    that were accepted), `prompt` those with more of any; reads between calls, such as filling pinned panels at load,
    are only in `total`.
    """

    mode: str  # "flash", "resident" (the whole model fits) or "nothing" (the file has nothing to offload)
    predictor: str  # how active neurons are found: "exact", "lowrank" or "off"; "none" without neuron bundles
    io_engine: str  # "io_uring", "pread" or "none"
    budget: Budget
    memory: Breakdown  # where the budget goes; the flash part as granted
    slots_in_use: int  # bytes of slots, pins and ring in use now
    resident_weights: int  # bytes
    flash_weights: int  # bytes
    n_neurons: int = 0  # in bundles, of all layers
    reads_ahead: int = 0  # experts of the next layer, most; with lookahead="auto" as many as were found to be fastest
    total: Counters = field(default_factory=Counters)
    prompt: Counters = field(default_factory=Counters)
    decode: Counters = field(default_factory=Counters)
    last: Counters = field(default_factory=Counters)  # the last call
    throttled: int = 0  # periods since the load in which a CPU quota has stopped the process
    throttled_seconds: float = 0.0  # for which it has, of all cores together
    drafts: DraftStats = field(default_factory=DraftStats)
    prompts: PromptStats = field(default_factory=PromptStats)
    steps: StepStats = field(default_factory=StepStats)

    def active_neurons(self, counters: Counters) -> str:
        """Active neurons per token, and their share of all; "" where none were counted."""
        count = counters.neurons_per_token
        return f"{count:.0f} ({count / self.n_neurons:.1%})" if count and self.n_neurons else ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "mode": self.mode,
            "predictor": self.predictor,
            "io_engine": self.io_engine,
            "budget": self.budget.total,
            "budget_reason": self.budget.reason,
            "memory": self.memory.as_dict(),
            "slots_in_use": self.slots_in_use,
            "resident_weights": self.resident_weights,
            "flash_weights": self.flash_weights,
            "n_neurons": self.n_neurons,
            "throttled": self.throttled,
            "throttled_seconds": self.throttled_seconds,
            "reads_ahead": self.reads_ahead,
            "drafts": self.drafts.as_dict(),
            "prompts": asdict(self.prompts),
            "steps": asdict(self.steps),
            **{name: getattr(self, name).as_dict() for name in ("total", "prompt", "decode", "last")},
        }

    def __str__(self) -> str:
        predictor = "" if self.predictor == "none" else f", predictor {self.predictor}"
        lines = [
            f"mode {self.mode}{predictor}, I/O {self.io_engine}, "
            f"budget {format_size(self.budget.total)} ({self.budget.reason})",
            f"memory: {self.memory}",
        ]
        for name in ("prompt", "decode", "total"):
            counters: Counters = getattr(self, name)
            rate = "" if counters.hit_rate is None else f", hit rate {counters.hit_rate:.1%}"
            active = f", {neurons} neurons active per token" if (neurons := self.active_neurons(counters)) else ""
            lines.append(
                f"{name}: {counters.tokens} tokens, {format_size(counters.bytes_read)} in {counters.reads} reads "
                f"({format_size(int(counters.bytes_per_token))} per token){active}{rate}, "
                f"waited {counters.wait_seconds:.2f} s"
            )
        if self.drafts.source != "off":
            lines.append(str(self.drafts))
        if self.prompts.folder:
            lines.append(str(self.prompts))
        if self.steps.saved:
            lines.append(str(self.steps))
        if self.throttled:
            lines.append(explain_throttling(self.throttled, self.throttled_seconds))
        return "\n".join(lines)

"""What both servers tell of flash, by the same names: figures of the model that is loaded, and sums over its loads.

docs/reference/server.md has the table. Needs no package but those of llama_flash.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

__all__ = ["COUNTERS", "EVENTS", "GAUGES", "TEXTS", "TOKENS", "WORKER_COUNTERS", "WORKER_GAUGES", "Tally", "public"]

EVENTS = ("shrink", "grow", "pressure", "short")  # FlashEvent.kind
_COUNTED = ("total", "prompt", "decode", "drafts", "prompts", "steps")

# of the model that is loaded: name, help, key of FlashSession.describe
GAUGES = (
    ("budget_bytes", "DRAM budget of the process.", "budget"),
    ("granted_bytes", "Flash memory (slots, pins, rings) granted to the model.", "granted"),
    ("slots_in_use_bytes", "Flash memory in use.", "slots_in_use"),
    ("resident_weights_bytes", "Weights that stay in memory.", "resident_weights"),
    ("flash_weights_bytes", "Weights that stay on flash.", "flash_weights"),
)
# of all loads of a model: name, help, name in stats.Counters
_READING = (
    ("hits", "Experts and neurons found in slots.", "hits"),
    ("misses", "Experts and neurons that had to be read.", "misses"),
    ("read_bytes", "Bytes read from flash.", "bytes_read"),
    ("reads", "Reads from flash.", "reads"),
    ("wait_seconds", "Time that compute threads waited for reads.", "wait_seconds"),
    ("evictions", "Records that gave way to others.", "evictions"),
    ("read_retries", "Reads that were made again.", "retries"),
    ("read_errors", "Reads that failed.", "errors"),
)
# of a worker since the model was loaded: name, help, key of what it tells of its memory, name in stats.Counters
WORKER_GAUGES = (
    ("worker_budget_bytes", "DRAM budget of the worker.", "budget"),
    ("worker_held_bytes", "Memory that the worker's processes hold.", "held"),
    ("worker_slots_bytes", "Its memory for slots.", "slots"),
)
WORKER_COUNTERS = tuple((f"worker_{name}", f"{text[:-1]}, at the worker.", key) for name, text, key in _READING)
# of drafts, of all loads: name, help, name in stats.DraftStats
_DRAFTS = (
    ("drafted", "Tokens that were guessed and checked.", "drafted"),
    ("accepted", "Of these, those that the model would have said.", "accepted"),
    ("draft_passes", "Passes that have continued texts, with a draft or without.", "passes"),
    ("draft_seconds", "Time spent on guessing.", "draft_seconds"),
)
# of the folder of prompts, of all loads: name, help, name in stats.PromptStats
_PROMPTS = (
    ("prompts_looked_up", "Prompts looked for in the folder of prompts.", "asked"),
    ("prompts_found", "Of these, those whose beginning was read.", "found"),
    ("prompt_tokens_recalled", "Tokens of prompts that were read and not computed.", "recalled"),
    ("prompt_recall_seconds", "Time spent on reading them.", "recall_seconds"),
    ("prompt_written_bytes", "Bytes written to the folder of prompts.", "written"),
)
# of calls of several sequences, of all loads: name, help, name in stats.StepStats
_STEPS = (
    ("filled_tokens", "Tokens computed for nothing, so that sequences of unlike lengths take fewer steps.", "filled"),
    ("saved_steps", "Steps that this has saved, each of which reads the weights.", "saved"),
)
# of all loads of a model: name, help, part of FlashStats and name in it
COUNTERS = tuple(
    (name, text, part, key)
    for part, counted in (("total", _READING), ("drafts", _DRAFTS), ("prompts", _PROMPTS), ("steps", _STEPS))
    for name, text, key in counted
)
TOKENS = (("prompt", "prompt"), ("generated", "decode"))  # kind, part of FlashStats
TEXTS = {
    "model_loaded": "1 if it is loaded.",
    "tokens": "Tokens computed.",
    "events": "Flash memory given back or taken, and signs of memory pressure.",
    "loads": "Times that the model was loaded.",
    "worker_up": "0 if the worker is lost.",
    "throttled": "Periods in which a CPU quota stopped it: it has too many threads, or too small a quota.",
    "throttled_seconds": "Time for which a CPU quota stopped it, of all cores together.",
}


@dataclass
class Tally:
    """What a model did before it was last loaded, and its events. A model's counters begin anew with each load."""

    loads: int = 0
    events: Counter[str] = field(default_factory=Counter)
    counters: dict[str, Counter[str]] = field(default_factory=lambda: {part: Counter() for part in _COUNTED})

    def add(self, stats: dict[str, Any]) -> None:
        for part in _COUNTED:
            numbers = {name: value for name, value in stats[part].items() if isinstance(value, int | float)}
            self.counters[part].update(numbers)

    def count(self, part: str, name: str, now: dict[str, Any] | None) -> float:
        """Of all its loads; now: statistics of the present one."""
        before: float = self.counters[part][name]
        return before + (now[part][name] if now else 0)


def public(stats: dict[str, Any] | None) -> dict[str, Any] | None:
    """FlashSession.describe without paths: health is told to everybody."""
    if not stats:
        return stats
    told = {name: value for name, value in stats.items() if name != "path"}
    told["prompts"] = {name: value for name, value in stats["prompts"].items() if name != "folder"}
    return told

"""Options of the command line as those of a load, and the statistics of what was generated: `run`, `chat`, `bench`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ..budget.cores import default_threads, explain_throttling
from ..model.gguf import GgufMeta
from ..model.shape import KV_TYPES
from ..observe.stats import Counters, FlashStats
from ..options import FlashOffload
from ..sizes import format_size
from .common import DEFAULT_CTX, stderr

__all__ = ["context_tokens", "flash_options", "kv_type", "open_model", "print_statistics", "print_workers"]

_CTX_STEP = 256  # src/llama-context.cpp


def flash_options(params: Mapping[str, Any]) -> FlashOffload:
    """What a command's parameters say of flash offload.

    Raises:
        ValueError: a value that makes no sense.
    """
    chosen = {field.name: params[field.name] for field in fields(FlashOffload) if field.name in params}
    if chosen.get("reserve") == "0":
        chosen["reserve"] = 0
    if params.get("prompt_cache_dir") is not None:
        chosen["prompt_cache"] = params["prompt_cache_dir"]
    if chosen.get("lookahead", False) is None:
        chosen["lookahead"] = "auto"
    if chosen.get("workers", ()) is None:
        del chosen["workers"]
    return FlashOffload(**chosen)


def context_tokens(meta: GgufMeta, n_ctx: int) -> int:
    """Tokens meant by --n-ctx, rounded up as the engine does: `Llama` would keep fewer tokens than the engine."""
    tokens = n_ctx or min(meta.number("context_length", DEFAULT_CTX), DEFAULT_CTX)
    return -(-tokens // _CTX_STEP) * _CTX_STEP


def kv_type(option: str, name: str) -> int:
    """The number of a type of KV caches (enum ggml_type).

    Raises:
        ValueError: there is no such type.
    """
    if name not in KV_TYPES:
        raise ValueError(f"{option}: {name!r} is not one of {', '.join(KV_TYPES)}")
    return KV_TYPES[name]


def open_model(path: Path, meta: GgufMeta, params: Mapping[str, Any], flash: FlashOffload | None) -> Any:
    """The `llama_cpp.Llama` that a command's parameters ask for. flash: None loads it as stock llama.cpp does."""
    n_threads = params["threads"] or default_threads()
    settings = {
        "n_ctx": context_tokens(meta, params["n_ctx"]),
        "n_batch": params["n_batch"],
        "n_ubatch": params["n_ubatch"],
        "type_k": kv_type("--type-k", params["type_k"]),
        "type_v": kv_type("--type-v", params["type_v"]),
        "flash_attn": params["flash_attn"],
        "n_threads": n_threads,
        "n_threads_batch": n_threads,
        "seed": params["seed"],
        "verbose": params["verbose"],
    }
    with stderr.status(Text(f"loading {path.name}")):
        import llama_cpp

        llm = llama_cpp.Llama(str(path), flash_offload=flash, **settings)
    if llm.flash is not None and not params["verbose"]:
        stderr.print(llm.flash.summary, style="dim", soft_wrap=True)
    return llm


def print_statistics(stats: FlashStats, title: str) -> None:
    """As a table, on stderr."""
    table = Table(title=title, title_justify="left", min_width=60)
    table.add_column("flash offload")
    columns: list[Counters] = [stats.prompt, stats.decode, stats.total]
    for name in ("prompt", "generation", "total"):
        table.add_column(name, justify="right")
    table.add_row("tokens", *(str(c.tokens) for c in columns))
    table.add_row("read from flash", *(format_size(c.bytes_read) for c in columns))
    table.add_row("reads", *(str(c.reads) for c in columns))
    table.add_row("read per token", *(format_size(int(c.bytes_per_token)) for c in columns))
    if stats.n_neurons:
        table.add_row("neurons per token", *(stats.active_neurons(c) or "-" for c in columns))
    table.add_row("hit rate", *("-" if c.hit_rate is None else f"{c.hit_rate:.1%}" for c in columns))
    if stats.total.experts_expected:
        table.add_row("parts of experts read ahead, of these used", *(_foreseen(c) for c in columns))
    table.add_row("waited for reads", *(f"{c.wait_seconds:.2f} s" for c in columns))
    stderr.print(table)
    if stats.total.experts_expected and not stats.reads_ahead:
        stderr.print("reading ahead has stopped: tokens are faster without it")
    if stats.drafts.source != "off":
        stderr.print(str(stats.drafts))
    if stats.prompts.folder:
        stderr.print(str(stats.prompts))
    if stats.predictor != "none":
        stderr.print(f"predictor {stats.predictor}; neurons are of all layers")
    if stats.throttled:
        stderr.print(explain_throttling(stats.throttled, stats.throttled_seconds), soft_wrap=True)
    stderr.print(f"budget {format_size(stats.budget.total)} ({stats.budget.reason}): {stats.memory}", soft_wrap=True)


def print_workers(workers: Sequence[Mapping[str, Any]]) -> None:
    """What each has read, as a table on stderr. workers: as FlashSession.worker_stats has them."""
    table = Table(title="workers", title_justify="left", min_width=60)
    for name in ("", *(one["worker"] for one in workers)):
        table.add_column(name, justify="right" if name else "left")
    counters = [one["counters"] for one in workers]
    rates = [found.get("hit_rate") for found in counters]
    table.add_row("resident weights", *(format_size(one["resident"]) for one in workers))
    table.add_row("slots, pinned panels", *(format_size(one["slots"] + one["pinned"]) for one in workers))
    table.add_row("read from flash", *(format_size(found["bytes_read"]) for found in counters))
    table.add_row("hit rate", *("-" if rate is None else f"{rate:.1%}" for rate in rates))
    table.add_row("held by the process", *(format_size(one["held"]) for one in workers))
    table.add_row("its budget", *(format_size(one["budget"]) for one in workers))
    stderr.print(table)


def _foreseen(counters: Counters) -> str:
    read = counters.experts_expected
    return f"{read}, {counters.experts_foreseen / read:.0%}" if read else "-"

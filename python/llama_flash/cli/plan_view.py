"""Device profiles and plans as tables for the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..device.profile import DeviceProfile
from ..observe.stats import Counters
from ..planning.cost import Cost
from ..planning.drafted import DraftPlan
from ..planning.planner import LoadPlan, Option
from ..sizes import format_size
from ..workers.planned import DividedPlan

__all__ = ["describe_profile", "format_rate", "print_comparison", "print_divided", "print_plan", "print_profile"]

_WHERE = {
    "interpreter": "interpreter, libraries, engine's heap",
    "weights": "resident weights",
    "kv": "KV cache",
    "compute": "compute buffers",
    "outputs": "logits",
    "draft": "draft model, or head",
    "reserve": "reserve",
    "slots": "slots",
    "pinned": "pinned panels and neurons",
    "stream": "rings and work space",
    "bookkeeping": "bookkeeping",
}


def print_profile(console: Console, profile: DeviceProfile) -> None:
    """Rates by size of read and number in flight."""
    depths = sorted({read.depth for read in profile.reads})
    table = Table(title=f"{profile.device}: random reads, MB/s (mean latency)", title_justify="left")
    table.add_column("read")
    for depth in depths:
        table.add_column(f"{depth} in flight", justify="right")
    cells = {
        (read.chunk, read.depth): f"{read.bytes_per_second / 1e6:.0f} ({_duration(read.latency)})"
        for read in profile.reads
    }
    for chunk in sorted({read.chunk for read in profile.reads}):
        table.add_row(format_size(chunk), *(cells.get((chunk, depth), "-") for depth in depths))
    console.print(table)
    console.print(
        f"DRAM {profile.dram / 1e9:.1f} GB/s; {profile.io_engine} on a file of {format_size(profile.file_bytes)}",
        soft_wrap=True,
    )
    if not profile.direct:
        console.print("the file system has no direct reads: these went through the page cache", style="yellow")


def print_plan(console: Console, plan: LoadPlan) -> None:
    """Where the budget goes, what a token costs, and what other budgets would give."""
    memory = Table(title=f"{Path(plan.model).name}: {_mode(plan)}", title_justify="left", min_width=60)
    memory.add_column("DRAM")
    memory.add_column("size", justify="right")
    for name, size in plan.memory.as_dict().items():
        if size:
            neurons = (
                f" for {plan.neuron_slots} of {plan.n_neurons} neurons" if name == "slots" and plan.neuron_slots else ""
            )
            memory.add_row(_WHERE[name] + neurons, format_size(size))
    memory.add_section()
    memory.add_row("all of it", format_size(plan.memory.total))
    if plan.lent:
        memory.add_row("of it lent to flash while tokens are generated", format_size(plan.lent))
    memory.add_row(f"budget ({plan.budget.reason})", format_size(plan.budget.total))
    if plan.smallest:
        memory.add_row("smallest workable budget", f"{plan.smallest >> 20} MiB", style="bold")
    console.print(memory)

    console.print(_token(plan))

    if plan.drafts is not None:
        console.print(_drafts(plan.drafts))
    if plan.parallel > 1:
        console.print(_together(plan))
        console.print(_advice(plan), soft_wrap=True)

    others = Table(title="other budgets", title_justify="left", min_width=60)
    others.add_column("budget")
    for name in ("", "weights", "slots, pinned", "read per token", "tokens/s"):
        others.add_column(name, justify="right")
    for other in plan.others:
        others.add_row(*_option(other))
    console.print(others)
    console.print(f"rates: {describe_profile(plan.profile)}", soft_wrap=True)
    console.print(f"{plan.threads}", soft_wrap=True)
    console.print(f"assumed: {'; '.join(plan.cost.assumptions)}", soft_wrap=True)


def print_divided(console: Console, plan: DividedPlan) -> None:
    """What each host's memory is for, and what crosses for a token."""
    table = Table(title=f"{Path(plan.model).name}, divided among {len(plan.parts)} workers", title_justify="left")
    for name in ("", "this process", *(part.offer.endpoint for part in plan.parts)):
        table.add_column(name, justify="right" if name else "left")
    memory, parts, traffic = plan.client, plan.parts, plan.traffic
    table.add_row("layers", "-", *(f"{part.layers.start} to {part.layers.stop - 1}" for part in parts))
    own = max(0, plan.budget.total - memory.total)
    for name, here, there in (
        ("interpreter, libraries, heap", memory.interpreter, [part.offer.held for part in parts]),
        ("resident weights", memory.weights, [part.resident for part in parts]),
        ("KV cache", memory.kv, [part.kv for part in parts]),
        ("buffers, logits", memory.compute + memory.outputs, [part.compute for part in parts]),
        ("reserve", memory.reserve, [part.offer.reserve for part in parts]),
        ("left: slots, pinned panels, rings", own, [part.left for part in parts]),
    ):
        table.add_row(name, *map(format_size, (here, *there)))
    table.add_section()
    table.add_row("budget", *map(format_size, (plan.budget.total, *(part.offer.budget for part in parts))))
    table.add_row("weights on flash", *map(format_size, (plan.client_flash, *(part.on_flash for part in parts))))
    if all(part.seconds for part in parts):
        table.add_section()
        table.add_row("its drive, per second", "-", *(format_size(int(part.offer.flash_rate)) for part in parts))
        table.add_row("its memory, per second", "-", *(format_size(int(part.offer.dram_rate)) for part in parts))
        table.add_row("a token, expected", "-", *(f"{1000 * part.seconds:.1f} ms" for part in parts))
    table.add_section()
    table.add_row("sent to it for a token, at most", "-", *(format_size(each.up) for each in traffic))
    table.add_row("sent back", "-", *(format_size(each.down) for each in traffic))
    console.print(table)
    for offer in (part.offer for part in parts if part.offer.other_cpu):
        console.print(
            f"{offer.endpoint} has {offer.other_cpu}: answers are not promised to be those of one machine to the bit",
            soft_wrap=True,
        )
    console.print("no weight crosses; each host waits for the one before it", soft_wrap=True)
    if not all(part.seconds for part in parts):
        console.print(
            "layers by budgets alone: `llama-flash profile MODEL` on each host measures rates", soft_wrap=True
        )


def _token(plan: LoadPlan) -> Table:
    """What a token costs; of a first run from the least to the most."""
    cost = plan.cost
    usual = cost.usual or cost
    token = Table(title="a decoded token, expected", title_justify="left", min_width=60)
    token.add_column("what")
    token.add_column("amount", justify="right")
    for most in cost.traffic:
        least = next((part for part in usual.traffic if part.kind == most.kind), most)
        found = _range(f"{most.hit_rate:.0%}", f"{least.hit_rate:.0%}")
        sizes = _range(format_size(int(least.bytes)), format_size(int(most.bytes)))
        reads = _range(f"{least.reads:.0f}", f"{most.reads:.0f}")
        token.add_row(f"{most.kind} from flash, {found} found in memory", f"{sizes} in {reads} reads")
    if cost.traffic:
        seconds = _range(_duration(usual.io_seconds), _duration(cost.io_seconds))
        token.add_row(f"reading, {plan.io_engine}, up to {plan.io_depth} in flight", seconds)
    token.add_row(f"computing, {format_size(int(cost.touched))} of weights, at least", _duration(cost.compute_seconds))
    token.add_row("tokens per second", _rates(cost), style="bold")
    return token


def _drafts(drafts: DraftPlan) -> Table:
    """Tokens per second by how many of the drafted tokens are accepted."""
    size = format_size(drafts.bytes)
    sources = {"ngram": "the text itself", "mtp": f"the file's head, of {size}", "model": f"a model of {size}"}
    source = sources[drafts.source]
    reason = f": {drafts.reason}" if drafts.reason else ""
    table = Table(title=f"drafts from {source}, expected{reason}", title_justify="left", min_width=60)
    table.add_column("accepted")
    for name in ("drafted for a pass", "tokens/s"):
        table.add_column(name, justify="right")
    table.add_row("without drafts", "-", format_rate(drafts.without))
    for each in drafts.expected:
        table.add_row(f"{each.acceptance:.0%}", str(each.length), format_rate(each.tokens_per_second))
    if (seen := drafts.seen) is not None:
        name = f"{seen.acceptance:.0%}, as in the last run"
        table.add_row(name, str(seen.length), format_rate(seen.tokens_per_second), style="bold")
    return table


def _together(plan: LoadPlan) -> Table:
    """What several clients get, by how many there are."""
    table = Table(title="clients at the same time, expected", title_justify="left", min_width=60)
    table.add_column("clients")
    for name in ("tokens/s in all", "each", "read per token"):
        table.add_column(name, justify="right")
    for option in plan.together:
        rates = option.cost.tokens_per_second_range
        each = [rate / option.sequences for rate in rates]
        style = "bold" if option.sequences == plan.parallel else None
        columns = (_rates(option.cost), _range(*map(format_rate, each)), _sizes(option.cost))
        table.add_row(str(option.sequences), *columns, style=style)
    return table


def _advice(plan: LoadPlan) -> str:
    best = plan.advised_parallel
    if best == max(option.sequences for option in plan.together):
        return f"more clients bring more tokens per byte read, up to {best} at least, or as many as have room"
    if best == 1:
        return "more clients bring no more tokens: one at a time is as fast"
    return f"more clients bring more tokens per byte read until {best}: twice as many bring less than a tenth more"


def print_comparison(
    console: Console, cost: Cost, profile: DeviceProfile, decode: Counters, rate: float | None
) -> None:
    """Expected beside measured; rate: tokens per second of generation."""
    table = Table(title=f"generation, the last {decode.tokens} tokens", title_justify="left", min_width=60)
    table.add_column("per token")
    table.add_column("expected", justify="right")
    table.add_column("measured", justify="right")
    table.add_row("read from flash", _sizes(cost), format_size(int(decode.bytes_per_token)))
    reads = _range(f"{(cost.usual or cost).reads_per_token:.0f}", f"{cost.reads_per_token:.0f}")
    table.add_row("reads", reads, f"{decode.reads_per_token:.0f}")
    table.add_row("tokens per second", _rates(cost), format_rate(rate) if rate else "-")
    console.print(table)
    console.print(
        f"expected by {describe_profile(profile)}; {'; '.join(cost.assumptions)}", soft_wrap=True, style="dim"
    )


def describe_profile(profile: DeviceProfile) -> str:
    """Where the rates are from."""
    if profile.source == "defaults":
        return "cautious defaults (`llama-flash profile` measures)"
    if profile.source == "quick probe":
        return f"a quick probe of {profile.device} (`llama-flash profile` measures more)"
    return f"the profile of {profile.device}, {profile.measured[:10]}"


def format_rate(rate: float) -> str:
    return f"{rate:.2f}" if rate < 10 else f"{rate:.0f}"


def _mode(plan: LoadPlan) -> str:
    if plan.mode == "resident":
        return "the whole model stays in memory"
    if plan.mode == "nothing":
        return "nothing could be left on flash, it runs as stock"
    predictor = "" if plan.predictor == "none" else f", predictor {plan.predictor}"
    return f"{format_size(plan.flash_weights)} of weights on flash{predictor}"


def _option(other: Option) -> tuple[str, ...]:
    if other.memory is None or other.cost is None:
        return (other.label, format_size(other.budget), other.mode, "-", "-", "-")
    where = {"flash": "on flash", "resident": "resident", "nothing": "as stock"}[other.mode]
    where += "" if other.predictor == "none" else f", {other.predictor}"
    return (
        other.label,
        format_size(other.budget),
        where,
        format_size(other.memory.slots + other.memory.pinned),
        _sizes(other.cost),
        _rates(other.cost),
    )


def _range(least: str, most: str) -> str:
    return least if least == most else f"{least} to {most}"


def _sizes(cost: Cost) -> str:
    """Bytes of a token."""
    return _range(*(format_size(int(n)) for n in cost.bytes_per_token_range))


def _rates(cost: Cost) -> str:
    """Tokens per second."""
    return _range(*map(format_rate, cost.tokens_per_second_range))


def _duration(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"

"""`llama-flash simulate`: what cache policies would have made of a trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from ..sizes import format_size
from .common import AsJson, share, stderr, stdout

if TYPE_CHECKING:
    from ..observe.consistency import Advice, Consistency, Routing
    from ..observe.simulate import Result
    from ..observe.trace import Run

__all__ = ["EPILOG", "simulate"]

EPILOG = (
    "Examples:  [bold]llama-flash simulate run.npz[/]   |   "
    "[bold]llama-flash simulate run.npz --cache 20%,50% --policy lru,lfu --json[/]"
)


def simulate(
    file: Annotated[Path, typer.Argument(help="What llama-flash trace wrote.", metavar="TRACE")],
    cache: Annotated[str, typer.Option("--cache", help="Slots, as shares of the records.")] = "20%,36%,45%,50%,75%",
    policy: Annotated[str, typer.Option("--policy", help="all, or some of what the table has, with commas.")] = "all",
    skip: Annotated[
        str, typer.Option("--skip", help="First part of the tokens, which is replayed, not counted.")
    ] = "33%",
    as_json: AsJson = False,
) -> None:
    """Replay a trace against cache policies: hit rates, and misses in those of Belady's optimum.

    lfu is the plugin's own policy; where the trace tells what its run counted, that is replayed too, and compared.
    Beside it SRP and SCH, how consistent the routing is from token to token, and the cache size that they advise.
    """
    from ..observe.consistency import advise, consistency, routing_of
    from ..observe.simulate import POLICIES, as_counted
    from ..observe.simulate import simulate as replay
    from ..observe.trace import Trace

    shares = [share("--cache", part) for part in cache.split(",")]
    skipped = 0.0 if skip.strip() in ("0", "0%") else share("--skip", skip)
    names = list(POLICIES) if policy == "all" else [name.strip() for name in policy.split(",")]
    trace = Trace.load(file)
    with stderr.status("replaying"):
        results = {part: replay(trace, part, names, skip=skipped) for part in shares}
        run = as_counted(trace)
        routing = routing_of(trace)
        first = int(skipped * routing.n_tokens) if routing else 0
        measured = consistency(routing, shares, skip=first) if routing else []
        advice = advise(routing, measured, skip=first) if routing else None
    if as_json:
        report = {
            "trace": str(file),
            "model": trace.model,
            "results": [result.as_dict() for part in shares for result in results[part]],
            "run": None if run is None else {"counted": vars(run[0]), "simulated": vars(run[1])},
            "consistency": [one.as_dict() for one in measured],
            "advice": None if advice is None else advice.as_dict(),
        }
        print(json.dumps(report))
        return
    unit = "neurons" if all(tensor.neurons for tensor in trace.tensors) else "experts"
    _print_policies(trace.model, unit, results)
    _print_run(run)
    if routing and measured and advice:
        _print_consistency(shares, measured)
        _print_advice(routing, unit, advice)


def _print_policies(model: str, unit: str, results: dict[float, list[Result]]) -> None:
    first = next(iter(results.values()))
    stdout.print(f"{model}: {unit} found in slots, {first[0].tokens} tokens; beside it misses, in those of the optimum")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("policy")
    for part in results:
        table.add_column(f"{100 * part:g}%", justify="right", no_wrap=True)
    for row in zip(*results.values(), strict=True):
        cells = []
        for result in row:
            times = "" if result.of_optimum is None else f"{result.of_optimum:.2f}"
            cells.append(f"{result.hit_rate:.1%} {times:>5}")
        table.add_row(row[0].policy, *cells)
    stdout.print(table)


def _print_run(run: tuple[Run, Run] | None) -> None:
    if run is None:
        return
    counted, simulated = run
    same = (counted.hits, counted.misses) == (simulated.hits, simulated.misses)
    stdout.print(
        f"the traced run, {sum(counted.slots.values())} slots: {counted.hits} hits, {counted.misses} misses; "
        "lfu replayed: " + ("the same" if same else f"{simulated.hits} hits, {simulated.misses} misses"),
        soft_wrap=True,
    )


def _print_consistency(shares: list[float], measured: list[Consistency]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("segment", no_wrap=True)
    for name in ("SRP", "of layers", "size", *(f"SCH\n{100 * part:g}%" for part in shares)):
        table.add_column(name, justify="right", no_wrap=True)
    for one in measured:
        least, most = one.layers
        rates = [f"{rate:.1%}" for rate in one.sch]
        table.add_row(
            f"{one.segment} tokens", f"{one.srp:.1%}", f"{least:.0%} to {most:.0%}", f"{one.size_ratio:.2f}", *rates
        )
    stdout.print(table)


def _print_advice(routing: Routing, unit: str, advice: Advice) -> None:
    beyond = "" if advice.times is None else f"; a slot up to there saves {advice.times:.1f} times one beyond it"
    stdout.print(
        f"advised cache: {advice.ratio:.1f} times the {unit} of a token, {advice.experts} of the {routing.n_experts} "
        f"{unit} ({advice.share:.0%}), {format_size(advice.bytes)} of slots: SCH {advice.sch:.1%} there{beyond}",
        soft_wrap=True,
    )

"""`llama-flash simulate`: what cache policies would have made of a trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from .common import AsJson, share, stderr, stdout

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
    """
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
    if as_json:
        report = {
            "trace": str(file),
            "model": trace.model,
            "results": [result.as_dict() for part in shares for result in results[part]],
            "run": None if run is None else {"counted": vars(run[0]), "simulated": vars(run[1])},
        }
        print(json.dumps(report))
        return
    first = results[shares[0]][0]
    unit = "neurons" if all(tensor.neurons for tensor in trace.tensors) else "experts"
    stdout.print(
        f"{trace.model}: {unit} found in slots, {first.tokens} tokens; beside it misses, in those of the optimum"
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("policy")
    for part in shares:
        table.add_column(f"{100 * part:g}%", justify="right", no_wrap=True)
    for i, name in enumerate(names):
        cells = []
        for part in shares:
            result = results[part][i]
            times = "" if result.of_optimum is None else f"{result.of_optimum:.2f}"
            cells.append(f"{result.hit_rate:.1%} {times:>5}")
        table.add_row(name, *cells)
    stdout.print(table)
    if run is not None:
        counted, simulated = run
        same = (counted.hits, counted.misses) == (simulated.hits, simulated.misses)
        stdout.print(
            f"the traced run, {sum(counted.slots.values())} slots: {counted.hits} hits, {counted.misses} misses; "
            "lfu replayed: " + ("the same" if same else f"{simulated.hits} hits, {simulated.misses} misses"),
            soft_wrap=True,
        )

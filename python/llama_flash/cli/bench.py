"""`llama-flash bench`: how fast a model decodes on this machine, by budget.

Each measurement is `llama-flash run` in a process of its own, so that nothing is left warm but what the device keeps.

Long: the options of the command are the parameters of its function.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..budget.capped import run_capped
from ..model.gguf import GgufMeta, check_vocabulary, read_gguf
from ..sizes import format_size
from . import common as c
from .again import cap_bytes, cap_values, command_line
from .loading import context_tokens, flash_options

__all__ = ["EPILOG", "bench"]

EPILOG = (
    "Examples:  [bold]llama-flash bench qwen3-30b-a3b-q4_0.gguf --dram-budget 50% --dram-budget 25%[/]   |   "
    "[bold]llama-flash bench model.gguf --cap 8GiB --naive --json[/]"
)

_PROMPT = "The quick brown fox jumps over the lazy dog. In the meantime,"
_INTERRUPTED, _TERMINATED = 130, 143


def bench(
    ctx: typer.Context,
    model: c.Model = None,
    dram_budget: Annotated[
        list[str] | None,
        typer.Option(
            "--dram-budget",
            metavar="SIZE",
            help="A size, or a share of the model file; may be given several times.",
            show_default="50%",
            rich_help_panel="Measured",
        ),
    ] = None,
    cap: Annotated[
        list[str] | None,
        typer.Option(
            "--cap",
            metavar="SIZE",
            help="The same, enforced by a memory cgroup; may be given several times.",
            rich_help_panel="Measured",
        ),
    ] = None,
    naive: Annotated[
        bool,
        typer.Option("--naive", help="Also stock llama.cpp with mmap, below each cap.", rich_help_panel="Measured"),
    ] = False,
    resident: Annotated[
        bool,
        typer.Option(
            "--resident/--no-resident", help="Also stock llama.cpp, if the model fits.", rich_help_panel="Measured"
        ),
    ] = True,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Of each.", rich_help_panel="Measured")] = 3,
    prompt: Annotated[
        str, typer.Option("-p", "--prompt", help="Text to continue.", show_default=False, rich_help_panel="Text")
    ] = _PROMPT,
    n_tokens: c.Tokens = 64,
    temperature: c.Temperature = 0.0,
    seed: c.Seed = 1,
    reserve: c.Reserve = None,
    what: c.What = "auto",
    predictor: c.Predictor = "auto",
    window: c.Window = None,
    lookahead: c.Lookahead = None,
    follow: c.Follow = True,
    warm_start: c.WarmStart = False,
    io_engine: c.IoEngine = "auto",
    workers: c.Workers = None,
    worker_token_file: c.WorkerToken = None,
    n_ctx: c.Ctx = 0,
    n_batch: c.NBatch = 512,
    n_ubatch: c.NUbatch = 512,
    type_k: c.TypeK = "f16",
    type_v: c.TypeV = "f16",
    flash_attn: c.FlashAttn = False,
    threads: c.Threads = 0,
    as_json: c.AsJson = False,
) -> None:
    """Measure how fast a model decodes with flash offload, at several budgets, and over workers if any are named.

    Below a share of a model that is smaller than the interpreter nothing could start: then it is that share of the
    weights on top of what the process takes without them.
    """
    c.utf8("--prompt", prompt)
    path = c.model_path(model)
    meta = read_gguf(path)
    check_vocabulary(meta)
    flash_options({**ctx.params, "dram_budget": "auto"})  # what is wrong is said before anything is measured
    rows = _rows(ctx, path, meta)
    with _progress(len(rows) * repeats) as done:
        # in turns, so that what changes on the machine meanwhile concerns all of them
        for number in range(repeats):
            for row in rows:
                if row.error is None:
                    _evict(meta)
                    row.measure()
                done(row, number)
    if as_json:
        asked = {"model": str(path), "file_bytes": meta.file_bytes, "tokens": n_tokens, "repeats": repeats}
        c.print_json({**asked, "threads": threads or len(os.sched_getaffinity(0)), "rows": [r.as_dict() for r in rows]})
    else:
        _print(path, meta, rows)
    raise typer.Exit(1 if all(row.error for row in rows) else 0)


@dataclass
class _Row:
    """One thing that is measured."""

    kind: str  # "flash", "workers", "naive" or "resident"
    limit: str  # "dram_budget", "cap" or ""
    asked: str  # as the user wrote it
    n_bytes: int | None
    command: list[str]
    runs: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None  # why it could not be measured

    @property
    def name(self) -> str:
        names = {"flash": "flash", "workers": "over workers", "naive": "stock mmap", "resident": "stock resident"}
        kind = names[self.kind]
        return kind if not self.limit else f"{kind}, {'cap' if self.limit == 'cap' else 'budget'} {self.asked}"

    def measure(self) -> None:
        """Once more.

        Raises:
            KeyboardInterrupt: the run was interrupted.
            SystemExit: it was ended by SIGTERM, which is passed on to a capped one.
        """
        cap = None
        if self.limit == "cap":
            assert self.n_bytes is not None
            result = run_capped(self.n_bytes, self.command, capture_output=True)
            code, output, log, cap = result.exit_code, result.stdout or "", result.stderr or "", cap_values(result)
            if result.interrupted:
                raise KeyboardInterrupt
            if result.oom_kills:
                self.error = "killed for memory"
                return
        else:
            code, output, log = _run(self.command)
        if code == _INTERRUPTED:
            raise KeyboardInterrupt
        if code == _TERMINATED:
            raise SystemExit(code)
        if code != 0:
            self.error = (log.strip().splitlines() or [f"exit code {code}"])[-1].removeprefix("llama-flash: ")
            return
        run = json.loads(output)
        if run["tokens_per_second"] is None:
            self.error = "the model ended its text at once"
            return
        self.runs.append({**run, "cap": cap})

    def figures(self, name: str) -> list[float]:
        return [run[name] for run in self.runs]

    def flash(self, name: str) -> float | None:
        """Median of a figure of generation; None without flash offload, or where workers have it."""
        if self.kind == "workers":
            return None
        values = [run["flash"]["decode"][name] for run in self.runs if run["flash"]]
        return statistics.median(values) if values and None not in values else None

    @property
    def peak(self) -> int | None:
        peaks = [run["cap"]["peak_bytes"] for run in self.runs if run["cap"]]
        return max(peaks) if peaks and None not in peaks else None

    def as_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "limit": self.limit or None,
            "asked": self.asked or None,
            "bytes": self.n_bytes,
            "error": self.error,
            "tokens_per_second": _spread(self.figures("tokens_per_second")),
            "seconds_to_first_token": _spread(self.figures("seconds_to_first_token")),
            "bytes_per_token": self.flash("bytes_per_token"),
            "hit_rate": self.flash("hit_rate"),
            "peak_bytes": self.peak,
            "runs": self.runs,
        }


def _rows(ctx: typer.Context, path: Path, meta: GgufMeta) -> list[_Row]:
    """What is measured, in the order of the table."""
    params, n_ctx = ctx.params, context_tokens(meta, ctx.params["n_ctx"])

    def command(budget: int | str, *options: str) -> list[str]:
        left_out = dict.fromkeys(("cap", "naive", "resident", "repeats", "workers", "worker_token_file"))
        changed = {"model": path, "dram_budget": budget, "as_json": True, **left_out}
        return command_line(ctx, "run", ["--ignore-eos", *options], **changed)

    rows, capped = [], {}
    for asked in params["dram_budget"] or ([] if params["cap"] else ["50%"]):
        size = None if asked == "auto" else cap_bytes(asked, meta, n_ctx)
        rows.append(_Row("flash", "dram_budget", asked, size, command(size or "auto")))
        if size:
            capped[asked] = size
    for asked in params["cap"] or []:
        size = capped[asked] = capped.get(asked) or cap_bytes(asked, meta, n_ctx)
        rows.append(_Row("flash", "cap", asked, size, command("auto")))
    if params["workers"]:
        token = params["worker_token_file"]
        named = ["--workers", params["workers"], *(["--worker-token-file", str(token)] if token else [])]
        rows.append(_Row("workers", "", "", None, command("auto", *named)))
    if params["naive"]:
        rows += [_Row("naive", "cap", asked, size, command("auto", "--no-flash")) for asked, size in capped.items()]
    if params["resident"] and _fits(path, n_ctx):
        rows.append(_Row("resident", "", "", None, command("auto", "--no-flash")))
    return rows


def _fits(path: Path, n_ctx: int) -> bool:
    """Whether the whole model has room; says so if not."""
    from ..errors import FlashBudgetError
    from ..planning.planner import plan

    try:
        fits = plan(path, n_ctx=n_ctx).mode != "flash"
    except FlashBudgetError:
        fits = False
    if not fits:
        c.stderr.print("the model does not fit into memory: no resident run", style="yellow")
    return fits


def _run(command: Sequence[str]) -> tuple[int, str, str]:
    """Exit code, output, and what was said on stderr."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            output, log = process.communicate()
        except BaseException:
            process.terminate()
            raise
    return process.returncode, output, log


def _evict(meta: GgufMeta) -> None:
    """Drops the model from the page cache, in which an earlier run may have left it."""
    for file in meta.files:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[_Row, int], None]]:
    """Yields a function to call after each run."""

    def said(row: _Row) -> str:
        return f"{row.name}: {row.error or format(row.runs[-1]['tokens_per_second'], '.1f') + ' tokens/s'}"

    if not c.stderr.is_terminal:
        yield lambda row, number: print(f"run {number + 1}, {said(row)}", file=sys.stderr, flush=True)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=c.stderr, transient=True) as progress:
        task = progress.add_task("measuring", total=total)
        yield lambda row, _number: progress.update(task, advance=1, description=said(row)[:60])


def _spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _print(path: Path, meta: GgufMeta, rows: list[_Row]) -> None:
    table = Table(
        title=f"{path.name}, {format_size(meta.file_bytes)}: decoding, medians",
        title_justify="left",
        box=None,
        pad_edge=False,
        header_style="bold",
    )
    table.add_column("RUN", no_wrap=True)
    for name in ("LIMIT", "TOK/S", "MIN-MAX", "FIRST", "B/TOKEN", "HITS", "PEAK"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        rate, first = _spread(row.figures("tokens_per_second")), _spread(row.figures("seconds_to_first_token"))
        limit = "-" if row.n_bytes is None else format_size(row.n_bytes)
        if rate is None or first is None:
            table.add_row(row.name, limit, *"------")
            continue
        read, hits = row.flash("bytes_per_token"), row.flash("hit_rate")
        table.add_row(
            row.name,
            limit,
            _rate(rate["median"]),
            f"{_rate(rate['min'])}-{_rate(rate['max'])}",
            f"{first['median']:.2f} s",
            "-" if read is None else format_size(int(read)),
            "-" if hits is None else f"{hits:.0%}",
            "-" if row.peak is None else format_size(row.peak),
        )
    c.stdout.print(table)
    for row in rows:
        if row.error:
            c.stdout.print(f"{row.name}: {row.error}", style="yellow", markup=False, soft_wrap=True)
    c.stdout.print(
        "FIRST: until the first token, the prompt included. B/TOKEN, HITS: read from flash, found in memory",
        style="dim",
    )


def _rate(rate: float) -> str:
    return f"{rate:.{0 if rate >= 100 else 1 if rate >= 10 else 2}f}"

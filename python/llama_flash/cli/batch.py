"""`llama-flash batch`: a file of requests becomes a file of answers.

Long: the options of the command are the parameters of its function.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from ..options import FlashOffload
from . import common as c

if TYPE_CHECKING:
    from ..batch.job import Progress

__all__ = ["EPILOG", "batch"]

EPILOG = (
    "Examples:  [bold]llama-flash batch requests.jsonl -o answers.jsonl --model qwen3-30b-a3b-q4_0.gguf[/]   |   "
    "[bold]llama-flash batch requests.jsonl -o answers.jsonl --dram-budget 8GiB --parallel 8[/]"
)

_SOME_ERRORS = 3
_LINE_EVERY = 10.0  # seconds


def batch(
    source: Annotated[
        Path, typer.Argument(metavar="REQUESTS.jsonl", help="A request in each line; -: standard input.")
    ],
    target: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="FILE", help="Where answers go, a line each, in the order they end."),
    ],
    model: Annotated[
        Path | None, typer.Option("--model", metavar="MODEL.gguf", help="GGUF file, or its first shard.")
    ] = None,
    parallel: Annotated[
        str, typer.Option("--parallel", metavar="N", help="Answers computed at the same time, or auto.")
    ] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Begin anew: what FILE holds is overwritten.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Ask again what ended in an error.")] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of requests that name none.")] = 1,
    dram_budget: c.DramBudget = "auto",
    reserve: c.Reserve = None,
    predictor: c.Predictor = "auto",
    workers: c.Workers = None,
    worker_token_file: c.WorkerToken = None,
    n_ctx: Annotated[
        int | None,
        typer.Option(
            *("-c", "--n-ctx", "--ctx"),
            min=1,
            help="Context of each answer, in tokens. Default: what the longest request may need.",
            rich_help_panel="Context",
        ),
    ] = None,
    threads: c.Threads = 0,
    as_json: c.AsJson = False,
    verbose: c.Verbose = False,
) -> None:
    """Answer a file of requests in OpenAI's batch format, several at the same time, and go on where it was stopped.

    Without --model the small mixture of experts that comes with the package answers.
    """
    from ..batch.job import BatchSettings, Job

    options: dict[str, Any] = {
        "dram_budget": dram_budget,
        "reserve": 0 if reserve == "0" else reserve,
        "predictor": predictor,
        "workers": workers or (),
        "worker_token_file": worker_token_file,
    }
    FlashOffload(**options)  # what is wrong is said before anything is read
    settings = BatchSettings(
        c.model_path(model),
        parallel=_parallel(parallel),
        n_ctx=n_ctx,
        threads=threads or None,
        seed=seed,
        flash_offload=options,
        verbose=verbose,
        force=force,
        retry=retry,
    )
    with _shown() as show:
        job = Job(source, target, settings, _say, show)
        try:
            done = job.run(sys.stdin.buffer)
        finally:
            if job.progress.requests:
                _say(_summary(target, job.progress))
    if as_json:
        c.print_json(done.as_dict())
    raise typer.Exit(_SOME_ERRORS if done.errors else 0)


def _parallel(text: str) -> int | None:
    """None: auto. Raises ValueError."""
    if text == "auto":
        return None
    if not text.isdecimal() or not 1 <= int(text) <= 256:
        raise ValueError(f"--parallel: {text!r} is neither auto nor a whole number from 1 to 256")
    return int(text)


def _say(line: str) -> None:
    c.stderr.print(line, soft_wrap=True)


def _summary(target: Path, done: Progress) -> str:
    missing = done.requests - done.found - done.answered
    rest = f", {missing} are missing: the same command goes on from here" if missing else ""
    errors = f", {done.errors} of them errors" if done.errors else ""
    return f"{target}: {done.found + done.answered} of {done.requests} answers{errors}{rest}; {_rates(done)}"


def _rates(done: Progress) -> str:
    seconds = max(done.seconds, 1e-9)
    tokens = f"{done.completion_tokens / seconds:.1f} tokens/s" if done.seconds else "nothing to compute"
    return f"{done.answered / seconds:.2f} answers/s, {tokens}" if done.seconds else tokens


@contextmanager
def _shown() -> Iterator[Callable[[Progress], None]]:
    """A bar on a terminal, else a line every ten seconds."""
    if not c.stderr.is_terminal:
        yield _Lines().show
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rates]}"), TimeRemainingColumn())
    with Bar(*columns, console=c.stderr, transient=True) as bar:
        task = bar.add_task("", total=None, rates="", visible=False)

        def show(done: Progress) -> None:
            bar.update(
                task,
                total=done.requests,
                completed=done.found + done.answered,
                rates=_rates(done),
                visible=True,
            )

        yield show


class _Lines:
    def __init__(self) -> None:
        self._said = time.monotonic()

    def show(self, done: Progress) -> None:
        now = time.monotonic()
        if now < self._said + _LINE_EVERY or not done.answered:
            return
        self._said = now
        left = (done.requests - done.found - done.answered) * done.seconds / done.answered
        _say(f"{done.found + done.answered} of {done.requests}, {_rates(done)}, {left:.0f} s left")

"""`llama-flash run`: text from a prompt, with statistics."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..budget import default_reserve, held_by_process
from ..bundles import read_bundles
from ..capped import run_capped
from ..gguf_meta import GgufMeta, read_gguf
from ..options import FlashOffload
from ..placement import ContextShape, estimate, least_for_neurons
from ..sizes import format_size, parse_size
from ..stats import Counters, FlashStats
from .common import (
    DEFAULT_CTX,
    AsJson,
    Ctx,
    DramBudget,
    Model,
    Plot,
    Predictor,
    Threads,
    Window,
    model_path,
    report_cap,
    stderr,
)

if TYPE_CHECKING:
    from ..snapshot import Snapshot

_DEFAULT_PROMPT = "def read_lines(path):\n"


__all__ = ["EPILOG", "run"]

EPILOG = (
    "Examples:  [bold]llama-flash run -p 'import os' --cap 50%[/]   |   "
    "[bold]llama-flash run qwen3-30b-a3b-q4_0.gguf -p 'Once upon a time' --cap 8GiB -n 200[/]"
)


def run(
    model: Model = None,
    prompt: Annotated[
        str, typer.Option("-p", "--prompt", help="Text to continue.", show_default=False)
    ] = _DEFAULT_PROMPT,
    cap: Annotated[
        str | None, typer.Option("--cap", help="Run in a memory cgroup: a size, or a share of the model file (50%).")
    ] = None,
    n_tokens: Annotated[int, typer.Option("-n", "--tokens", min=1, help="Tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option("--temp", min=0.0, help="0: always the likeliest token.")] = 0.7,
    seed: Annotated[int, typer.Option("--seed", help="Of the sampler.")] = 1,
    dram_budget: DramBudget = "auto",
    predictor: Predictor = "auto",
    window: Window = None,
    n_ctx: Ctx = 0,
    threads: Threads = 0,
    plot: Plot = None,
    as_json: AsJson = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the engine's log.")] = False,
    snapshot: Annotated[Path | None, typer.Option("--snapshot", hidden=True)] = None,
) -> None:
    """Generate text with flash offload, and print the statistics.

    Without MODEL.gguf the small mixture of experts that comes with the package is used.
    """
    path = model_path(model)
    meta = read_gguf(path)
    ctx = n_ctx or min(meta.number("context_length", DEFAULT_CTX), DEFAULT_CTX)
    options = FlashOffload(dram_budget=dram_budget, predictor=predictor, window=window)  # type: ignore[arg-type]
    if plot is not None:
        from ..pictures import check_target

        check_target(plot)
    if cap is not None:
        arguments = ["-p", prompt, "-n", n_tokens, "--temp", temperature, "--seed", seed, "--dram-budget", dram_budget]
        arguments += ["--predictor", predictor, *([] if window is None else ["--window", window])]
        arguments += ["-c", ctx, "-t", threads, *(["--json"] if as_json else []), *(["--verbose"] if verbose else [])]
        command = [sys.executable, "-m", "llama_flash", "run", str(path), *map(str, arguments)]
        # drawn out here: matplotlib takes more memory than a cap may leave
        with tempfile.TemporaryDirectory(prefix="llama-flash-") as folder:
            drawn_later = Path(folder, "snapshot") if plot is not None else None
            command += [] if drawn_later is None else ["--snapshot", str(drawn_later)]
            code = _run_again_capped(_cap_bytes(cap, meta, ctx), command, as_json)
            if plot is not None and drawn_later is not None and drawn_later.exists():
                from ..snapshot import Snapshot

                _draw(Snapshot.load(drawn_later), plot)
        raise typer.Exit(code)
    wanted = plot is not None or snapshot is not None
    result, seen = _generate(path, prompt, n_tokens, temperature, seed, ctx, threads, options, as_json, verbose, wanted)
    if as_json:
        print(json.dumps(result))
    if seen is not None and snapshot is not None:
        seen.save(snapshot)
    if seen is not None and plot is not None:
        _draw(seen, plot)
    raise typer.Exit(130 if result["interrupted"] else 0)


def _generate(
    path: Path,
    prompt: str,
    n_tokens: int,
    temperature: float,
    seed: int,
    n_ctx: int,
    threads: int,
    options: FlashOffload,
    quiet: bool,
    verbose: bool,
    with_snapshot: bool,
) -> tuple[dict[str, Any], Snapshot | None]:
    """Streams the continuation of `prompt` to stdout; returns what was generated and measured."""
    with stderr.status(f"loading {path.name}"):
        import llama_cpp

        from ..plan_view import print_comparison
        from ..planner import cost_of
        from ..profiles import profile_for

        n_threads = threads or len(os.sched_getaffinity(0))
        llm = llama_cpp.Llama(
            str(path),
            flash_offload=options,
            n_ctx=n_ctx,
            n_threads=n_threads,
            n_threads_batch=n_threads,
            seed=seed,
            verbose=verbose,
        )
    if not verbose:
        stderr.print(llm.flash.summary, style="dim", soft_wrap=True)
    pieces: list[str] = []
    interrupted = False
    if not quiet:
        print(prompt, end="", flush=True)
    started = time.perf_counter()
    first = finished = started
    try:
        for chunk in llm.create_completion(
            prompt, max_tokens=n_tokens, temperature=temperature, seed=seed, stream=True
        ):
            pieces.append(chunk["choices"][0]["text"])
            finished = time.perf_counter()
            if len(pieces) == 1:
                first = finished
            if not quiet:
                print(pieces[-1], end="", flush=True)
    except KeyboardInterrupt:
        interrupted = True
    if not quiet:
        print(flush=True)
    stats: FlashStats = llm.flash.stats()
    expect = cost_of(llm.flash)
    seen = llm.flash.snapshot() if with_snapshot else None
    llm.close()
    # when the model's memory is free again: where no profile is kept, the file is read
    rates = profile_for(path, options.io_engine)
    expected = expect(rates)
    seconds = finished - first
    rate = stats.decode.tokens / seconds if seconds > 0 else None
    result = {
        "model": str(path),
        "prompt": prompt,
        "text": "".join(pieces),
        "interrupted": interrupted,
        "seconds_to_first_token": first - started,
        "tokens_per_second": rate,
        "expected": {**expected.as_dict(), "rates": rates.source},
        "flash": stats.as_dict(),
    }
    if not quiet:
        _report(stats, result)
        if stats.decode.tokens:
            print_comparison(stderr, expected, rates, stats.decode, rate)
    return result, seen


def _draw(seen: Snapshot, plot: Path) -> None:
    from ..pictures import draw

    draw(seen, path=plot)
    stderr.print(f"picture in {plot}", soft_wrap=True)


def _run_again_capped(limit: int, command: list[str], as_json: bool) -> int:
    """Runs this program with the same arguments below the cap. Returns the exit code."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    result = run_capped(limit, command, env=environment, capture_output=as_json)
    if as_json:
        sys.stderr.write(result.stderr or "")
        try:
            report = json.loads(result.stdout or "")
        except ValueError:
            sys.stdout.write(result.stdout or "")
        else:
            report["cap"] = {k: v for k, v in asdict(result).items() if k not in ("stdout", "stderr")}
            print(json.dumps(report))
    report_cap(result)
    if result.oom_kills:
        stderr.print("the cap does not even hold the interpreter; try a larger one", style="red")
    return result.exit_code


def _cap_bytes(cap: str, meta: GgufMeta, n_ctx: int) -> int:
    """Bytes meant by --cap.

    A share of a model that is smaller than the interpreter would not start: then the cap is that share of the weights
    on top of what the process takes without them, and says so.
    """
    size = parse_size(cap, reference=meta.file_bytes)
    if not cap.strip().endswith("%"):
        return size
    import llama_cpp  # noqa: F401  # so that its size is counted

    context = estimate(meta, ContextShape(n_ctx=n_ctx))
    beside = held_by_process() + context.fixed
    if bundles := read_bundles(meta):
        beside += least_for_neurons(bundles)
    beside += default_reserve(beside + size)
    if size >= 2 * beside:
        return size
    stderr.print(
        f"the model file is {format_size(meta.file_bytes)}, an interpreter with context and reserve takes "
        f"{format_size(beside)}: the cap is that plus {cap} of the file, {format_size(beside + size)}",
        style="yellow",
        soft_wrap=True,
    )
    return beside + size


def _report(stats: FlashStats, result: dict[str, Any]) -> None:
    rate = result["tokens_per_second"]
    speed = f", {rate:.1f} tokens per second" if rate else ""
    table = Table(
        title=f"first token after {result['seconds_to_first_token']:.2f} s{speed}", title_justify="left", min_width=60
    )
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
    table.add_row("waited for reads", *(f"{c.wait_seconds:.2f} s" for c in columns))
    stderr.print(table)
    if stats.predictor != "none":
        stderr.print(f"predictor {stats.predictor}; neurons are of all layers")
    stderr.print(f"budget {format_size(stats.budget.total)} ({stats.budget.reason}): {stats.memory}", soft_wrap=True)

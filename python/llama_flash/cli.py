"""The command `llama-flash`."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from . import __version__
from .budget import default_reserve, held_by_process
from .bundles import read_bundles
from .capped import CapResult, run_capped
from .errors import FlashError
from .gguf_meta import GgufMeta, read_gguf
from .options import FlashOffload
from .placement import KV_TYPES, ContextShape, estimate, least_for_neurons
from .sizes import format_size, parse_size
from .stats import Counters, FlashStats

__all__ = ["app", "main"]

SHIPPED_MODEL = "stdlib-moe-q8_0.gguf"
_DEFAULT_PROMPT = "def read_lines(path):\n"
_DEFAULT_CTX = 2048

app = typer.Typer(
    name="llama-flash",
    help="Run GGUF models that are larger than memory: weights stay on flash, answers stay the same.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
_stderr = Console(stderr=True, highlight=False)
_stdout = Console(highlight=False)


def main() -> None:
    """Entry point. Errors that a user can do something about are one line, without a traceback."""
    try:
        app()
    except (FlashError, OSError, ValueError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


def _version(asked: bool) -> None:
    if asked:
        print(f"llama-flash {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Say it, exit.")] = False,
) -> None:
    pass


@app.command(
    epilog="Examples:  [bold]llama-flash cap 2GiB -- python program.py[/]   |   [bold]llama-flash cap 800MB -- make[/]",
)
def cap(
    limit: Annotated[str, typer.Argument(help='Bytes or a size: 2147483648, "2GiB", "800MB".', metavar="LIMIT")],
    command: Annotated[list[str], typer.Argument(help="The command, after --.", metavar="-- COMMAND...")],
) -> None:
    """Run a command in a fresh memory cgroup of LIMIT bytes, page cache counted, and report the peak."""
    result = run_capped(limit, command)
    _report_cap(result)
    raise typer.Exit(result.exit_code)


@app.command(
    epilog="Examples:  [bold]llama-flash run -p 'import os' --cap 50%[/]   |   "
    "[bold]llama-flash run qwen3-30b-a3b-q4_0.gguf -p 'Once upon a time' --cap 8GiB -n 200[/]",
)
def run(
    model: Annotated[Path | None, typer.Argument(help="GGUF file, or its first shard.", metavar="MODEL.gguf")] = None,
    prompt: Annotated[
        str, typer.Option("-p", "--prompt", help="Text to continue.", show_default=False)
    ] = _DEFAULT_PROMPT,
    cap: Annotated[
        str | None, typer.Option("--cap", help="Run in a memory cgroup: a size, or a share of the model file (50%).")
    ] = None,
    n_tokens: Annotated[int, typer.Option("-n", "--tokens", min=1, help="Tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option("--temp", min=0.0, help="0: always the likeliest token.")] = 0.7,
    seed: Annotated[int, typer.Option("--seed", help="Of the sampler.")] = 1,
    dram_budget: Annotated[
        str, typer.Option("--dram-budget", help='"auto", a size, or a share of the model file.')
    ] = "auto",
    predictor: Annotated[
        str, typer.Option("--predictor", help="Active neurons of a bundle file: auto, exact, lowrank (lossy) or off.")
    ] = "auto",
    window: Annotated[
        int | None, typer.Option("--window", help="Tokens whose neurons stay in memory. Default: as many as have room.")
    ] = None,
    n_ctx: Annotated[
        int, typer.Option("-c", "--ctx", min=0, help="Context in tokens. 0: 2048, or less if trained so.")
    ] = 0,
    threads: Annotated[int, typer.Option("-t", "--threads", min=0, help="0: one per core.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, instead of text.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the engine's log.")] = False,
) -> None:
    """Generate text with flash offload, and print the statistics.

    Without MODEL.gguf the small mixture of experts that comes with the package is used.
    """
    path = _model_path(model)
    meta = read_gguf(path)
    ctx = n_ctx or min(meta.number("context_length", _DEFAULT_CTX), _DEFAULT_CTX)
    options = FlashOffload(dram_budget=dram_budget, predictor=predictor, window=window)  # type: ignore[arg-type]
    if cap is not None:
        arguments = ["-p", prompt, "-n", n_tokens, "--temp", temperature, "--seed", seed, "--dram-budget", dram_budget]
        arguments += ["--predictor", predictor, *([] if window is None else ["--window", window])]
        arguments += ["-c", ctx, "-t", threads, *(["--json"] if as_json else []), *(["--verbose"] if verbose else [])]
        command = [sys.executable, "-m", "llama_flash", "run", str(path), *map(str, arguments)]
        raise typer.Exit(_run_again_capped(_cap_bytes(cap, meta, ctx), command, as_json))
    result = _generate(path, prompt, n_tokens, temperature, seed, ctx, threads, options, as_json, verbose)
    if as_json:
        print(json.dumps(result))
    raise typer.Exit(130 if result["interrupted"] else 0)


@app.command(
    epilog="Examples:  [bold]llama-flash profile ~/models/qwen3-30b-a3b-q4_0.gguf[/]   |   "
    "[bold]llama-flash profile /mnt/ssd --json[/]",
)
def profile(
    path: Annotated[Path, typer.Argument(help="A large file on the device, best the model; or a directory.")],
    io_engine: Annotated[str, typer.Option("--io-engine", help="auto, io_uring or pread.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, instead of a table.")] = False,
) -> None:
    """Measure a device and DRAM in at most 15 seconds, and keep the figures for plans.

    A file of at least 256 MiB is read itself. Else a temporary file of at most 1 GiB is written; it vanishes with the
    program, however that ends.
    """
    from .device_profile import measure
    from .plan_view import print_profile
    from .profiles import cache_folder, remember

    engine = FlashOffload(io_engine=io_engine).io_engine  # type: ignore[arg-type]
    with Progress(console=_stderr, transient=True) as progress:
        task = progress.add_task("measuring", total=1.0)
        measured = measure(
            path, io_engine=engine, report=lambda share, what: progress.update(task, completed=share, description=what)
        )
    kept = remember(measured)
    if as_json:
        print(json.dumps(measured.as_dict()))
        return
    print_profile(_stdout, measured)
    _stdout.print(f"kept in {kept}" if kept else f"not kept: {cache_folder()} cannot be written", soft_wrap=True)


@app.command(
    epilog="Examples:  [bold]llama-flash plan qwen3-30b-a3b-q4_0.gguf --dram-budget 8GiB[/]   |   "
    "[bold]llama-flash plan model.gguf --n-ctx 8192 --type-k q8_0 --json[/]",
)
def plan(
    model: Annotated[Path | None, typer.Argument(help="GGUF file, or its first shard.", metavar="MODEL.gguf")] = None,
    dram_budget: Annotated[
        str, typer.Option("--dram-budget", help='"auto", a size, or a share of the model file.')
    ] = "auto",
    n_ctx: Annotated[
        int, typer.Option("-c", "--n-ctx", "--ctx", min=0, help="Context in tokens. 0: 2048, or less if trained so.")
    ] = 0,
    n_batch: Annotated[int, typer.Option("--n-batch", min=1, help="Tokens of a prompt computed in one call.")] = 512,
    n_ubatch: Annotated[int, typer.Option("--n-ubatch", min=1, help="Of these, computed at once.")] = 512,
    type_k: Annotated[str, typer.Option("--type-k", help=f"Of the KV cache: {', '.join(KV_TYPES)}.")] = "f16",
    type_v: Annotated[str, typer.Option("--type-v", help="The same, for V.")] = "f16",
    flash_attn: Annotated[bool, typer.Option("--flash-attn", help="As Llama(flash_attn=True).")] = False,
    logits_all: Annotated[bool, typer.Option("--logits-all", help="As Llama(logits_all=True).")] = False,
    what: Annotated[str, typer.Option("--what", help="Weights that go to flash: auto, experts, ffn or all.")] = "auto",
    predictor: Annotated[
        str, typer.Option("--predictor", help="Active neurons of a bundle file: auto, exact, lowrank (lossy) or off.")
    ] = "auto",
    window: Annotated[
        int | None, typer.Option("--window", help="Tokens whose neurons stay in memory. Default: as many as have room.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, instead of tables.")] = False,
) -> None:
    """Say what loading a model would do: memory, mode, smallest workable budget, bytes and tokens per second.

    Nothing is loaded. Rates are of the device's profile (llama-flash profile), else of a quick probe of the file.
    """
    from .plan_view import print_plan
    from .planner import plan as make

    path = _model_path(model)
    trained = read_gguf(path).number("context_length", _DEFAULT_CTX)
    options = FlashOffload(dram_budget=dram_budget, what=what, predictor=predictor, window=window)  # type: ignore[arg-type]
    made = make(
        path,
        n_ctx=n_ctx or min(trained, _DEFAULT_CTX),
        n_batch=n_batch,
        n_ubatch=n_ubatch,
        type_k=_kv_type("--type-k", type_k),
        type_v=_kv_type("--type-v", type_v),
        flash_attn=flash_attn,
        logits_all=logits_all,
        flash_offload=options,
    )
    if as_json:
        print(json.dumps(made.as_dict()))
    else:
        print_plan(_stdout, made)


def _kv_type(option: str, name: str) -> int:
    if name not in KV_TYPES:
        raise ValueError(f"{option}: {name!r} is not one of {', '.join(KV_TYPES)}")
    return KV_TYPES[name]


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
) -> dict[str, Any]:
    """Streams the continuation of `prompt` to stdout; returns what was generated and measured."""
    with _stderr.status(f"loading {path.name}"):
        import llama_cpp

        from .plan_view import print_comparison
        from .planner import cost_of
        from .profiles import profile_for

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
        _stderr.print(llm.flash.summary, style="dim", soft_wrap=True)
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
            print_comparison(_stderr, expected, rates, stats.decode, rate)
    return result


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
    _report_cap(result)
    if result.oom_kills:
        _stderr.print("the cap does not even hold the interpreter; try a larger one", style="red")
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
    _stderr.print(
        f"the model file is {format_size(meta.file_bytes)}, an interpreter with context and reserve takes "
        f"{format_size(beside)}: the cap is that plus {cap} of the file, {format_size(beside + size)}",
        style="yellow",
        soft_wrap=True,
    )
    return beside + size


def _model_path(model: Path | None) -> Path:
    if model is not None:
        if not model.is_file():
            raise FileNotFoundError(f"no such model: {model}")
        return model
    shipped = Path(str(resources.files("llama_flash") / "models" / SHIPPED_MODEL))
    if not shipped.is_file():
        raise FileNotFoundError(f"the shipped model is missing ({shipped}); name a GGUF file")
    return shipped


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
    _stderr.print(table)
    if stats.predictor != "none":
        _stderr.print(f"predictor {stats.predictor}; neurons are of all layers")
    _stderr.print(f"budget {format_size(stats.budget.total)} ({stats.budget.reason}): {stats.memory}", soft_wrap=True)


@app.command(epilog="Examples:  [bold]llama-flash top[/]   |   [bold]llama-flash top --json[/]")
def top(
    once: Annotated[bool, typer.Option("--once", help="Print the table once, and exit.")] = False,
    seconds: Annotated[float, typer.Option("-d", "--delay", min=0.1, help="Between two looks.")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="The processes as JSON, once.")] = False,
) -> None:
    """Show running processes with weights on flash: speed, hit rate, bytes per token, memory and what limits it."""
    from . import status
    from .top import show

    if as_json:
        print(json.dumps(status.read_all()))
    else:
        show(once, seconds)


def _report_cap(result: CapResult) -> None:
    peak = "unknown" if result.peak_bytes is None else format_size(result.peak_bytes)
    _stderr.print(
        f"peak {peak} of {format_size(result.limit_bytes)} ({result.method}), "
        f"{result.oom_kills} OOM kills, exit code {result.exit_code}, {result.seconds:.1f} s",
        style="red" if result.oom_kills else None,
        soft_wrap=True,
    )


def _fail(message: str) -> None:
    _stderr.print(f"llama-flash: {message}", style="red", markup=False, soft_wrap=True)
    sys.exit(1)

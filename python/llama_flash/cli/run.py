"""`llama-flash run`: text from a prompt, with statistics.

Long: the options of the command are the parameters of its function.
"""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..model.gguf import GgufMeta, check_vocabulary, read_gguf
from ..options import FlashOffload
from ..whole_files import temporary_folder
from . import common as c
from .again import cap_bytes, command_line, run_again_capped
from .loading import context_tokens, flash_options, open_model, print_statistics, print_workers

if TYPE_CHECKING:
    from ..observe.snapshot import Snapshot

_DEFAULT_PROMPT = "def read_lines(path):\n"

__all__ = ["EPILOG", "run"]

EPILOG = (
    "Examples:  [bold]llama-flash run -p 'import os' --cap 50%[/]   |   "
    "[bold]llama-flash run qwen3-30b-a3b-q4_0.gguf -p 'Once upon a time' --cap 8GiB -n 200[/]"
)


def run(
    ctx: typer.Context,
    model: c.Model = None,
    prompt: Annotated[
        str, typer.Option("-p", "--prompt", help="Text to continue.", show_default=False)
    ] = _DEFAULT_PROMPT,
    n_tokens: c.Tokens = 128,
    temperature: c.Temperature = 0.7,
    seed: c.Seed = 1,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on where the model would end its text.", rich_help_panel="Text")
    ] = False,
    cap: c.Cap = None,
    flash: Annotated[
        bool,
        typer.Option("--flash/--no-flash", help="With it, or as stock llama.cpp.", rich_help_panel="Flash offload"),
    ] = True,
    dram_budget: c.DramBudget = "auto",
    reserve: c.Reserve = None,
    what: c.What = "auto",
    predictor: c.Predictor = "auto",
    window: c.Window = None,
    lookahead: c.Lookahead = None,
    draft: c.Draft = "off",
    follow: c.Follow = True,
    warm_start: c.WarmStart = True,
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
    plot: c.Plot = None,
    as_json: c.AsJson = False,
    verbose: c.Verbose = False,
    snapshot: Annotated[Path | None, typer.Option("--snapshot", hidden=True)] = None,
) -> None:
    """Generate text with flash offload, and print the statistics.

    Without MODEL.gguf the small mixture of experts that comes with the package is used.
    """
    prompt = c.utf8("--prompt", prompt)
    path = c.model_path(model)
    meta = read_gguf(path)
    check_vocabulary(meta)
    options = flash_options(ctx.params) if flash else None
    if plot is not None:
        from ..observe.pictures import check_target

        if options is None:
            raise ValueError("--plot draws what flash offload does: not with --no-flash")
        if options.workers:
            raise ValueError("--plot draws what this process does: not with --workers")
        check_target(plot)
    if cap is not None:
        limit = cap_bytes(cap, meta, context_tokens(meta, n_ctx))
        # drawn out here: matplotlib takes more memory than a cap may leave
        with temporary_folder(Path(tempfile.gettempdir(), "llama-flash-run")) as folder:
            drawn_later = folder / "snapshot" if plot is not None else None
            command = command_line(ctx, model=path, cap=None, plot=None, snapshot=drawn_later)
            code = run_again_capped(limit, command, as_json)
            if plot is not None and drawn_later is not None and drawn_later.exists():
                from ..observe.snapshot import Snapshot

                _draw(Snapshot.load(drawn_later), plot)
        raise typer.Exit(code)
    result, seen = _generate(path, meta, {**ctx.params, "prompt": prompt}, options)
    if as_json:
        c.print_json(result)
    if seen is not None and snapshot is not None:
        seen.save(snapshot)
    if seen is not None and plot is not None:
        _draw(seen, plot)
    raise typer.Exit(130 if result["interrupted"] else 0)


def _draw(seen: Snapshot, plot: Path) -> None:
    from ..observe.pictures import draw

    draw(seen, path=plot)
    c.stderr.print(f"picture in {plot}", soft_wrap=True)


def _generate(
    path: Path, meta: GgufMeta, params: dict[str, Any], options: FlashOffload | None
) -> tuple[dict[str, Any], Snapshot | None]:
    """Continues the prompt; returns what was generated and measured, and what to draw."""
    llm = open_model(path, meta, params, options)
    quiet = params["as_json"]
    result = {"model": str(path), **_stream(llm, params)}
    if options is None:
        llm.close()
        if not quiet:
            c.stderr.print(_title(result))
        return {**result, "expected": None, "measured": None, "flash": None}, None

    if options.workers:
        stats, workers = llm.flash.stats(), llm.flash.worker_stats()
        llm.close()
        if not quiet:
            print_workers(workers)
            c.stderr.print(_title(result))
        return {**result, "expected": None, "measured": None, "flash": stats.as_dict(), "workers": workers}, None

    from ..device.kept import profile_for
    from ..planning.usage import later_half
    from ..session.expected import cost_of
    from .plan_view import print_comparison

    stats = llm.flash.stats()
    expect = cost_of(llm.flash)
    # passes that checked drafts are no tokens decoded one after the other
    half = None if stats.drafts.drafts else later_half(llm.flash.history.calls())
    counted = half[0] if half else stats.decode
    measured = {
        "tokens": counted.tokens,
        "bytes_per_token": counted.bytes_per_token,
        "tokens_per_second": counted.tokens / half[1] if half else result["tokens_per_second"],
    }
    seen = llm.flash.snapshot() if params["plot"] or params["snapshot"] else None
    llm.close()
    # when the model's memory is free again: where no profile is kept, the file is read
    rates = profile_for(path, options.io_engine)
    expected = expect(rates)
    if not quiet:
        print_statistics(stats, _title(result))
        if stats.decode.tokens:
            print_comparison(c.stderr, expected, rates, counted, measured["tokens_per_second"])
    result |= {"expected": {**expected.as_dict(), "rates": rates.source}, "measured": measured}
    return {**result, "flash": stats.as_dict()}, seen


def _stream(llm: Any, params: dict[str, Any]) -> dict[str, Any]:
    """Prints the continuation as it comes; returns it, and how fast it came."""
    quiet, prompt = params["as_json"], params["prompt"]
    pieces: list[str] = []
    sampled: list[float] = []  # when each token was: a piece of text may hold several, or none

    def note(*_: Any) -> bool:
        sampled.append(time.perf_counter())
        return False

    interrupted = False
    if not quiet:
        print(prompt, end="", flush=True)
    started = time.perf_counter()
    try:
        for chunk in llm.create_completion(
            prompt,
            max_tokens=params["n_tokens"],
            temperature=params["temperature"],
            seed=params["seed"],
            logit_bias=_never_ending(llm) if params["ignore_eos"] else None,
            stopping_criteria=note,
            stream=True,
        ):
            pieces.append(chunk["choices"][0]["text"])
            if not quiet:
                print(pieces[-1], end="", flush=True)
    except KeyboardInterrupt:
        interrupted = True
    if not quiet:
        print(flush=True)
    seconds = sampled[-1] - sampled[0] if sampled else 0.0
    rate = (len(sampled) - 1) / seconds if seconds > 0 else None
    return {
        "prompt": prompt,
        "text": "".join(pieces),
        "interrupted": interrupted,
        "seconds_to_first_token": sampled[0] - started if sampled else None,
        "tokens_per_second": rate,
    }


def _title(result: dict[str, Any]) -> str:
    first, rate = result["seconds_to_first_token"], result["tokens_per_second"]
    if first is None:
        return "no token"
    return f"first token after {first:.2f} s" + (f", {rate:.1f} tokens per second" if rate else "")


def _never_ending(llm: Any) -> dict[int, float]:
    """A bias against every token that ends a text."""
    from llama_cpp import llama_cpp

    vocabulary = llama_cpp.llama_model_get_vocab(llm.model)
    return {token: -math.inf for token in range(llm.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocabulary, token)}

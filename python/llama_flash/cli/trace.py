"""`llama-flash trace`: records which experts or neurons each token of a run used."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ..gguf_meta import read_gguf
from ..options import FlashOffload
from ..sizes import format_size, parse_size
from ..trace import Recorder
from .common import DEFAULT_CTX, AsJson, Ctx, DramBudget, Model, Predictor, Threads, model_path, stderr, stdout

__all__ = ["EPILOG", "trace"]

EPILOG = (
    "Examples:  [bold]llama-flash trace -p 'import os' -n 200 -o run.npz[/]   |   "
    "[bold]llama-flash trace model.gguf --text book.txt -n 1000 --cache 36% -o book.npz[/]"
)


def trace(
    output: Annotated[Path, typer.Option("-o", "--output", help="The trace, docs/traces.md.", dir_okay=False)],
    model: Model = None,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="Text to continue.")] = None,
    text: Annotated[
        Path | None, typer.Option("--text", help="Decode this file's tokens one by one, instead of generating.")
    ] = None,
    n_tokens: Annotated[int, typer.Option("-n", "--tokens", min=1, help="Tokens to decode.")] = 128,
    temperature: Annotated[float, typer.Option("--temp", min=0.0, help="0: always the likeliest token.")] = 0.7,
    seed: Annotated[int, typer.Option("--seed", help="Of the sampler.")] = 1,
    cache: Annotated[
        str | None, typer.Option("--cache", help="Slots of this run, a share of what is cached (36%).")
    ] = None,
    dram_budget: DramBudget = "auto",
    predictor: Predictor = "auto",
    n_ctx: Ctx = 0,
    threads: Threads = 0,
    as_json: AsJson = False,
) -> None:
    """Record which experts, or neurons of bundles, each token of a run asked of the cache, for `llama-flash simulate`.

    Without MODEL.gguf the small mixture of experts that comes with the package is used. What is recorded does not
    depend on the cache; what the run itself hits and misses is kept with it.
    """
    if prompt is None and text is None:
        raise ValueError("nothing to run: give -p PROMPT, --text FILE, or both")
    path = model_path(model)
    meta = read_gguf(path)
    ctx = n_ctx or min(meta.number("context_length", DEFAULT_CTX), DEFAULT_CTX)
    what: Any = "experts" if meta.number("expert_count") else "ffn"
    share = None if cache is None else _share(cache)
    options = FlashOffload(
        what=what, dram_budget=dram_budget, predictor=predictor, follow=False, warm_start=False  # type: ignore[arg-type]
    )
    with stderr.status(f"loading {path.name}"):
        import llama_cpp

        n_threads = threads or len(os.sched_getaffinity(0))
        llm = llama_cpp.Llama(
            str(path),
            flash_offload=options,
            n_ctx=ctx,
            n_threads=n_threads,
            n_threads_batch=n_threads,
            seed=seed,
            verbose=False,
        )
    try:
        if share is not None:
            _give_slots(llm.flash, share)
        prompt_tokens = llm.tokenize((prompt or "").encode()) if prompt is not None or text is None else []
        text_tokens = [] if text is None else llm.tokenize(text.read_bytes(), add_bos=not prompt_tokens)[:n_tokens]
        wanted = len(prompt_tokens) + (n_tokens if text is None else len(text_tokens))
        if wanted > ctx:
            raise ValueError(f"{wanted} tokens do not fit into a context of {ctx}: see --n-ctx")
        with Recorder(llm.flash) as recorder, stderr.status(f"running {path.name}"):
            if prompt_tokens:
                llm.eval(prompt_tokens)
            for token in text_tokens:
                llm.eval([token])
            for _ in range(n_tokens if text is None else 0):
                token = llm.sample(temp=temperature)
                if token == llm.token_eos():
                    break
                llm.eval([token])
            made = recorder.trace()
    finally:
        llm.close()
    made.save(output)
    assert made.run is not None
    report = {
        "trace": str(output),
        "bytes": output.stat().st_size,
        "tokens": made.n_decoded,
        "prompt_tokens": len(prompt_tokens),
        "ops": len(made.token),
        "records": len(made.record),
        "slots": sum(made.run.slots.values()),
        "of_records": sum(tensor.n_records for tensor in made.tensors),
        "hits": made.run.hits,
        "misses": made.run.misses,
    }
    if as_json:
        print(json.dumps(report))
        return
    what = "neurons" if made.tensors[0].neurons else "experts (one of each tensor)"
    stdout.print(
        f"{output}: {format_size(output.stat().st_size)}, {made.n_decoded} tokens decoded in {len(made.tensors)} tensors, "
        f"{len(made.record)} {what} asked for; this run, with slots for {report['slots']} of {report['of_records']}: "
        f"{made.run.hits} hits, {made.run.misses} misses",
        soft_wrap=True,
    )


def _share(text: str) -> float:
    """0.36 of "36%" or "0.36"."""
    try:
        share = float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0.0 < share <= 1.0:
        raise ValueError(f"--cache: {text!r} is not a share of the cache between 0 and 100 %")
    return share


def _give_slots(session: Any, share: float) -> None:
    """Memory for so many slots, less what the budget has left for them."""
    needs = session._requirements()
    n_bytes = int(needs.min_memory + share * (needs.expert_bytes + needs.neuron_bytes))
    session._call("llama_flash_session_set_memory", n_bytes)

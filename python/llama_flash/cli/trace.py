"""`llama-flash trace`: records which experts or neurons each token of a run used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from ..archives import check_target
from ..budget.cores import default_threads
from ..file_kind import kind_of_file
from ..model.gguf import check_vocabulary, read_gguf
from ..observe.trace import Recorder, Trace
from ..options import FlashOffload
from ..sizes import format_size
from .common import (
    DEFAULT_CTX,
    AsJson,
    Ctx,
    DramBudget,
    Model,
    Predictor,
    Threads,
    model_path,
    share,
    stderr,
    stdout,
    utf8,
)

if TYPE_CHECKING:
    from ..session.session import FlashSession

__all__ = ["EPILOG", "trace"]

EPILOG = (
    "Examples:  [bold]llama-flash trace -p 'import os' -n 200 -o run.npz[/]   |   "
    "[bold]llama-flash trace model.gguf --text book.txt -n 1000 --cache 36% -o book.npz[/]"
)


def trace(
    output: Annotated[Path, typer.Option("-o", "--output", help="The trace, docs/how-to/traces.md.", dir_okay=False)],
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
    """Record which experts, or neurons of bundles, each token asked of the cache, for `llama-flash simulate`.

    Without MODEL.gguf the small mixture of experts that comes with the package is used. What is recorded does not
    depend on the cache; what the run itself hits and misses is kept with it.
    """
    if prompt is None and text is None:
        raise ValueError("nothing to run: give -p PROMPT, --text FILE, or both")
    check_target(output)
    prompt = None if prompt is None else utf8("--prompt", prompt)
    book = b"" if text is None else _read_text(text)
    path = model_path(model)
    meta = read_gguf(path)
    check_vocabulary(meta)
    ctx = n_ctx or min(meta.number("context_length", DEFAULT_CTX), DEFAULT_CTX)
    what: Any = "experts" if meta.number("expert_count") else "ffn"
    slots = None if cache is None else share("--cache", cache)
    options = FlashOffload(
        what=what,
        dram_budget=dram_budget,
        predictor=predictor,  # type: ignore[arg-type]
        lookahead=False,
        follow=False,
        warm_start=False,
    )
    llm = _load(path, options, ctx, threads, seed)
    try:
        if slots is not None:
            _give_slots(llm.flash, slots)
        prompt_tokens = llm.tokenize((prompt or "").encode()) if prompt is not None or text is None else []
        text_tokens = None if text is None else llm.tokenize(book, add_bos=not prompt_tokens)[:n_tokens]
        wanted = len(prompt_tokens) + (n_tokens if text_tokens is None else len(text_tokens))
        if wanted > ctx:
            raise ValueError(f"{wanted} tokens do not fit into a context of {ctx}: see --n-ctx")
        with stderr.status(Text(f"running {path.name}")):
            made = _record(llm, prompt_tokens, text_tokens, n_tokens, temperature)
    finally:
        llm.close()
    made.save(output)
    _tell(made, output, len(prompt_tokens), as_json)


def _load(path: Path, options: FlashOffload, n_ctx: int, threads: int, seed: int) -> Any:
    with stderr.status(Text(f"loading {path.name}")):
        import llama_cpp

        n_threads = threads or default_threads()
        return llama_cpp.Llama(
            str(path),
            flash_offload=options,
            n_ctx=n_ctx,
            n_threads=n_threads,
            n_threads_batch=n_threads,
            seed=seed,
            verbose=False,
        )


def _record(llm: Any, prompt: list[int], text: list[int] | None, n_tokens: int, temperature: float) -> Trace:
    """Of the prompt, then of the text's tokens one by one; without text, of as many tokens that are generated."""
    with Recorder(llm.flash) as recorder:
        if prompt:
            llm.eval(prompt)
        for token in text or ():
            llm.eval([token])
        for _ in range(n_tokens if text is None else 0):
            token = llm.sample(temp=temperature)
            if token == llm.token_eos():
                break
            llm.eval([token])
        return recorder.trace()


def _tell(made: Trace, output: Path, n_prompt: int, as_json: bool) -> None:
    assert made.run is not None
    n_bytes = output.stat().st_size
    report = {
        "trace": str(output),
        "bytes": n_bytes,
        "tokens": made.n_decoded,
        "prompt_tokens": n_prompt,
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
        f"{output}: {format_size(n_bytes)}, {made.n_decoded} tokens decoded in {len(made.tensors)} tensors, "
        f"{len(made.record)} {what} asked for; this run, with slots for {report['slots']} of {report['of_records']}: "
        f"{made.run.hits} hits, {made.run.misses} misses",
        soft_wrap=True,
    )


def _read_text(file: Path) -> bytes:
    if kind := kind_of_file(file):
        raise ValueError(f"--text: {file} is {kind}, not a file")
    content = file.read_bytes()
    utf8(f"--text {file}", content.decode("utf-8", errors="surrogateescape"))
    return content


def _give_slots(session: FlashSession, share: float) -> None:
    """Memory for slots for so many of the records, within what the budget has left for the session."""
    native = session.native
    assert native is not None
    wanted = int(share * sum(raw.n_records for raw in native.traced_tensors()))

    def slots(n_bytes: int) -> int:
        memory = native.divide(n_bytes)
        return int(memory.n_slots + memory.n_neuron_slots)

    low, high = int(native.requirements().min_memory), session.share.granted
    while low < high:  # to the smallest memory that has them; where all neurons are pinned there is more
        middle = (low + high) // 2
        enough = slots(middle) >= wanted or native.divide(middle).n_neurons_pinned > 0
        low, high = (low, middle) if enough else (middle + 1, high)
    if (got := slots(low)) < wanted:
        raise ValueError(
            f"--cache: the budget leaves slots for {got} of the {wanted} records: allow it more, or ask for less"
        )
    native.set_memory(low)
    session.share.note_memory()

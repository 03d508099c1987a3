"""What `make demo` shows of the shipped ReLU model: text, neurons read per token, perplexity beside the resident's."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from gguf_tools.unbundle import unbundle

MODEL = Path(__file__).resolve().parent.parent / "python/llama_flash/models/stdlib-opt-q8_0-flash.gguf"
_TEXT_TOKENS = 400


def show_neurons(console: Console, prompt: str, text: str) -> None:
    """text: on which perplexity is measured, token by token."""
    console.rule("text from the shipped ReLU model, its neurons on flash")
    table = Table("run", "perplexity", "neurons computed per token", "neurons read per token", "bytes read per token")
    with tempfile.TemporaryDirectory() as folder:
        twin = Path(folder, "resident.gguf")
        unbundle(MODEL, twin)
        for name, path, flash in (
            ("resident", twin, False),
            ("exact", MODEL, {"predictor": "exact"}),
            ("low-rank predictors", MODEL, {"predictor": "lowrank"}),
        ):
            table.add_row(name, *_row(console, path, flash, prompt, text, say=name.startswith("low")))
    console.print(table)


def _row(console: Console, path: Path, flash: Any, prompt: str, text: str, *, say: bool) -> Sequence[str]:
    llm = _open(path, flash)
    try:
        if say:
            console.print(prompt + llm.create_completion(prompt, max_tokens=64, temperature=0.5)["choices"][0]["text"])
        tokens = llm.tokenize(text.encode())[:_TEXT_TOKENS]
        llm.reset()
        before = llm.flash.stats().decode if flash else None
        for token in tokens:
            llm.eval([token])
        logits = np.array(llm.scores[: len(tokens) - 1], dtype=np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        chosen = logits[np.arange(len(logits)), tokens[1:]] - np.log(np.exp(logits).sum(axis=1))
        perplexity = f"{np.exp(-chosen.mean()):.2f}"
        if not flash:
            return perplexity, "all", "-", "-"
        done = llm.flash.stats().decode - before
        neurons = llm.flash.plan.bundles.n_neurons
        computed, read = done.neurons_active / done.tokens, done.misses / done.tokens
        return (
            perplexity,
            f"{computed / neurons:.1%}",
            f"{read:.0f} of {neurons} ({read / neurons:.1%})",
            f"{done.bytes_per_token:.0f}",
        )
    finally:
        llm.close()


def _open(path: Path, flash: Any) -> Any:
    """With memory for a tenth of the neurons: so small a model would otherwise be held whole."""
    import llama_cpp

    llm = llama_cpp.Llama(str(path), n_ctx=512, n_threads=2, logits_all=True, verbose=False, flash_offload=flash)
    if flash:
        needs = llm.flash._requirements()
        llm.flash._call("llama_flash_session_set_memory", needs.min_memory + needs.neuron_bytes // 10)
    return llm

"""What the demo shows of the shipped ReLU model: how little of it a token needs, and what that does to its answers."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from demolib.screen import Screen
from gguf_tools.unbundle import unbundle

_MODEL = Path(__file__).resolve().parents[3] / "python/llama_flash/models/stdlib-opt-q8_0-flash.gguf"
_TEXT = Path(__file__).resolve().parents[2] / "bench/bench.py"  # code of the kind that the model was trained on


def show_neurons(screen: Screen, tokens: int) -> None:
    """tokens: of the text that the model reads, one by one. Raises FlashError."""
    text = _TEXT.read_text(encoding="utf-8")
    table = Table()
    table.add_column("what ran")
    for column in ("neurons computed\nper token", "read from disk\nper token", "perplexity, the\nlower the better"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory(prefix="llama-flash-demo-") as folder:
        twin = Path(folder, "resident.gguf")
        unbundle(_MODEL, twin)
        for name, path, flash in (
            ("all in memory", twin, False),
            ("flash, exact", _MODEL, {"predictor": "exact"}),
            ("flash, predicted", _MODEL, {"predictor": "lowrank"}),
        ):
            with screen.busy(name):
                table.add_row(name, *_row(path, flash, text, tokens))
    screen.show(table)


def _row(path: Path, flash: Any, text: str, n_tokens: int) -> Sequence[str]:
    llm = _open(path, flash)
    try:
        tokens = llm.tokenize(text.encode())[:n_tokens]
        before = llm.flash.stats().decode if flash else None
        for token in tokens:
            llm.eval([token])
        logits = np.array(llm.scores[: len(tokens) - 1], dtype=np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        chosen = logits[np.arange(len(logits)), tokens[1:]] - np.log(np.exp(logits).sum(axis=1))
        perplexity = f"{np.exp(-chosen.mean()):.2f}"
        if not flash:
            return "all", "nothing", perplexity
        done = llm.flash.stats().decode - before
        computed = done.neurons_active / done.tokens / llm.flash.plan.bundles.n_neurons
        return f"{computed:.0%}", f"{done.bytes_per_token / 1e6:.1f} MB", perplexity
    finally:
        llm.close()


def _open(path: Path, flash: Any) -> Any:
    """With memory for a tenth of the neurons: so small a model would otherwise be held whole."""
    import llama_cpp

    llm = llama_cpp.Llama(str(path), n_ctx=512, n_threads=2, logits_all=True, verbose=False, flash_offload=flash)
    if flash:
        needs = llm.flash.native.requirements()
        llm.flash.native.set_memory(needs.min_memory + needs.neuron_bytes // 10)
    return llm

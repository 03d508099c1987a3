"""What writing the state of a prompt to flash costs the tokens of a server's other client.

Two servers with the same mixture under a cap of half of its file, one of which keeps prompts, take turns: a new prompt
is computed in one sequence, and then the other sequence generates, while what the prompt has left is written. The
server that keeps nothing has as much less of a cap as the store's buffers take, so that both have as many slots.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

import llama_flash
from benchlib.many import Served
from benchlib.models import MOE_SKEWED

_CAP = 0.5  # of the file
_N_CTX = 4096  # of each sequence
_PROMPT = 2048  # tokens
_ANSWER = 200
_LEAST = 0.98  # of the speed without


@dataclass
class Result:
    """Tokens per second of the client that generates, of each turn; bytes that were written in that time."""

    without: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    written: list[int] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return statistics.median(self.beside) / statistics.median(self.without)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | ({"ratio": self.ratio} if self.beside else {})


def measure(
    found: Result, folder: Path, repeats: int, report: Callable[[str], None], *, keep: bool, layers: int | None
) -> None:
    """Into `found`, turn by turn.

    Raises:
        OSError: the disk has no room for the model.
        BuildError: a server did not start, or refused.
    """
    from llama_flash.model.gguf import read_gguf
    from llama_flash.prompts.store import store_memory

    files = MOE_SKEWED.ensure(folder, layers)
    smallest = llama_flash.plan(files.flash, n_ctx=_N_CTX, parallel=2).smallest  # more than half of a short model
    cap = max(int(files.stock.stat().st_size * _CAP), smallest + (128 << 20))
    less = store_memory(read_gguf(files.flash))
    try:
        with tempfile.TemporaryDirectory(prefix="prompt-writes-", dir=folder) as name, contextlib.ExitStack() as open_:
            kept = Path(name, "prompts")
            logs = Path(name, "logs")
            logs.mkdir()

            def served(cap: int, **flash: Any) -> Served:
                report(f"loading, {'prompts kept' if flash else 'nothing kept'}")
                return open_.enter_context(
                    contextlib.closing(Served(files.flash, 2, cap, str(logs), {"what": "auto", **flash}, _N_CTX))
                )

            plain, keeping = served(cap - less), served(cap, prompt_cache=str(kept))
            for turn in range(-1, repeats):  # the first one warms up
                report("warming up" if turn < 0 else f"turn {turn + 1}")
                without, _ = _turn(plain, turn, None)
                beside, written = _turn(keeping, turn, kept)
                if turn >= 0:
                    found.without.append(without)
                    found.beside.append(beside)
                    found.written.append(written)
    finally:
        if not keep:
            files.remove()


def _turn(server: Served, seed: int, kept: Path | None) -> tuple[float, int]:
    """Tokens per second that one client gets behind a new prompt of another one, and bytes written meanwhile."""
    dice = random.Random(seed)
    prompt = [dice.randrange(10, 500) for _ in range(_PROMPT)]
    server.ask({"prompt": prompt, "n_predict": 1, "id_slot": 0})
    before = _size(kept)
    body = {"prompt": [11], "n_predict": _ANSWER, "id_slot": 1, "seed": 1, "temperature": 2.0, "ignore_eos": True}
    told = server.ask(body)
    return float(told["timings"]["predicted_per_second"]), _size(kept) - before


def _size(folder: Path | None) -> int:
    return sum(file.stat().st_size for file in folder.iterdir()) if folder and folder.exists() else 0


def table(found: Result) -> Table:
    shown = Table(title="a client's tok/s while another one's prompt is written to flash", title_justify="left")
    for column in ("nothing kept", "beside writing", "ratio", "written meanwhile", "turns"):
        shown.add_column(column, justify="right")
    spread = [f"{statistics.median(s):.2f} ({min(s):.2f} to {max(s):.2f})" for s in (found.without, found.beside)]
    verdict = "ok" if found.ratio >= _LEAST else f"under {_LEAST}"
    written = f"{statistics.median(found.written) / 1e6:.0f} MB"
    shown.add_row(*spread, f"{found.ratio:.3f} ({verdict})", written, str(len(found.beside)))
    return shown

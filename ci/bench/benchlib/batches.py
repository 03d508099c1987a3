"""A batch of short prompts: a dense model under a cap of half of its file beside the same model in memory.

Each runs in a process of its own, one after the other, and answers all prompts through `llama_flash.complete_many`,
as many at the same time as it chooses: without a cap the model fits, and stays in memory. Loading counts. The answers
must be the same.

    python ci/bench/benchlib/batches.py SPEC.json

is what runs in a process of its own.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

PROMPTS = 1000
_LAYERS = 8  # of the model's 16
_CAP = 0.5  # of the file
_LEAST = 0.85  # of the speed in memory
_TOKENS = 16  # of an answer
_N_CTX = 256  # tokens of a prompt and its answer, and more


@dataclass
class Result:
    """Seconds of each run, from the call to the last answer; tokens of the prompts and of all answers of a run."""

    prompts: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    flash: list[float] = field(default_factory=list)
    resident: list[float] = field(default_factory=list)
    parallel: dict[str, int] = field(default_factory=dict)
    peak: int = 0  # bytes, of the group under the cap
    cap: int = 0
    size: int = 0  # of the file
    same: bool = True

    @property
    def ratio(self) -> float:
        """Speed with flash offload over that in memory."""
        return sum(self.resident) / sum(self.flash)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | ({"ratio": self.ratio} if self.flash and self.resident else {})


def measure(
    found: Result, folder: Path, repeats: int, report: Callable[[str], None], *, keep: bool, quick: bool
) -> None:
    """Into `found`, run by run.

    Raises:
        OSError: the disk has no room for the model.
        BuildError: a run did not end well.
    """
    import llama_flash
    from benchlib import machine
    from benchlib.models import DENSE_GQA

    files = DENSE_GQA.ensure(folder, 2 if quick else _LAYERS)
    found.prompts = 32 if quick else PROMPTS
    smallest = llama_flash.plan(files.stock, n_ctx=_N_CTX, parallel=8).smallest  # more than half of a short model
    found.size = files.stock.stat().st_size
    found.cap = max(int(found.size * _CAP), smallest + (128 << 20))
    try:
        answers: list[list[str]] = []
        for number in range(repeats):
            order = ("flash", "resident") if number % 2 == 0 else ("resident", "flash")
            for way in order:
                report(f"run {number + 1} of {repeats}, {way}: {found.prompts} prompts")
                machine.drop_caches(files.stock)
                told = _run(files.stock, found, found.cap if way == "flash" else None)
                getattr(found, way).append(told["seconds"])
                found.parallel[way] = told["parallel"]
                found.prompt_tokens, found.answer_tokens = told["prompt_tokens"], told["answer_tokens"]
                answers.append(told["answers"])
                found.same = found.same and answers[0] == answers[-1]
    finally:
        if not keep:
            files.remove()


def _run(model: Path, found: Result, cap: int | None) -> dict[str, Any]:
    from benchlib.turns import BuildError
    from llama_flash import run_capped

    with tempfile.TemporaryDirectory(prefix="llama-flash-bench-") as folder:
        spec, out = Path(folder, "spec.json"), Path(folder, "out.json")
        spec.write_text(json.dumps({"model": str(model), "prompts": found.prompts, "out": str(out)}))
        command = [sys.executable, __file__, str(spec)]
        if cap is None:
            free = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            code, errors = free.returncode, free.stderr
        else:
            capped = run_capped(cap, command, capture_output=True)
            code, errors = capped.returncode, capped.stderr or ""
            found.peak = max(found.peak, capped.peak_bytes or 0)
        if code:
            way = "no cap" if cap is None else f"a cap of {cap} bytes"
            raise BuildError(f"{model.name}, {way}: ended with {code}: {errors.strip()[-500:]}")
        told: dict[str, Any] = json.loads(out.read_text())
        return told


def table(found: Result) -> Table:
    shown = Table(
        title=f"{found.prompts} prompts, a cap of {found.cap / found.size:.0%} of the file", title_justify="left"
    )
    for column in ("way", "at once", "seconds", "answered tok/s", "prompt tok/s"):
        shown.add_column(column, justify="right")
    for way in ("flash", "resident"):
        seconds = getattr(found, way)
        mean = sum(seconds) / len(seconds)
        spread = f"{mean:.0f} ({min(seconds):.0f} to {max(seconds):.0f})"
        rates = f"{found.answer_tokens / mean:.1f}", f"{found.prompt_tokens / mean:.1f}"
        shown.add_row(way, str(found.parallel[way]), spread, *rates)
    verdict = "ok" if found.ratio >= _LEAST else f"under {_LEAST}"
    shown.caption = (
        f"flash over resident: {found.ratio:.3f} ({verdict}); answers {'the same' if found.same else 'DIFFER'}; "
    )
    shown.caption += f"peak {found.peak / 1e6:.0f} of {found.cap / 1e6:.0f} MB"
    return shown


def main(argv: list[str]) -> int:
    """One run, in a process of its own."""
    spec = json.loads(Path(argv[0]).read_text())
    import llama_flash
    from llama_flash.batch.advice import parallel_for

    model = Path(spec["model"])
    parallel = parallel_for(model, {}, _N_CTX, spec["prompts"])
    dice = random.Random(1)
    words = ("apple", "river", "seven", "stone", "quick", "table", "green", "under", "light", "paper", "house", "music")
    prompts = [" ".join(dice.choices(words, k=dice.randrange(4, 13))) for _ in range(spec["prompts"])]
    answers = [""] * len(prompts)
    prompt_tokens = answer_tokens = 0
    began = time.perf_counter()
    completions = llama_flash.complete_many(
        model, prompts, parallel=parallel, n_ctx=_N_CTX, max_tokens=_TOKENS, temperature=1.0, seed=1
    )
    for done in completions:
        answers[done.index] = done.text
        prompt_tokens += done.response["usage"]["prompt_tokens"]
        answer_tokens += done.response["usage"]["completion_tokens"]
    seconds = time.perf_counter() - began
    told = {"seconds": seconds, "parallel": parallel, "answers": answers}
    Path(spec["out"]).write_text(json.dumps({**told, "prompt_tokens": prompt_tokens, "answer_tokens": answer_tokens}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

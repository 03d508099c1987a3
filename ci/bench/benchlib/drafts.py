"""Drafts beside none: two processes with the same model, each under its own cap, answer the same requests in turns.

What counts is tokens per second behind the first token; the answers must be the same. Beside it stands what the engine
could have done with these guesses: each pass with as many drafted tokens as were accepted, none more, in the time that
passes of that width took in the same run.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from benchlib import machine, many
from benchlib.models import DENSE_REAL, MOE_REAL, RELU_Q8, BenchModel, InflatedModel, _code
from benchlib.turns import BuildError

_CHILD = Path(__file__).with_name("draft_child.py")
_ROOT = Path(__file__).resolve().parents[3]
_SHIPPED = _ROOT / "python/llama_flash/models"
DENSE_CODE = InflatedModel(
    "dense-code",
    "the shipped dense model (6 layers, Q8_0), inflated",
    False,
    lambda: _SHIPPED / "stdlib-arcee-q8_0.gguf",
    _code,
)


@dataclass(frozen=True)
class DraftCase:
    """A model, what it is asked, and where the guesses come from."""

    name: str
    model: BenchModel
    draft: str  # as in FlashOffload; a name without a folder: of a shipped model
    requests: Callable[[], list[dict[str, Any]]]
    least: float  # times the speed without drafts
    share: float = 0.5  # of the model file
    tokens: int = 32
    flash: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """Seconds of each answer without drafts and with them, and what the drafts did."""

    case: str
    model: str
    draft: str
    least: float
    tokens: list[int]
    without: list[float]
    with_drafts: list[float]
    bytes_without: list[int]
    bytes_with: list[int]
    same: bool
    drafted: int
    accepted: int
    passes: int
    limit: float | None  # tokens per second, with perfect lengths

    @property
    def rates(self) -> tuple[float, float]:
        """Tokens per second without drafts and with them."""
        n = sum(self.tokens)
        return n / sum(self.without), n / sum(self.with_drafts)

    @property
    def ratio(self) -> float:
        return self.rates[1] / self.rates[0]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"rates": self.rates, "ratio": self.ratio}


def _request(prompt: str, forced: str = "", temperature: float = 0.0, seed: int = 1) -> dict[str, Any]:
    return {"prompt": prompt, "forced": forced, "temperature": temperature, "seed": seed}


def _edits() -> list[dict[str, Any]]:
    """Code of the standard library, and the same with one name changed."""
    source = Path(heapq.__file__).read_text()
    requests = []
    for begin, end, name in (("def heappush", "def heapify", "heap"), ("def heapify", "def _heappop_max", "x")):
        code = source[source.index(begin) : source.index(end)][:420]
        requests.append(_request(code, re.sub(rf"\b{name}\b", "queue", code)))
    return requests[:1]


def _summaries() -> list[dict[str, Any]]:
    """Questions whose answer repeats parts of them, in SmolLM2's chat template."""
    text = (
        "The lighthouse at Cape Wrath was built in 1828 by Robert Stevenson. Its lamp stands 122 metres above the sea. "
        "The keepers left in 1998, when it was made automatic. The road to it is reached by a small ferry."
    )
    asks = ("Repeat this text word by word, with the years left out", "Summarize this text in one sentence")
    return [_request(f"<|im_start|>user\n{ask}: {text}<|im_end|>\n<|im_start|>assistant\n") for ask in asks]


def _prose() -> list[dict[str, Any]]:
    """Sampled answers, which repeat nothing but what all text does."""
    return [
        _request(f"<|im_start|>user\n{ask}<|im_end|>\n<|im_start|>assistant\n", temperature=1.0, seed=seed)
        for seed, ask in enumerate(("Why did the Roman Empire fall?", "How does a bicycle stay upright?"), 3)
    ]


def _anything() -> list[dict[str, Any]]:
    """For a model of random weights, whose sampled text is as random: no guess is right but by chance."""
    return [_request(text, temperature=1.0, seed=seed) for seed, text in enumerate(("a b c d e f", "1 2 3 4", "x"), 5)]


def _code_requests() -> list[dict[str, Any]]:
    return [_request(prompt) for prompt in _code()[:3]]


CASES = (
    DraftCase("dense-sibling", DENSE_CODE, "stdlib-draft-q8_0.gguf", _code_requests, 2.5),
    DraftCase("dense-edits", DENSE_CODE, "ngram", _edits, 3.0, tokens=40),
    DraftCase("dense-summaries", DENSE_REAL, "ngram", _summaries, 1.0),
    DraftCase("dense-prose", DENSE_REAL, "ngram", _prose, 0.97),
    DraftCase("moe-code", MOE_REAL, "ngram", _code_requests, 0.97, tokens=64),
    DraftCase("relu", RELU_Q8, "ngram", _anything, 0.97, tokens=48),
)


CLIENTS = DraftCase("dense-4-clients", DENSE_CODE, "stdlib-draft-q8_0.gguf", _code_requests, 1.5)
_N_CLIENTS = 4
_N_UBATCH = 64  # a graph of 512 tokens takes more than the cap: an inflated model has a million neurons


class _Child:
    """A process that has the model loaded. Raises BuildError: it did not load, or ended."""

    def __init__(self, spec: dict[str, Any], cap: int, folder: str, name: str) -> None:
        path = Path(folder) / f"{name}.json"
        path.write_text(json.dumps(spec))
        command = [sys.executable, "-m", "llama_flash", "cap", str(cap), "--", sys.executable, str(_CHILD), str(path)]
        self._errors = path.with_suffix(".log")
        with self._errors.open("w") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self.loaded = self._read()["loaded"]

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise BuildError(" | ".join(self._errors.read_text().strip().splitlines()[-3:]) or "ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait(60.0)


@contextlib.contextmanager
def _pair(case: DraftCase, model: Path) -> Iterator[tuple[_Child, _Child]]:
    cap = int(case.share * model.stat().st_size)
    draft = str(_file_of(case) or case.draft)
    children: list[_Child] = []
    with tempfile.TemporaryDirectory(prefix="llama-flash-bench-") as folder:
        try:
            for name, chosen in (("without", "off"), ("with", draft)):
                flash = {"draft": chosen, "warm_start": False, **case.flash}
                spec = {"model": str(model), "n_ctx": 1024, "n_ubatch": 32, "flash": flash}
                children.append(_Child(spec, cap, folder, name))
            yield children[0], children[1]
        finally:
            for child in children:
                child.close()


def _file_of(case: DraftCase) -> Path | None:
    """The draft model."""
    return _SHIPPED / case.draft if case.draft.endswith(".gguf") else None


def measure(
    folder: Path, report: Callable[[str], None], names: Sequence[str] = (), *, keep: bool, quick: bool
) -> Iterator[Result]:
    """names: of cases; none: all whose draft model is there."""
    chosen = [case for case in (*CASES, CLIENTS) if not names or case.name in names]
    for case in list(chosen):
        draft = _file_of(case)
        if draft is not None and not draft.exists():
            report(f"{case.name}: left out, there is no {draft}: ci/train/train.py --form draft makes one")
            chosen.remove(case)
    for model in dict.fromkeys(case.model for case in chosen):
        files = model.ensure(folder, 2 if quick else None)
        try:
            for case in chosen:
                if case.model == model:
                    yield (_clients if case == CLIENTS else _measure)(case, files.flash, report)
        finally:
            if not keep:
                files.remove()


def _measure(case: DraftCase, model: Path, report: Callable[[str], None]) -> Result:
    machine.drop_caches(model)
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = []
    with _pair(case, model) as (without, with_drafts):
        requests = case.requests()
        for child in (without, with_drafts):
            child.ask({**requests[0], "tokens": 4})  # what is first touched, and first read
        for i, request in enumerate(requests):
            report(f"{case.name}: answer {i + 1} of {len(requests)}")
            both = (without, with_drafts) if i % 2 == 0 else (with_drafts, without)
            answers = {child: child.ask({**request, "tokens": case.tokens}) for child in both}
            pairs.append((answers[without], answers[with_drafts]))
    drafted = [pair[1]["drafts"] for pair in pairs]
    return Result(
        case=case.name,
        model=case.model.title,
        draft=case.draft,
        least=case.least,
        tokens=[len(pair[0]["tokens"]) - 1 for pair in pairs],
        without=[pair[0]["seconds"] for pair in pairs],
        with_drafts=[pair[1]["seconds"] for pair in pairs],
        bytes_without=[pair[0]["bytes"] for pair in pairs],
        bytes_with=[pair[1]["bytes"] for pair in pairs],
        same=all(pair[0]["tokens"] == pair[1]["tokens"] for pair in pairs),
        drafted=sum(each["drafted"] for each in drafted),
        accepted=sum(each["accepted"] for each in drafted),
        passes=sum(each["passes"] for each in drafted),
        limit=_limit([pair[1] for pair in pairs]),
    )


def _clients(case: DraftCase, model: Path, report: Callable[[str], None]) -> Result:
    """Several clients of a server at the same time: tokens per second of all together, while all generate."""
    cap = int(case.share * model.stat().st_size)
    bodies = [
        {"prompt": prompt, "n_predict": case.tokens, "temperature": 0.0, "cache_prompt": True, "ignore_eos": True}
        for prompt in _code()[:_N_CLIENTS]
    ]
    with tempfile.TemporaryDirectory(prefix="llama-flash-bench-") as folder, contextlib.ExitStack() as stack:
        servers = []
        for draft in ("off", str(_file_of(case))):
            flash = {"draft": draft, "warm_start": False}
            servers.append(many.Served(model, _N_CLIENTS, cap, folder, flash, 512, _N_UBATCH))
            stack.callback(servers[-1].close)
        seconds: list[list[float]] = [[], []]
        said: list[list[str]] = [[], []]
        counted = {"draft_n": 0, "draft_n_accepted": 0}
        for turn in range(3):  # the first one computes the prompts
            report(f"{case.name}: turn {turn + 1} of 3")
            for which in (0, 1) if turn % 2 == 0 else (1, 0):
                with ThreadPoolExecutor(_N_CLIENTS) as pool:
                    answers = list(pool.map(servers[which].ask, bodies))
                if turn:
                    seconds[which].append(max(answer["timings"]["predicted_ms"] for answer in answers) / 1000)
                    said[which] += [answer["content"] for answer in answers]
                if turn and which:
                    counted = {key: n + sum(a["timings"].get(key, 0) for a in answers) for key, n in counted.items()}
    n_tokens = [case.tokens * _N_CLIENTS] * len(seconds[0])
    drafted, accepted = counted["draft_n"], counted["draft_n_accepted"]
    return Result(
        *(case.name, case.model.title, case.draft, case.least, n_tokens, seconds[0], seconds[1]),
        *([0], [0], said[0] == said[1], drafted, accepted, sum(n_tokens) - accepted, None),
    )


def _limit(answers: Sequence[dict[str, Any]]) -> float | None:
    """Tokens per second if each draft had been as long as what was accepted of it."""
    widths: dict[int, list[float]] = {}
    for answer in answers:
        for n, seconds in answer["widths"].items():
            widths.setdefault(int(n), []).extend(seconds)
    if not widths:
        return None
    known = {n: statistics.median(seconds) for n, seconds in widths.items()}

    def took(n: int) -> float:
        """The least that a pass of so many tokens or more took."""
        return min(seconds for width, seconds in known.items() if width >= n)

    tokens = seconds = 0.0
    for answer in answers:
        for drafted, taken, _, spent in answer["last"]:
            tokens += taken + 1
            seconds += took(taken + 1) + spent * (min(drafted, taken + 1) / drafted)
        singles = answer["drafts"]["passes"] - answer["drafts"]["drafts"]
        tokens += singles
        seconds += singles * took(1)
    return tokens / seconds if seconds else None


def table(results: Sequence[Result]) -> Table:
    shown = Table(title="drafts beside none, half of the file as the cap, in turns", title_justify="left")
    columns = ("case", "without", "with drafts", "ratio", "to reach", "of perfect lengths", "accepted", "tokens / pass")
    for column in (*columns, "MB read per token", "same answers"):
        shown.add_column(column, justify="left" if column == "case" else "right")
    for found in results:
        without, with_drafts = found.rates
        n = sum(found.tokens)
        share = f"{found.accepted / found.drafted:.0%} of {found.drafted}" if found.drafted else "none made"
        shown.add_row(
            found.case,
            f"{without:.2f}",
            f"{with_drafts:.2f}",
            f"{found.ratio:.2f}",
            f"{found.least:.2f}",
            f"{with_drafts / found.limit:.2f}" if found.limit else "-",
            share,
            f"{(found.accepted + found.passes) / max(1, found.passes):.2f}",
            f"{sum(found.bytes_without) / n / 1e6:.0f}, {sum(found.bytes_with) / n / 1e6:.0f}",
            "yes" if found.same else "NO",
        )
    return shown


__all__ = ["CASES", "DraftCase", "Result", "measure", "table"]

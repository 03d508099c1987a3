"""llama-flash serve with drafts: several clients get the bytes that each gets alone without them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from mtp_models import write_mtp
from serving import SERVE, Server, post, serving

from llama_flash.batch.engine import Engine
from llama_flash.drafts.length import Length
from llama_flash.observe.stats import DraftStats
from llama_flash.server.driver import EngineDriver
from llama_flash.session.session import FlashSession
from llama_flash.session.steps import Steps

ARCEE = Path(str(resources.files("llama_flash") / "models/stdlib-arcee-q8_0.gguf"))
CODE = "def push(heap, item):\n    heap.append(item)\n\ndef push_all(heap, items):\n"
REQUESTS: tuple[dict[str, Any], ...] = (
    {"prompt": CODE, "n_predict": 40, "temperature": 0.0},
    {"prompt": CODE * 3, "n_predict": 50, "temperature": 0.0},
    {"prompt": "import os\n\n", "n_predict": 45, "temperature": 0.9, "seed": 4},
    {"prompt": CODE, "n_predict": 12, "temperature": 0.0, "n_probs": 2},
    {"prompt": CODE, "n_predict": 24, "temperature": 0.7, "seed": 2, "grammar": 'root ::= ("ab" | "abc" | "x")+'},
)
ARGUMENTS: tuple[str | Path, ...] = (
    *(ARCEE, "--parallel", "3", "-c", "512", "-t", "1", "--what", "all"),
    *("--no-follow", "--no-warm-start"),
)


def ask(server: Server, request: dict[str, Any]) -> tuple[str, Any]:
    status, answer = post(server, "/completion", request)
    assert status == 200, answer
    return answer["content"], answer.get("completion_probabilities")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, Any]]:
    """One after the other, without drafts."""
    with serving(ARGUMENTS, tmp_path_factory.mktemp("plain") / "log", command=SERVE) as server:
        return [ask(server, request) for request in REQUESTS]


@pytest.mark.parametrize("draft", ["ngram", ARCEE])
def test_clients_at_the_same_time_get_the_same_bytes(
    draft: str | Path, expected: list[tuple[str, Any]], tmp_path: Path
) -> None:
    with serving([*ARGUMENTS, "--draft", draft], tmp_path / "log", command=SERVE) as server:
        for _ in range(2):  # the second time prompts are in the cache
            with ThreadPoolExecutor(len(REQUESTS)) as pool:
                assert list(pool.map(lambda request: ask(server, request), REQUESTS)) == expected
        metrics = server.metrics()
        model = " model=stdlib-arcee-q8_0"
        # how many pay depends on the machine
        assert metrics["llama_flash_drafted_total" + model] >= metrics["llama_flash_accepted_total" + model]
        assert metrics["llama_flash_draft_passes_total" + model] > 20


def ask_all(engine: Engine, requests: Sequence[dict[str, Any]]) -> list[tuple[str, Any]]:
    """All at the same time."""

    def ask(request: dict[str, Any]) -> tuple[str, Any]:
        with contextlib.closing(engine.connect()) as connection:
            connection.request("POST", "/completion", json.dumps(request), {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = json.loads(response.read())
            assert response.status == 200, answer
            return answer["content"], answer.get("completion_probabilities")

    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(ask, requests))


@contextlib.contextmanager
def engine(
    path: Path, draft: str | Path, monkeypatch: pytest.MonkeyPatch, most: int = 3
) -> Iterator[tuple[Engine, list[EngineDriver]]]:
    """Four sequences at the same time, with `most` drafted tokens in each pass, whatever they cost on this machine."""
    drivers: list[EngineDriver] = []
    made = EngineDriver.__init__

    def noted(self: EngineDriver, *arguments: Any, **options: Any) -> None:
        made(self, *arguments, **options)
        drivers.append(self)

    flash = {"draft": str(draft), "what": "all", "follow": False, "warm_start": False, "panel_bytes": 65536}
    with monkeypatch.context() as patched:
        patched.setattr(EngineDriver, "__init__", noted)
        patched.setattr(Length, "begins", lambda *_: True)
        patched.setattr(Length, "goes_on", lambda self, width, *_: width <= most)
        patched.setattr(Length, "best", lambda self, width, expected, chances, spent: min(most, len(chances)))
        patched.setattr(Length, "common", lambda self, chances, spent, room, *_, **__: min(most, room))
        running = Engine(path, 4, lambda line: None, n_ctx=256, threads=1, flash_offload=flash)
        try:
            yield running, drivers
        finally:
            running.close()


ENDS = [{"prompt": CODE, "n_predict": n, "temperature": 0.0} for n in (1, 2, 3, 9)]
KINDS: list[dict[str, Any]] = [
    *REQUESTS,
    *ENDS,
    {"prompt": CODE, "n_predict": 30, "temperature": 0.8, "seed": 3, "n_probs": 3, "post_sampling_probs": True},
    {"prompt": CODE * 2, "n_predict": 30, "temperature": 0.0, "n_probs": 1, "stop": ["heap"]},
    {"prompt": "x", "n_predict": 500, "temperature": 1.0, "seed": 5},  # to the end of its context
    {
        "prompt": CODE,
        "n_predict": 40,
        "temperature": 0.0,
        "json_schema": {"type": "array", "items": {"type": "integer"}},
    },
]


def test_whatever_is_asked_for_the_bytes_are_the_same_and_all_are_drafted_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grammars, probabilities, the last tokens of an answer and of a context: none keeps the others from drafts."""
    with engine(ARCEE, "off", monkeypatch) as (plain, _):
        expected = [ask_all(plain, [request])[0] for request in KINDS]
    for draft in ("ngram", ARCEE):
        with engine(ARCEE, draft, monkeypatch) as (drafting, drivers):
            for requests, said in ((KINDS, expected), (KINDS[::-1], expected[::-1])):
                assert ask_all(drafting, requests) == said
            stats = stats_of(drivers)
            assert stats.drafts > 0.5 * stats.passes > 20 and stats.accepted > 20


def stats_of(drivers: list[EngineDriver]) -> DraftStats:
    (driver,) = drivers
    (session,) = driver._sessions.values()
    return session.stats().drafts


@pytest.mark.parametrize("arch", ["mimo2", "glm4moe"])
def test_the_head_of_a_model_drafts_for_clients_at_the_same_time(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their answers are the bytes without it, and its guesses are those of a head that follows each of the texts."""
    path = write_mtp(arch, tmp_path / "head.gguf", dense=arch == "mimo2")
    prompts = [[(k * i * i + 3 * i) % 500 + 3 for i in range(20 + 30 * k)] for k in range(1, 7)]
    requests: list[dict[str, Any]] = [
        {"prompt": prompt, "n_predict": 40 + k, "temperature": 0.3 * (k % 2), "seed": k, "ignore_eos": True}
        for k, prompt in enumerate([*prompts, prompts[2][:50]])
    ]
    requests[3]["n_probs"] = 2
    with engine(path, "off", monkeypatch) as (plain, _):
        expected = [ask_all(plain, [request])[0] for request in requests]
    with engine(path, "mtp", monkeypatch) as (drafting, drivers):
        assert ask_all(drafting, requests) == expected
        stats = stats_of(drivers)
        assert stats.source == "mtp" and stats.drafts > 30
        assert 0.08 < (stats.acceptance or 0.0) < 0.95, "texts went on, and went back"
        assert ask_all(drafting, requests[::-1]) == expected[::-1], "prompts are in other sequences now"
        assert stats_of(drivers).accepted > stats.accepted


@pytest.mark.parametrize("draft", ["off", "ngram", ARCEE])
def test_idle_sequences_between_others_have_tokens_in_their_passes_and_keep_their_text(
    draft: str | Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Steps, "per_step", 16.0)  # what it is here depends on the machine
    between = [{"prompt": CODE + "x" * i, "n_predict": 4, "temperature": 0.0, "id_slot": i} for i in (1, 2)]
    around: list[dict[str, Any]] = [
        {"prompt": CODE * 2, "n_predict": 40, "temperature": 0.0, "id_slot": 0},
        {"prompt": CODE, "n_predict": 60, "temperature": 0.7, "seed": 3, "n_probs": 1, "id_slot": 3},
    ]
    with engine(ARCEE, "off", monkeypatch) as (plain, _):
        expected = [ask_all(plain, [request])[0] for request in [*between, *around]]
    with engine(ARCEE, draft, monkeypatch) as (running, drivers):
        rounds = saved = 0
        while rounds < 2 or (saved <= 10 and rounds < 20):  # what the idle ones hold is used the second time
            assert ask_all(running, between) == expected[:2]
            assert ask_all(running, around) == expected[2:]
            (session,) = drivers[0]._sessions.values()
            rounds, saved = rounds + 1, session.stats().steps.saved
        assert saved > 10, "they were computed at the same time"
        tokens = session.stats().decode.tokens
        assert tokens > 70 * rounds, "what fills is not counted, and makes no prompt of a pass"


@pytest.mark.parametrize("draft", ["ngram", ARCEE])
def test_a_pass_with_drafts_reads_the_weights_once(draft: str | Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has a guess or none, begins with a prompt that is there, or ends: counted are panels, of which a step
    takes each once."""
    monkeypatch.setattr(Steps, "per_step", 16.0)  # what it is here depends on the machine
    passes: list[tuple[int, int, int]] = []  # tokens, drafted ones of them, panels
    after = FlashSession.after_call

    def noted(self: FlashSession, n_tokens: int, n_sequences: int = 1) -> None:
        assert self.native is not None and self.drafter is not None
        now = self.native.stats()
        panels = int(now.panel_hits + now.panel_reads)
        passes.append((n_tokens, self.drafter.n_drafted, panels - before.get(id(self), 0)))
        before[id(self)] = panels
        after(self, n_tokens, n_sequences)

    before: dict[int, int] = {}
    monkeypatch.setattr(FlashSession, "after_call", noted)
    monkeypatch.setattr("llama_flash.batch.engine.Company", lambda parallel: None)  # prompts begin at once
    requests: list[dict[str, Any]] = [
        {"prompt": CODE, "n_predict": 90, "temperature": 0.0, "id_slot": 1, "ignore_eos": True},
        {"prompt": CODE * 2, "n_predict": 40, "temperature": 0.0, "id_slot": 0, "ignore_eos": True},
        {"prompt": "import os\n\n", "n_predict": 25, "temperature": 0.9, "seed": 4, "id_slot": 3, "n_probs": 1},
        {"prompt": CODE, "n_predict": 33, "temperature": 0.0, "id_slot": 2, "ignore_eos": True},
    ]
    with engine(ARCEE, draft, monkeypatch, most=15) as (running, drivers):
        expected = ask_all(running, requests)
        passes.clear()
        for _ in range(3):  # all but one token of each prompt is there
            assert ask_all(running, requests) == expected
        assert stats_of(drivers).accepted > 20
    generating = [each for each in passes if each[0] <= 16]
    one = min(panels for *_, panels in generating)
    assert sum(n_drafted > 0 for _, n_drafted, _ in generating) > 20
    assert [each for each in generating if each[2] != one] == []
    assert len(passes) == len(generating), "no draft makes a prompt of a pass"

"""Minutes of clients that ask, and of whom half leave, below a real memory cap: every answer is the one given alone.

LLAMA_FLASH_SOAK says other durations: seconds with 4 clients and with 32, with a comma between them.
"""

from __future__ import annotations

import argparse
import inspect
import math
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import llama_cpp
import openai
import pytest
from caps import require_caps
from gguf_mutations import Value, with_value
from serving import SERVE, Server, eventually, serving, smallest_budget

from llama_flash.model.gguf import read_gguf

SHIPPED = Path(str(resources.files("llama_flash") / "models" / "stdlib-moe-q8_0.gguf"))
MIB = 1 << 20
UINT32 = 4  # a type of GGUF
SECONDS = [float(text) for text in os.environ.get("LLAMA_FLASH_SOAK", "600,300").split(",")]
CONTEXT = 4352  # tokens of each sequence
SHORTEST, LONGEST, ANSWER = 20, 4000, 24  # tokens
N_QUESTIONS = 48
ROOM = 8 * MIB  # beside the smallest budget
STAYS = 32 * MIB  # what may stay with the process: docs/explanation/serving.md
WARM = 0.5  # of the time: by then all sequences have had long prompts, so that all of their KV cells are touched


@dataclass(frozen=True)
class Question:
    prompt: str
    temperature: float
    seed: int

    def ask(self, client: openai.OpenAI, **more: Any) -> Any:
        return client.completions.create(
            model="any",
            prompt=self.prompt,
            temperature=self.temperature,
            seed=self.seed,
            max_tokens=ANSWER,
            logprobs=2,
            extra_body={"ignore_eos": True},
            **more,
        )


@dataclass(frozen=True)
class Answer:
    text: str
    logprobs: tuple[float, ...]

    @classmethod
    def of(cls, parts: Sequence[Any]) -> Answer:
        """From what came, in one piece or in several."""
        choices = [part.choices[0] for part in parts if part.choices]
        told = [number for choice in choices if choice.logprobs for number in choice.logprobs.token_logprobs or ()]
        return cls("".join(choice.text for choice in choices), tuple(told))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped one, which lets itself be asked beyond what it was trained for."""
    path = tmp_path_factory.mktemp("soak") / SHIPPED.name
    return with_value(SHIPPED, path, f"{read_gguf(SHIPPED).architecture}.context_length", Value(UINT32, 2 * CONTEXT))


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    """Code of lengths between the shortest and the longest, as many of each order of magnitude."""
    text = "".join(inspect.getsource(module) for module in (argparse, inspect, random))
    dice = random.Random(5)
    with closing(llama_cpp.Llama(str(SHIPPED), vocab_only=True, verbose=False)) as vocabulary:
        tokens = vocabulary.tokenize(text.encode(), add_bos=False)
        found = []
        for i in range(N_QUESTIONS):
            share = i / (N_QUESTIONS - 1)
            n = round(math.exp(math.log(SHORTEST) * (1 - share) + math.log(LONGEST) * share))
            at = dice.randrange(len(tokens) - n)
            prompt = vocabulary.detokenize(tokens[at : at + n]).decode(errors="ignore")
            found.append(Question(prompt, dice.choice((0.0, 0.9)), dice.randrange(1 << 30)))
    return found


def visits(server: Server, seed: int, end: float, known: Sequence[tuple[Question, Answer]]) -> Counter[str]:
    """One client after the other until `end`; what became of them."""
    dice, seen = random.Random(seed), Counter[str]()
    while time.monotonic() < end:
        question, want = dice.choice(known)
        streamed, leaves = dice.random() < 0.5, dice.random() < 0.5
        kind = f"{'streamed' if streamed else 'whole'}{', left' if leaves else ''}"
        with closing(server.client()) as client:
            try:
                if streamed:
                    parts = []
                    with question.ask(client, stream=True) as stream:
                        for part in stream:
                            parts.append(part)
                            if leaves and dice.random() < 2 / ANSWER:
                                break
                        else:
                            leaves = False
                else:  # any moment of the prompt, the wait for it, or the answer
                    patience = {"timeout": math.exp(dice.uniform(-3, 2))} if leaves else {}
                    parts, leaves = [question.ask(client, **patience)], False
                if not leaves and (got := Answer.of(parts)) != want:
                    kind = f"another answer: {question!r:.200} {got} for {want}"
            except openai.APITimeoutError:
                kind = kind if leaves else f"{kind}: never answered"
            except Exception as error:
                kind = f"{kind}: error: {error!r}"
        seen[kind] += 1
    return seen


def crowd(
    server: Server, n_clients: int, seed: int, seconds: float, known: Sequence[tuple[Question, Answer]]
) -> tuple[Counter[str], float]:
    """What became of so many clients at the same time, and bytes of the process when they have gone.

    Each time the same is asked before they are counted, so that the same is lent to weights then.
    """
    end = time.monotonic() + seconds
    with ThreadPoolExecutor(n_clients) as pool:
        clients = [pool.submit(visits, server, seed + i, end, known) for i in range(n_clients)]
        seen = sum((client.result() for client in clients), Counter[str]())
    assert eventually(lambda: server.metrics()["llamacpp:requests_processing"] == 0)
    assert [Answer.of([question.ask(server.client())]) for question, _ in known[:8]] == [a for _, a in known[:8]]
    return seen, server.metrics()["process_resident_memory_bytes"]


@pytest.mark.full
@pytest.mark.parametrize(("n_clients", "seconds"), list(zip((4, 32), SECONDS, strict=True)), ids=["4", "32"])
def test_every_answer_is_the_one_given_alone(
    n_clients: int, seconds: float, model: Path, questions: list[Question], tmp_path: Path
) -> None:
    require_caps()
    shape = ("-c", str(CONTEXT), "--parallel", str(n_clients))
    cap = smallest_budget(model, *shape, command=SERVE) + ROOM
    with serving([model, *shape], tmp_path / "log", cap, SERVE) as server:
        known = [(question, Answer.of([question.ask(server.client())])) for question in questions]
        assert all(len(answer.logprobs) == ANSWER for _, answer in known)
        assert len({answer for _, answer in known}) > N_QUESTIONS // 2
        first, held = crowd(server, n_clients, 0, WARM * seconds, known)
        second, held_then = crowd(server, n_clients, n_clients, (1 - WARM) * seconds, known)
        seen = first + second
        values = server.metrics()
        assert server.stop() == 128 + signal.SIGTERM, server.text
    grown = held_then - held
    found = re.search(r"peak (\S+ \S+) of .* (\d+) OOM kills", server.text)
    print(f"\n{dict(seen)}; cap {cap / MIB:.0f} MiB, {found and found[0]}; {grown / MIB:+.1f} MiB in the second half")
    assert seen.keys() == {"streamed", "whole", "streamed, left", "whole, left"}, seen
    left = sum(n for kind, n in seen.items() if kind.endswith("left"))
    assert left > sum(seen.values()) // 4
    assert grown < STAYS
    assert found and found[2] == "0"
    assert values["llama_flash_misses_total model=stdlib-moe-q8_0"] > 0
    assert "Traceback" not in server.text

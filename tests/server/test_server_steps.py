"""`llama-flash serve`: filled up sequences have the bits of each alone, and cost one reading of the weights."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from serving import SERVE, Server, post, refusal, serving

MODELS = Path(str(resources.files("llama_flash") / "models"))
DENSE, MOE = MODELS / "stdlib-arcee-q8_0.gguf", MODELS / "stdlib-moe-q8_0.gguf"
PROMPTS = ("import os\n", "class Stack:\n    def push(self, item):\n", "def main(argv):\n", "    for line in file:\n")
ARGUMENTS = ("--parallel", "4", "-c", "512", "-t", "1", "--what", "all", "--no-follow", "--no-warm-start")
N = 200  # tokens: they are computed at the same time for long
# what a step costs is learnt from what calls take: on a machine that is slower at times, anything may be
COMMAND = """
import runpy, sys
from llama_flash.session.steps import Steps

Steps.per_step = 16.0
sys.argv[0] = "llama-flash"
runpy.run_module("llama_flash", run_name="__main__")
"""


@pytest.fixture(scope="module")
def little() -> str:
    """A budget with which a dense model is read in each pass."""
    said = refusal(DENSE, *ARGUMENTS, "--dram-budget", "90MiB", "--reserve", "0", "--max-memory", "1GiB", command=SERVE)
    found = re.search(r"smallest that works is (\d+)", said)
    assert found, said
    return f"{int(found[1]) + 2}MiB"


@pytest.fixture
def server(little: str, tmp_path: Path) -> Iterator[Server]:
    budget = ("--dram-budget", little, "--reserve", "0", "--max-memory", "1GiB")
    command = [sys.executable, "-c", COMMAND, "serve"]
    with serving([DENSE, *ARGUMENTS, *budget], tmp_path / "log", command=command) as one:
        yield one


def ask(server: Server, prompt: str, slot: int, n: int = N, n_probs: int = 0) -> Any:
    body = {"prompt": prompt, "n_predict": n, "temperature": 0, "id_slot": slot, "ignore_eos": True}
    status, answer = post(server, "/completion", {**body, "n_probs": n_probs, "cache_prompt": False})
    assert status == 200, answer
    return answer["completion_probabilities"] if n_probs else answer["content"]


def together(server: Server, slots: Sequence[int], **how: Any) -> list[Any]:
    with ThreadPoolExecutor(len(slots)) as pool:
        return list(pool.map(lambda slot: ask(server, PROMPTS[slot], slot, **how), slots))


def metric(server: Server, name: str, model: Path = DENSE) -> float:
    return server.metrics()[f"llama_flash_{name}_total model={model.stem}"]


def test_sequences_with_an_idle_one_between_read_as_much_as_neighbours(server: Server) -> None:
    def reads(*slots: int) -> float:
        before = metric(server, "read_bytes")
        together(server, slots)
        return metric(server, "read_bytes") - before

    def at_once(*slots: int) -> bool:
        """Unless one began when the other had almost ended."""
        return any(reads(*slots) < 1.5 * alone for _ in range(4))

    alone = reads(1)
    assert alone > 0 and at_once(1, 2)
    assert at_once(0, 2), "two steps read twice as much"
    assert metric(server, "filled_tokens") > 0 and metric(server, "saved_steps") > 0


def test_every_probability_is_that_of_the_prompt_alone(server: Server) -> None:
    how = {"n": 8, "n_probs": 4096}
    alone = [ask(server, prompt, slot, **how) for slot, prompt in enumerate(PROMPTS)]

    def fills_up() -> bool:
        """Unless none of them were computed at the same time."""
        before = metric(server, "filled_tokens")
        for slots in ((0, 3), (0, 1, 3), (3, 1), (0, 1, 2, 3), (2, 0)):
            assert together(server, slots, **how) == [alone[slot] for slot in slots]
        return metric(server, "filled_tokens") > before

    assert any(fills_up() for _ in range(5))
    # a sequence that was filled up while it had nothing to compute still has what it had
    assert [ask(server, prompt, slot, **how) for slot, prompt in enumerate(PROMPTS)] == alone


def test_a_mixture_is_left_as_it_is(tmp_path: Path) -> None:
    arguments = ("--parallel", "4", "-c", "512", "-t", "1", "--what", "experts", "--no-warm-start")
    with serving([MOE, *arguments], tmp_path / "log", command=SERVE) as server:
        together(server, (0, 3))
        assert metric(server, "filled_tokens", MOE) == 0

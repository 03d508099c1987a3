"""llama-flash serve with drafts: several clients get the bytes that each gets alone without them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from serving import SERVE, Server, post, serving

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

"""`llama-flash serve` with several answers at the same time, as OpenAI's client meets it."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import socket
import threading
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path

import llama_cpp
import openai
import pytest
from serving import KEY, PATIENCE, SERVE, Server, cut_short, eventually, refusal, serving, smallest_budget

SHIPPED = Path(str(resources.files("llama_flash") / "models" / "stdlib-moe-q8_0.gguf"))
MIB = 1 << 20
PARALLEL = 4
CONTEXT = ("-c", "1024", "--parallel", str(PARALLEL))
PROMPTS = ("import os\n", "class Stack:\n", "def main(argv):\n", "    for line in file:\n")
N = 48  # tokens of an answer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copy(SHIPPED, tmp_path_factory.mktemp("served") / SHIPPED.name))


@pytest.fixture(scope="module")
def budget(model: Path) -> str:
    """With room for a part of the experts."""
    return str(smallest_budget(model, *CONTEXT, command=SERVE) + 8 * MIB)


@pytest.fixture(scope="module")
def server(model: Path, budget: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    arguments = [model, *CONTEXT, "--dram-budget", budget, "--api-key", KEY]
    with serving(arguments, tmp_path_factory.mktemp("log") / "server.log", command=SERVE) as server:
        yield server
        assert server.stop() == 128 + signal.SIGTERM, server.text
    assert "Traceback" not in server.text


def complete(client: openai.OpenAI, prompt: str, n: int = N) -> str:
    answer = client.completions.create(model="any", prompt=prompt, max_tokens=n, temperature=0)
    return answer.choices[0].text


def streamed(client: openai.OpenAI, prompt: str, n: int = N) -> str:
    stream = client.completions.create(model="any", prompt=prompt, max_tokens=n, temperature=0, stream=True)
    return "".join(chunk.choices[0].text for chunk in stream)


def at_once(server: Server, n_rounds: int) -> list[list[str]]:
    """The answers to all prompts, asked by as many clients, the half of them in pieces."""
    together = threading.Barrier(len(PROMPTS))

    def ask(i: int) -> str:
        client = server.client()
        together.wait(PATIENCE)
        return (streamed if i % 2 else complete)(client, PROMPTS[i])

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        return [list(pool.map(ask, range(len(PROMPTS)))) for _ in range(n_rounds)]


def test_four_clients_at_once_get_what_each_gets_alone_and_with_all_memory(server: Server, model: Path) -> None:
    alone = [complete(server.client(), prompt) for prompt in PROMPTS]
    assert len(set(alone)) == len(PROMPTS) and all(len(text) > 20 for text in alone)
    for together in at_once(server, 3):
        assert together == alone
    with contextlib.closing(llama_cpp.Llama(str(model), n_ctx=1024, verbose=False)) as resident:
        for prompt, text in zip(PROMPTS, alone, strict=True):
            want = resident.create_completion(prompt, max_tokens=N, temperature=0.0, repeat_penalty=1.0)
            assert text == want["choices"][0]["text"]


def test_answers_are_computed_together_from_weights_on_flash(server: Server) -> None:
    def together() -> bool:
        """On a busy machine one may have ended before the next came."""
        at_once(server, 1)
        return server.metrics()["llamacpp:n_busy_slots_per_decode"] > 1

    assert eventually(together)
    assert re.search(r"resident, .* on flash", server.text), server.text
    assert json.loads(server.get("/props"))["total_slots"] == PARALLEL


def test_a_chat_answers(server: Server) -> None:
    answer = server.client().chat.completions.create(
        model="any", messages=[{"role": "user", "content": PROMPTS[0]}], max_tokens=8, temperature=0
    )
    assert answer.choices[0].message.content and answer.usage is not None and answer.usage.completion_tokens <= 8


def test_the_key_is_asked_for(server: Server) -> None:
    with pytest.raises(openai.AuthenticationError):
        complete(server.client("another key"), PROMPTS[0])
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.get("/v1/models", key=None)
    assert refused.value.code == 401
    assert json.loads(server.get("/health", key=None))["status"] == "ok"


def test_a_read_that_fails_is_told_to_the_clients_and_the_next_answer_is_right(
    model: Path, budget: str, tmp_path: Path
) -> None:
    damaged = Path(shutil.copy(model, tmp_path))
    arguments = [damaged, *CONTEXT, "--dram-budget", budget, "--api-key", KEY]
    with serving(arguments, tmp_path / "server.log", command=SERVE) as server:
        client = server.client()
        want = complete(client, PROMPTS[2])
        with cut_short(damaged):
            with pytest.raises(openai.InternalServerError, match=re.escape(str(damaged))):
                complete(client, PROMPTS[3])
            with pytest.raises(openai.APIError, match=re.escape(str(damaged))):
                streamed(client, PROMPTS[1])
        assert complete(client, PROMPTS[2]) == want
        assert "KV cache" not in server.text


@pytest.mark.parametrize("one", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_the_middle_of_answers(
    one: signal.Signals, model: Path, budget: str, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    environment = {"LLAMA_FLASH_CACHE": str(cache), "LLAMA_FLASH_WARM_START": "1"}
    arguments = [model, *CONTEXT, "--dram-budget", budget]
    with serving(arguments, tmp_path / "log", command=SERVE, **environment) as server:
        endless = {"ignore_eos": True}
        streams = [
            server.client().completions.create(
                model="any", prompt=prompt, max_tokens=900, stream=True, extra_body=endless
            )
            for prompt in PROMPTS[:2]
        ]
        for stream in streams:
            next(stream)
        server.process.send_signal(one)
        assert server.process.wait(PATIENCE) == 128 + one
        assert "Traceback" not in server.text, server.text
    assert list(cache.glob("hot/*")), "it was not told to end: the model was not closed"


def test_what_cannot_be_served_is_refused_in_one_line(model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        said = refusal(model, "--port", port, command=SERVE)
    assert f"cannot listen at 127.0.0.1:{port}: Address already in use" in said
    assert "no such model: none.gguf" in refusal("none.gguf", command=SERVE)
    assert "32.0 MiB is too small" in refusal(model, "--dram-budget", "32MiB", command=SERVE)
    (tmp_path / "text.gguf").write_text("no model")
    assert "not a GGUF file" in refusal(tmp_path / "text.gguf", command=SERVE)
    assert "settings.yaml: No such file" in refusal("--config-file", tmp_path / "settings.yaml", command=SERVE)

"""`llama-flash serve` over workers: the answers of one machine, and errors that name the worker until it is back."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from serving import KEY, SERVE, Server, cut_short, eventually, post, refusal, serving
from workers import MOE, WorkerProcess, least_budget, workers_of

PARALLEL = 4
CONTEXT = ("-c", "512", "--parallel", str(PARALLEL), "--api-key", KEY, "--max-memory", "1GiB")
PROMPTS = ("import os\n", "class Stack:\n", "def main(argv):\n", "    for line in file:\n")
N = 24  # tokens of an answer
REPEATED = "x = 1\n" * 12, 160  # goes on like this; tokens of its answer


@pytest.fixture(scope="module")
def little(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A budget with which workers read in each token of several sequences, too."""
    return f"{least_budget(MOE, tmp_path_factory.mktemp('least'), what='all') + 4}MiB"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, little: str) -> Iterator[list[WorkerProcess]]:
    with workers_of(MOE, tmp_path_factory.mktemp("workers"), budget=little) as workers:
        yield workers


@contextlib.contextmanager
def over(workers: Sequence[WorkerProcess], folder: Path, *arguments: str) -> Iterator[Server]:
    flash = ("--what", "all", "--workers", _named(workers))
    with serving([MOE, *CONTEXT, *flash, *arguments], folder / "server.log", command=SERVE) as server:
        yield server


def _named(workers: Sequence[WorkerProcess]) -> str:
    return ",".join(worker.endpoint for worker in workers)


def distribution(server: Server, prompt: str, n: int = 6) -> Any:
    """Tokens of an answer, with the logarithms of the probabilities of all tokens of the vocabulary for each."""
    body = {"prompt": prompt, "n_predict": n, "temperature": 0, "n_probs": 4096, "cache_prompt": False}
    status, answer = post(server, "/completion", body)
    assert status == 200, answer
    told = answer["completion_probabilities"]
    assert len(told) == n and len(told[0]["top_logprobs"]) > 500
    return [(each["id"], sorted((one["id"], one["logprob"]) for one in each["top_logprobs"])) for each in told]


def complete(server: Server, prompt: str = PROMPTS[0], n: int = N) -> tuple[int, dict[str, Any]]:
    return post(server, "/v1/completions", {"prompt": prompt, "max_tokens": n, "temperature": 0})


def text_of(server: Server, prompt: str = PROMPTS[0], n: int = N) -> str:
    status, answer = complete(server, prompt, n)
    assert status == 200, answer
    return str(answer["choices"][0]["text"])


def answers_again(server: Server, want: str) -> bool:
    """Whether it comes to answering, and then rightly. Until then it may refuse, for a moment even connections."""

    def asked() -> bool:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            status, answer = complete(server)
            assert status in (200, 500, 503), answer
            assert status != 200 or answer["choices"][0]["text"] == want
            return status == 200
        return False

    return eventually(asked)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By prompt, of one machine with all in memory."""
    with serving([MOE, *CONTEXT], tmp_path_factory.mktemp("alone") / "server.log", command=SERVE) as server:
        found = {prompt: (distribution(server, prompt), text_of(server, prompt)) for prompt in PROMPTS}
        return {**found, REPEATED[0]: text_of(server, *REPEATED)}


def test_several_at_once_have_the_probabilities_of_one_machine_to_the_bit(
    two: list[WorkerProcess], tmp_path: Path, alone: dict[str, Any]
) -> None:
    with over(two, tmp_path) as server:
        with ThreadPoolExecutor(PARALLEL) as pool:
            found = list(pool.map(lambda prompt: distribution(server, prompt), PROMPTS * 3))
        assert found == [alone[prompt][0] for prompt in PROMPTS * 3]
        for worker in two:
            of = f"model={MOE.stem} worker={worker.endpoint}"
            assert eventually(lambda of=of: server.metrics().get(f"llama_flash_worker_read_bytes_total {of}", 0) > 0)
            assert server.metrics()[f"llama_flash_worker_up {of}"] == 1
            assert server.metrics()[f"llama_flash_worker_slots_bytes {of}"] > 0
            assert worker.endpoint not in server.get("/health", key=None)
        assert "busy" in refusal(MOE, "--workers", _named(two), "--parallel", "2", command=SERVE)
        assert text_of(server) == alone[PROMPTS[0]][1]
        assert server.stop() == 128 + signal.SIGTERM
        assert "Traceback" not in server.text


def test_a_worker_that_is_killed_in_mid_token_is_named_and_the_next_request_works(
    two: list[WorkerProcess], tmp_path: Path, alone: dict[str, Any]
) -> None:
    with over(two, tmp_path) as server:
        for _ in range(2):
            streams = [
                server.client().completions.create(
                    model="any", prompt=prompt, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
                )
                for prompt in PROMPTS
            ]
            for stream in streams:
                next(iter(stream))
            os.kill(two[1].guest(), signal.SIGKILL)
            for stream in streams:
                with pytest.raises(openai.APIError, match=f"worker {two[1].endpoint} is lost"):
                    for _ in stream:
                        pass
            assert answers_again(server, alone[PROMPTS[0]][1])
        assert server.metrics()[f"llama_flash_loads_total model={MOE.stem}"] == 3
        assert server.stop() == 128 + signal.SIGTERM
        assert "Traceback" not in server.text


def test_a_worker_that_dies_while_nobody_asks_is_noticed(
    two: list[WorkerProcess], tmp_path: Path, alone: dict[str, Any]
) -> None:
    with over(two, tmp_path) as server:
        os.kill(two[0].guest(), signal.SIGKILL)
        assert eventually(lambda: server.text.count("serving http") == 2)
        assert text_of(server) == alone[PROMPTS[0]][1]


def test_a_client_that_sends_slowly_does_not_end_a_server_that_has_lost_a_worker(
    two: list[WorkerProcess], tmp_path: Path, alone: dict[str, Any]
) -> None:
    with over(two, tmp_path, "--timeout", "14") as server:  # longer than an end may take after a signal
        host, _, port = server.url.removeprefix("http://").rpartition(":")
        with socket.create_connection((host, int(port))) as slow:
            slow.sendall(f"POST /v1/completions HTTP/1.1\r\nAuthorization: Bearer {KEY}\r\n".encode())
            slow.sendall(b"Content-Length: 1000\r\n\r\n{")
            os.kill(two[1].guest(), signal.SIGKILL)
            assert eventually(lambda: server.text.count("serving http") == 2)
        assert answers_again(server, alone[PROMPTS[0]][1])
        assert server.stop() == 128 + signal.SIGTERM


def test_while_a_worker_is_away_clients_are_told_and_signals_end_the_server(
    tmp_path: Path, little: str, alone: dict[str, Any]
) -> None:
    with workers_of(MOE, tmp_path, budget=little) as workers, over(workers, tmp_path) as server:
        _kill(workers[1])
        assert eventually(lambda: "status 503" in server.text)
        _assert_away(server, workers[1].endpoint)
        workers[1] = WorkerProcess(MOE, tmp_path, budget=little, port=workers[1].port)
        assert answers_again(server, alone[PROMPTS[0]][1])
        _kill(workers[1])
        assert eventually(lambda: server.text.count("status 503") == 2)
        assert server.stop() == 128 + signal.SIGTERM
        assert "Traceback" not in server.text


# waits that are short, a load after the other, and few of them
_IMPATIENT = """
import runpy, sys
from llama_flash.server import recovery

recovery._FIRST = recovery._LONGEST = 0.05
recovery._TRIES = 5
sys.argv[0] = "llama-flash"
runpy.run_module("llama_flash", run_name="__main__")
"""


def test_a_worker_that_comes_back_with_another_model_ends_the_server_after_a_while(
    tmp_path: Path, little: str, alone: dict[str, Any]
) -> None:
    other, little = tmp_path / "other.gguf", f"{int(little.removesuffix('MiB')) + 16}MiB"  # all layers at one worker
    with workers_of(MOE, tmp_path, 1, budget=little) as workers:
        arguments = [MOE, *CONTEXT, "--what", "all", "--workers", _named(workers)]
        command = [sys.executable, "-c", _IMPATIENT, "serve"]
        with serving(arguments, tmp_path / "server.log", command=command) as server:
            port = workers[0].port
            _kill(workers[0])
            assert eventually(lambda: "status 503" in server.text)
            workers[0] = WorkerProcess(_with_another_head(MOE, other), tmp_path, budget=little, port=port)
            assert eventually(lambda: "the server ends after 3 more loads that fail" in server.text)
            workers[0].end()
            workers[0] = WorkerProcess(MOE, tmp_path, budget=little, port=port)
            assert answers_again(server, alone[PROMPTS[0]][1])
            _kill(workers[0])
            workers[0] = WorkerProcess(other, tmp_path, budget=little, port=port)
            assert eventually(lambda: server.process.poll() is not None)
            assert server.process.returncode == 1
            last = server.text.splitlines()[-1]
            assert f"worker {workers[0].endpoint} has" in last, server.text
            assert "the server ends after one more load that fails" in server.text
            assert "Traceback" not in server.text


def _with_another_head(model: Path, path: Path) -> Path:
    """A copy of the same size with another name of the model."""
    data = model.read_bytes()
    at = data.index(b"general.name") + len(b"general.name") + 12  # its type, and its length
    path.write_bytes(data[:at] + b"X" + data[at + 1 :])
    return path


def _kill(worker: WorkerProcess) -> None:
    guest = worker.guest()
    worker.end(signal.SIGKILL)
    os.kill(guest, signal.SIGKILL)


def _assert_away(server: Server, worker: str) -> None:
    """Sooner or later, when the server itself has made room for what answers in its place."""

    def told() -> bool:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            status, answer = complete(server)
            assert status in (500, 503) and f"worker {worker} is lost" in answer["error"]["message"]
            return status == 503
        return False

    assert eventually(told)
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.get("/health", key=None)
    assert refused.value.code == 503 and refused.value.headers["Retry-After"] == "1"
    assert worker not in refused.value.read().decode()
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.get("/v1/models", key="another key")
    assert refused.value.code == 401 and worker not in refused.value.read().decode()
    metrics = server.metrics()
    assert metrics[f"llama_flash_model_loaded model={MOE.stem}"] == 0
    assert metrics[f"llama_flash_tokens_total kind=prompt model={MOE.stem}"] >= 0
    address = server.url.removeprefix("http://").rpartition(":")
    with contextlib.ExitStack() as stack:
        for _ in range(80):  # that say nothing, or nonsense
            one = stack.enter_context(socket.create_connection((address[0], int(address[2]))))
            one.settimeout(200)
            with contextlib.suppress(OSError):
                one.sendall(b"\0\n\r\n")
        one.close()
    assert eventually(told)


def test_a_frozen_worker_is_given_up_in_time(two: list[WorkerProcess], tmp_path: Path, alone: dict[str, Any]) -> None:
    settings = tmp_path / "settings.json"
    flash = {"workers": [worker.endpoint for worker in two], "worker_timeout": 3.0}
    settings.write_text(json.dumps({"models": [{"model": str(MOE), "n_ctx": 512, "flash_offload": flash}]}))
    with serving(
        ["--config-file", settings, "--parallel", "4", "--api-key", KEY], tmp_path / "log", command=SERVE
    ) as server:
        os.kill(two[0].guest(), signal.SIGSTOP)
        status, answer = complete(server)
        assert status == 500 and f"worker {two[0].endpoint} is lost" in answer["error"]["message"]
        assert "did not answer in time" in answer["error"]["message"]
        assert answers_again(server, alone[PROMPTS[0]][1])


def test_a_read_error_at_a_worker_is_told_with_its_name_and_the_next_answer_is_right(
    tmp_path: Path, little: str, alone: dict[str, Any]
) -> None:
    path = Path(shutil.copy(MOE, tmp_path / "model.gguf"))
    with workers_of(path, tmp_path, budget=little) as workers, over(workers, tmp_path) as server:
        assert text_of(server, PROMPTS[2]) == alone[PROMPTS[2]][1]
        with cut_short(path):
            status, answer = complete(server, PROMPTS[3])
            assert status == 500 and str(path) in answer["error"]["message"]
            assert any(worker.endpoint in answer["error"]["message"] for worker in workers)
        assert text_of(server, PROMPTS[2]) == alone[PROMPTS[2]][1]
        assert server.text.count("serving http") == 1


def test_without_its_workers_a_server_does_not_start(two: list[WorkerProcess], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = f"127.0.0.1:{free.getsockname()[1]}"
    for more in ((), ("--parallel", "2")):
        line = refusal(MOE, "--workers", f"{two[0].endpoint},{nobody}", *more, command=SERVE)
        assert f"worker {nobody} cannot be reached" in line
    assert "is not a host and a port" in refusal(MOE, "--workers", "nowhere", command=SERVE)


def test_how_many_at_once_follows_the_budgets_of_the_workers(two: list[WorkerProcess], tmp_path: Path) -> None:
    with serving([MOE, "-c", "512", "--workers", _named(two)], tmp_path / "log", command=SERVE) as server:
        assert "at the same time (--parallel; " in server.text


def test_drafts_over_workers_change_no_byte(two: list[WorkerProcess], tmp_path: Path, alone: dict[str, Any]) -> None:
    with over(two, tmp_path, "--draft", "ngram") as server, ThreadPoolExecutor(PARALLEL) as pool:
        assert list(pool.map(lambda prompt: text_of(server, prompt), PROMPTS)) == [alone[p][1] for p in PROMPTS]

        def drafted() -> bool:  # which step has drafts depends on the machine; one of many has
            assert text_of(server, *REPEATED) == alone[REPEATED[0]]
            return server.metrics()[f"llama_flash_drafted_total model={MOE.stem}"] > 0

        assert eventually(drafted)


def test_embeddings_are_those_of_one_machine(two: list[WorkerProcess], tmp_path: Path) -> None:
    def embedded(*arguments: str) -> Any:
        folder = tmp_path / str(len(arguments))
        folder.mkdir()
        settings = [MOE, "-c", "512", "--embeddings", "--pooling", "mean", "--api-key", KEY, *arguments]
        with serving(settings, folder / "log", command=SERVE) as server:
            return [post(server, "/v1/embeddings", {"input": text})[1]["data"][0]["embedding"] for text in PROMPTS]

    assert embedded("--workers", _named(two)) == embedded()


def test_the_classic_server_loads_the_model_again(
    two: list[WorkerProcess], tmp_path: Path, alone: dict[str, Any]
) -> None:
    arguments = [MOE, "-c", "512", "--classic", "--workers", _named(two)]
    with serving(arguments, tmp_path / "log", command=SERVE) as server:
        body = {"prompt": PROMPTS[0], "max_tokens": N, "temperature": 0}
        want = post(server, "/v1/completions", body)[1]["choices"][0]["text"]
        assert want == alone[PROMPTS[0]][1]
        os.kill(two[0].guest(), signal.SIGKILL)
        status, answer = post(server, "/v1/completions", {**body, "prompt": PROMPTS[1]})
        assert status == 200 or f"worker {two[0].endpoint} is lost" in answer["error"]["message"]
        assert post(server, "/v1/completions", body)[1]["choices"][0]["text"] == want

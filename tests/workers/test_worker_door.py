"""Who may listen where, and what is answered to those who speak another language."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from workers import MOE, WorkerProcess, logits_of, open_model, workers_of

from llama_flash import FlashWorkerError
from llama_flash.model.gguf import read_gguf
from llama_flash.workers.identity import identity_of
from llama_flash.workers.wire import Wire, connect

NAME = "blk.0.attn_norm.weight"


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    with workers_of(MOE, tmp_path_factory.mktemp("workers"), 1) as (one,):
        yield one


def says(worker: WorkerProcess, raw: bytes) -> bytes:
    """What is answered, until the connection ends."""
    with socket.create_connection(("127.0.0.1", worker.port), 20) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(4096):
                answer += piece
        return answer


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\n",
        b"{",
        b"[]\n",
        b"12\n",
        b'"text"\n',
        b"\xff\xfe\n",
        b"[" * 3000 + b"\n",
        b"x" * 5000 + b"\n",
        b'{"op": "open", "token": 3}\n',
        b'{"op": "open", "token": "wrong"}\n',
        b'{"op": "data", "key": "00"}\n',
        b'{"op": "stats"}\n',
        b"GET / HTTP/1.1\r\n\r\n",
        bytes([14]) + (24).to_bytes(8, "little") + bytes(24),  # as a stock client of the engine's RPC backend begins
    ],
)
def test_nonsense_is_answered_and_nobody_is_disturbed(worker: WorkerProcess, raw: bytes) -> None:
    answer = says(worker, raw)
    assert not answer or "message" in json.loads(answer)["error"]
    assert worker.process.poll() is None


def test_after_all_that_a_client_is_served(worker: WorkerProcess) -> None:
    rng = random.Random(1)
    for _ in range(200):
        says(worker, rng.randbytes(rng.randrange(200)) + b"\n" * rng.randrange(2))
    with contextlib.closing(open_model(MOE, flash=False)) as llm:
        alone = logits_of(llm)
    with contextlib.closing(open_model(MOE, [worker])) as llm:
        assert np.array_equal(logits_of(llm), alone)
    assert "Traceback" not in worker.said()


def test_connections_that_say_nothing_do_not_keep_others_out(worker: WorkerProcess) -> None:
    silent = [socket.create_connection(("127.0.0.1", worker.port)) for _ in range(8)]
    try:
        with contextlib.closing(open_model(MOE, [worker])) as llm:
            llm.eval([1, 2])
    finally:
        for one in silent:
            one.close()


@pytest.mark.parametrize(
    "wrong",
    [
        {"flash_rate": "fast"},
        {"dram_rate": [1]},
        {"flash_rate": -1},
        {"dram_rate": float("nan")},
        {"budget": None},
        {"budget": True},
        {"held": "much"},
        {"reserve": float("inf")},
    ],
)
def test_a_worker_whose_greeting_makes_no_sense_is_named(wrong: dict[str, object]) -> None:
    sound = {"ok": True, "key": "k", "identity": identity_of(read_gguf(MOE)), "budget": 1, "held": 0, "reserve": 0}
    with socket.create_server(("127.0.0.1", 0)) as door:

        def greet() -> None:
            client, _ = door.accept()
            with client:
                client.recv(4096)
                client.sendall(json.dumps({**sound, **wrong}).encode() + b"\n")
                client.recv(1)

        thread = threading.Thread(target=greet)
        thread.start()
        endpoint = f"127.0.0.1:{door.getsockname()[1]}"
        with pytest.raises(
            FlashWorkerError, match=f"worker {endpoint} says .* where its {next(iter(wrong))}"
        ) as caught:
            open_model(MOE, [endpoint])
        assert not caught.value.is_away
        thread.join(200)
        assert not thread.is_alive()


def run_worker(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llama_flash", "worker", str(MOE), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)


def test_an_address_that_others_reach_needs_to_be_asked_for() -> None:
    done = run_worker("--listen", "0.0.0.0:0")
    assert done.returncode == 1 and "--listen-anywhere" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_token_that_others_may_read_is_refused(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret\n")
    token.chmod(0o644)
    done = run_worker("--listen", "127.0.0.1:0", "--token-file", str(token))
    assert done.returncode == 1 and "chmod 600" in done.stderr
    token.chmod(0o600)
    token.write_text("\n")
    done = run_worker("--listen", "127.0.0.1:0", "--token-file", str(token))
    assert done.returncode == 1 and "no token" in done.stderr


@pytest.mark.parametrize("bad", ["nonsense", ":1", "127.0.0.1:x", "127.0.0.1:99999"])
def test_an_address_that_is_none_is_one_line(bad: str) -> None:
    done = run_worker("--listen", bad)
    assert done.returncode == 1 and "Traceback" not in done.stderr and bad in done.stderr


def test_rpc_servers_says_how_it_is_done() -> None:
    with pytest.raises(TypeError, match="FlashOffload\\(workers="):
        llama_cpp.Llama(str(MOE), rpc_servers="127.0.0.1:50052", verbose=False)
    llama_cpp.Llama(str(MOE), rpc_servers=None, verbose=False, vocab_only=True).close()


_WAITS = """
import signal, sys
from pathlib import Path
from llama_flash.workers.listen import Listener, Settings

listener = Listener(Settings(Path("any.gguf"), "127.0.0.1:0"), print)
signal.signal(signal.SIGTERM, lambda *_: listener.stop())
signal.siginterrupt(signal.SIGTERM, False)
print(listener.address, flush=True)
listener.run()
print("ended", flush=True)
"""


def test_a_signal_that_does_not_end_the_wait_for_clients_is_noticed() -> None:
    """As one that comes just before it begins: the system goes on waiting."""
    process = subprocess.Popen([sys.executable, "-c", _WAITS], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=400)[0] == "ended\n"
    finally:
        process.kill()
        process.wait()


def test_a_request_that_lacks_something_is_told_what(worker: WorkerProcess) -> None:
    with contextlib.closing(Wire(connect(worker.endpoint, 20))) as wire:
        assert "key" in wire.ask({"op": "open"})
        for line, said in (
            ({"op": "plan"}, "the request 'plan' has no 'homes'"),
            ({"op": "plan", "homes": 3}, "homes is no object"),
            ({"op": "plan", "homes": {"none": 2}}, "the file has no tensor 'none'"),
            (
                {"op": "plan", "homes": {}, "few_tokens": float("inf")},
                "few_tokens: inf is not a whole number from 0 on",
            ),
            ({"op": "plan", "homes": {NAME: 0.5}}, f"{NAME}: 0.5 is not a whole number from 0 on"),
            ({"op": "attach"}, "there is no plan yet"),
        ):
            assert wire.ask(line)["error"] == {"kind": "refused", "message": said}
        assert "error" not in wire.ask({"op": "plan", "homes": {}}) and "error" not in wire.ask({"op": "bound"})
        for line, said in (
            ({"op": "attach"}, "the request 'attach' has no 'context'"),
            ({"op": "attach", "context": [1]}, "context: [1] is no object"),
            ({"op": "attach", "context": {"n_ctx": 0}}, "n_ctx: 0 is not a whole number from 1 on"),
            ({"op": "check", "tokens": -1}, "tokens: -1 is not a whole number from 0 on"),
        ):
            assert wire.ask(line)["error"] == {"kind": "refused", "message": said}

"""No client can end the server, hold it up, or take memory that the budget does not have."""

from __future__ import annotations

import ctypes
import http.client
import json
import math
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib import resources
from pathlib import Path

import llama_cpp
import pytest
from caps import require_caps
from gguf_mutations import STRING, Value, with_value
from hostile import CASES, CHAT, COMPLETION, Fuzzer, Hostile, chat, complete, post
from serving import KEY, PATIENCE, SERVE, Server, eventually, refusal, serving, smallest_budget

SHIPPED = Path(str(resources.files("llama_flash") / "models" / "stdlib-moe-q8_0.gguf"))
MIB = 1 << 20
PARALLEL = 4
CONTEXT = ("-c", "256", "--parallel", str(PARALLEL))
ROOM = 8 * MIB  # beside the smallest budget
STAYS = 32 * MIB  # what may stay with the process, whatever was asked of it: docs/explanation/serving.md
MAX_BODY = MIB + 64 * 256
SANITIZED = "LLAMA_FLASH_SANITIZE" in os.environ


TEMPLATE = (  # of a model that calls tools, which makes the server write grammars for them
    "{% if tools %}<|im_start|>system\n<tools>{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}</tools>"
    "<|im_end|>\n{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped one with another template."""
    path = tmp_path_factory.mktemp("served") / SHIPPED.name
    return with_value(SHIPPED, path, "tokenizer.chat_template", Value(STRING, TEMPLATE.encode()))


@pytest.fixture(scope="module")
def cap(model: Path) -> int | None:
    if SANITIZED:  # which multiplies memory
        return None
    require_caps()
    return smallest_budget(model, *CONTEXT, command=SERVE) + ROOM


@pytest.fixture(scope="module")
def server(model: Path, cap: int | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Below a cap that has the kernel end it if it takes more."""
    log = tmp_path_factory.mktemp("log") / "server.log"
    with serving([model, *CONTEXT, "--api-key", KEY], log, cap, SERVE) as server:
        yield server
        assert server.stop() == 128 + signal.SIGTERM, server.text
    found = re.search(r"peak (\S+ \S+) of .* (\d+) OOM kills", server.text)
    assert SANITIZED or (found and found[2] == "0"), server.text


def ask(server: Server, path: str, body: bytes) -> tuple[int, str]:
    return post(server.url, path, body, KEY, PATIENCE)


def leave(server: Server, path: str, body: bytes) -> None:
    """Asks, and does not wait for the answer."""
    with connect(server) as connection:
        connection.sendall(head(server, path, f"Content-Length: {len(body)}") + body)


def nobody_asks(server: Server) -> bool:
    """Requests whose clients have left, or have their answer, may take a moment to end; until then they hold memory."""
    return eventually(lambda: server.metrics()["llama_flash_requests_in_flight"] == 0)


def known_answers(server: Server) -> list[str]:
    assert nobody_asks(server)
    prompts = ("import os\n", "class Stack:\n", "def main(argv):\n", "    for line in file:\n")
    bodies = [json.dumps(complete(prompt=prompt, n_predict=24, temperature=0)).encode() for prompt in prompts]
    answers = [ask(server, COMPLETION, body) for body in bodies]
    assert [status for status, _ in answers] == [200] * len(prompts)
    texts = [json.loads(text)["content"] for _, text in answers]
    assert len(set(texts)) == len(prompts)
    return texts


def taken(server: Server) -> int:
    """Bytes of the server's own memory, without pages of files."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{serving_process(server)}/status").read_text())
    assert found
    return int(found[1]) << 10


def serving_process(server: Server) -> int:
    """Below a cap it is a child of the process that was started."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    return int(children[0]) if children else server.process.pid


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_is_refused_with_the_reason(case: Hostile, server: Server) -> None:
    status, text = ask(server, case.path, case.data)
    assert status == case.status, text
    assert re.search(case.reason, json.loads(text)["error"]["message"]), text
    assert len(text) < 2000


@pytest.mark.parametrize("logit", [math.inf, math.nan], ids=str)
def test_logits_that_overflow_are_sampled_from(logit: float) -> None:
    """As a temperature near zero makes them: there are no probabilities then."""
    candidates = (llama_cpp.llama_token_data * 4)(*[llama_cpp.llama_token_data(i, logit, 0.0) for i in range(4)])
    array = llama_cpp.llama_token_data_array(candidates, len(candidates), -1, False)
    sampler = llama_cpp.llama_sampler_init_dist(1)
    llama_cpp.llama_sampler_apply(sampler, ctypes.byref(array))
    llama_cpp.llama_sampler_free(sampler)
    assert array.selected == 3


def test_what_was_refused_changes_no_answer(server: Server) -> None:
    want = known_answers(server)
    for case in CASES:
        ask(server, case.path, case.data)
    assert known_answers(server) == want


@pytest.mark.parametrize(
    ("n", "seed"), [(300, 1), pytest.param(10_000, 2, marks=pytest.mark.full)], ids=["some", "ten-thousand"]
)
def test_random_requests_do_no_harm(n: int, seed: int, server: Server) -> None:
    fuzzer = Fuzzer(seed)
    for case in CASES:  # what they take once, for all
        ask(server, case.path, case.data)
    want, before = known_answers(server), taken(server)
    requests = [fuzzer.request() for _ in range(n)]

    def send(request: tuple[str, bytes]) -> tuple[int, str]:
        if len(request[1]) % 20 == 0:
            leave(server, *request)
        try:
            return ask(server, *request)
        except (OSError, http.client.HTTPException) as error:
            raise AssertionError(f"no answer to {request}: {error!r}\n{server.text[-2000:]}") from error

    with ThreadPoolExecutor(PARALLEL) as pool:
        answers = list(pool.map(send, requests))
    ours = [(request, answer) for request, answer in zip(requests, answers, strict=True) if answer[0] == 500]
    assert not ours, ours[:5]
    statuses = {status for status, _ in answers}
    assert {200, 400} <= statuses <= {200, 400, 501, 503}
    assert sum(status == 200 for status, _ in answers) > n // 5, "most of what it sends has to come through to matter"
    assert known_answers(server) == want
    assert SANITIZED or taken(server) - before < STAYS


def test_what_many_ask_for_at_once_stays_within_the_budget(server: Server) -> None:
    """Each is the most expensive of its kind. Who finds no memory left is told to come again."""
    most = {"n_predict": 200, "ignore_eos": True}
    values = ",".join(['{"a":1}'] * 15_000)
    bodies = [
        json.dumps(complete(n_probs=80, **most)).encode(),
        json.dumps(complete(n_probs=1000, stream=True, **most)).encode(),
        json.dumps(complete(x="a" * 500_000)).encode(),
        f'{{"prompt":"a","n_predict":1,"x":[{values}]}}'.encode(),
        json.dumps(complete(grammar="root ::= " + '"a"{0,2000} ' * 8)).encode(),
        json.dumps(complete(grammar="root ::= " + f'"{"a" * 40}"{{2000}} ' * 2)).encode(),
    ]
    for body in bodies:
        assert nobody_asks(server)
        with ThreadPoolExecutor(2 * PARALLEL) as pool:
            statuses = {status for status, _ in pool.map(lambda body: ask(server, COMPLETION, body), [body] * 8)}
        assert 200 in statuses and statuses <= {200, 503}
    assert server.process.poll() is None


def head(server: Server, path: str, *lines: str, key: str = KEY) -> bytes:
    first = (f"POST {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {key}", "Content-Type: application/json")
    return "\r\n".join((*first, *lines, "", "")).encode()


def connect(server: Server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), PATIENCE)


def status_of(connection: socket.socket) -> int:
    """Of the answer to what was sent, of which the body may never come."""
    line = connection.makefile("rb").readline()
    return int(line.split()[1])


def test_the_key_and_the_length_are_looked_at_before_the_body_is_read(server: Server) -> None:
    length = "Content-Length: 300000000"
    with connect(server) as connection:
        connection.sendall(head(server, CHAT, length, key="another key"))
        assert status_of(connection) == 401
    with connect(server) as connection:
        connection.sendall(head(server, CHAT, length))
        assert status_of(connection) == 413


def test_a_body_beyond_the_limit_is_refused_however_it_is_sent(server: Server) -> None:
    for n in (MAX_BODY, 15 * MIB):  # whose client does not look for an answer before it has sent all of it
        status, text = ask(server, COMPLETION, json.dumps(complete(prompt="a" * n)).encode())
        assert status == 413 and f"{MAX_BODY} bytes" in text
    with connect(server) as connection:
        connection.sendall(head(server, COMPLETION, "Transfer-Encoding: chunked"))
        small = json.dumps(complete()).encode()
        connection.sendall(f"{len(small):x}\r\n".encode() + small + b"\r\n0\r\n\r\n")
        assert status_of(connection) == 200
    with connect(server) as connection:
        connection.sendall(head(server, COMPLETION, "Transfer-Encoding: chunked"))
        piece = b"10000\r\n" + b"a" * 0x10000 + b"\r\n"
        for _ in range(MAX_BODY // 0x10000 + 2):
            connection.sendall(piece)
        assert status_of(connection) == 413


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_tokenized(server: Server) -> None:
    text = "a" * 300_000
    for path, body in ((COMPLETION, complete(prompt=text)), (CHAT, chat(messages=[{"role": "user", "content": text}]))):
        status, answer = ask(server, path, json.dumps(body).encode())
        assert status == 400 and re.search(r"\d+ bytes is longer than what 256 tokens", answer), answer


def test_what_only_the_owner_may_do_is_off(server: Server) -> None:
    for path in ("/slots/0?action=save", "/slots/0?action=erase", "/props", "/lora-adapters", "/tools", "/cors-proxy"):
        status, text = ask(server, path, b"{}")
        assert status in (403, 501), (path, text)


def test_no_answer_is_kept_for_clients_that_might_come_back(server: Server) -> None:
    body = json.dumps(complete(stream=True)).encode()
    with connect(server) as connection:
        connection.sendall(head(server, COMPLETION, f"Content-Length: {len(body)}", "X-Conversation-Id: kept") + body)
        assert status_of(connection) == 200
    status, text = ask(server, "/v1/streams/lookup", b'{"conversation_ids": ["kept"]}')
    assert status == 200 and "kept" not in text


def test_slow_and_silent_clients_hold_nobody_up(model: Path, tmp_path: Path) -> None:
    arguments = [model, *CONTEXT, "--api-key", KEY, "--timeout", "2"]
    with serving(arguments, tmp_path / "log", command=SERVE) as server, ExitStack() as connections:
        silent = [connections.enter_context(connect(server)) for _ in range(50)]
        halves = [connections.enter_context(connect(server)) for _ in range(50)]
        for connection in halves:
            connection.sendall(head(server, COMPLETION, "Content-Length: 1000") + b'{"prompt"')
        assert ask(server, COMPLETION, json.dumps(complete()).encode())[0] == 200, "while all of them wait"
        slow = halves[0]
        ended = False
        for _ in range(int(PATIENCE)):  # a byte now and then does not help
            try:
                slow.sendall(b" ")
                slow.settimeout(0.5)
                ended = slow.recv(1 << 16) == b""
            except TimeoutError:
                continue
            except OSError:
                ended = True
            if ended:
                break
        assert ended
        for connection in silent:
            connection.settimeout(PATIENCE)
            assert connection.recv(1 << 16) == b"", "closed"


def test_more_requests_than_it_takes_are_sent_away(model: Path, tmp_path: Path) -> None:
    arguments = [model, "-c", "2048", "--parallel", "1", "--api-key", KEY, "--max-requests", "2"]
    endless = json.dumps(complete(n_predict=2000, ignore_eos=True, stream=True)).encode()
    with serving(arguments, tmp_path / "log", command=SERVE) as server, ExitStack() as connections:
        end = time.monotonic() + PATIENCE
        answer = (200, "")
        while answer[0] == 200 and time.monotonic() < end:
            connections.close()  # on a slow machine the first may have ended before the second came
            for _ in range(2):
                connection = connections.enter_context(connect(server))
                connection.sendall(head(server, COMPLETION, f"Content-Length: {len(endless)}") + endless)
            soon = time.monotonic() + 3
            while (answer := ask(server, "/tokenize", b'{"content": "a"}'))[0] == 200 and time.monotonic() < soon:
                time.sleep(0.02)  # both have to have arrived
        assert answer[0] == 503 and "try again later" in answer[1]
        assert json.loads(server.get("/health"))["status"] == "ok"
        connections.close()  # they leave: there is room again
        while (answer := ask(server, "/tokenize", b'{"content": "a"}'))[0] != 200 and time.monotonic() < end:
            time.sleep(0.02)
        assert answer[0] == 200


def head_lines(connection: socket.socket) -> list[str]:
    """Of an answer; what follows is not waited for."""
    answer = b""
    while b"\r\n\r\n" not in answer and (more := connection.recv(4096)):
        answer += more
    return answer.decode(errors="replace").partition("\r\n\r\n")[0].splitlines()


def test_who_finds_no_memory_left_is_told_when_to_come_again(model: Path, tmp_path: Path) -> None:
    arguments = [model, "-c", "2048", "--parallel", "1", "--api-key", KEY, "--max-memory", "8MiB"]
    # each is counted with 25 probabilities for 2000 tokens, 6.4 MB: two are more than there is
    long = json.dumps(complete(n_predict=2000, n_probs=25, ignore_eos=True, stream=True)).encode()
    with serving(arguments, tmp_path / "log", command=SERVE) as server, ExitStack() as connections:

        def begun() -> socket.socket:
            connection = connections.enter_context(connect(server))
            connection.sendall(head(server, COMPLETION, f"Content-Length: {len(long)}") + long)
            return connection

        def refused() -> bool:
            """Unless the first has come to its end before the second was there."""
            connections.close()
            assert nobody_asks(server) and status_of(begun()) == 200
            lines.append(head_lines(begun()))
            return lines[-1][0].split()[1] == "503" and server.metrics()["llama_flash_requests_in_flight"] == 1

        lines: list[list[str]] = []
        assert eventually(refused), lines
        (after,) = (line.partition(":")[2] for line in lines[-1] if line.lower().startswith("retry-after:"))
        assert int(after) >= 1


def test_answers_are_counted_by_path_and_status(server: Server) -> None:
    def counted(path: str, status: str) -> float:
        return server.metrics().get(f"llama_flash_requests_total path={path} status={status}", 0.0)

    names = [("/v1/completions", "2xx"), ("/v1/completions", "4xx"), ("/tokenize", "2xx"), ("other", "4xx")]
    assert nobody_asks(server)
    before = [counted(*name) for name in names]
    for path in (COMPLETION, "/v1/completions"):  # which are one
        assert ask(server, path, json.dumps(complete(max_tokens=1)).encode())[0] == 200
    assert ask(server, COMPLETION, b"no JSON")[0] == 400
    assert ask(server, "/tokenize", b'{"content": "a"}')[0] == 200
    for i in range(3):  # a client makes no names
        assert ask(server, f"/no/such/path/{i}", b"{}")[0] == 404
    # an answer is counted when its client has it
    assert eventually(lambda: [counted(*name) - was for name, was in zip(names, before, strict=True)] == [2, 1, 1, 3])
    assert not any("/no/such" in name for name in server.metrics())


def test_limits_are_flags(model: Path, tmp_path: Path) -> None:
    limits = ("--max-body", "2000", "--max-depth", "4", "--max-grammar", "100", "--max-memory", "8MiB")
    with serving([model, *CONTEXT, "--api-key", KEY, *limits], tmp_path / "log", command=SERVE) as server:
        assert ask(server, COMPLETION, json.dumps(complete()).encode())[0] == 200
        for body, status, reason in (
            (complete(n_probs=100, n_predict=200), 400, "more memory than all of them"),
            (complete(prompt="a" * 2000), 413, "larger than 2000 bytes"),
            (complete(x=[[[[1]]]]), 400, "nests more than 4"),
            (complete(grammar='root ::= "a" # ' + "x" * 100), 400, "longer than 100 bytes"),
        ):
            answer = ask(server, COMPLETION, json.dumps(body).encode())
            assert answer[0] == status and reason in answer[1]
    assert "--max-body: " in refusal(model, "--max-body", "much", command=SERVE)
    assert "--max-depth and --classic: " in refusal(model, "--max-depth", "9")

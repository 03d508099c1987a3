"""What answers in a server's place: whoever has the key is told why, and nobody holds it up or takes its memory."""

from __future__ import annotations

import contextlib
import http.client
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import SERVE, eventually, serving
from workers import MOE

from llama_flash.server.address import bound
from llama_flash.server.stand_in import StandIn

KEY = "schl\u00fcssel"


@pytest.fixture
def port() -> Iterator[int]:
    with bound("127.0.0.1", 0) as listener:
        number = listener.getsockname()[1]
    with contextlib.closing(StandIn("127.0.0.1", number, "a worker is away", KEY, lambda: "")):
        assert eventually(lambda: _status(number, {}) == 401)
        yield number


def _status(port: int, headers: dict[str, bytes]) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    with contextlib.suppress(OSError), contextlib.closing(connection):
        connection.request("POST", "/v1/completions", b"x" * (1 << 20), headers)
        return connection.getresponse().status
    return 0


def test_the_key_may_be_said_where_the_server_lets_clients_say_it(port: int) -> None:
    assert _status(port, {"Authorization": b"Bearer " + KEY.encode()}) == 503
    assert _status(port, {"X-Api-Key": KEY.encode()}) == 503
    assert _status(port, {"X-Api-Key": b"another"}) == 401


def _asked(port: int, method: str, path: str, headers: dict[str, str]) -> tuple[int, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    with contextlib.closing(connection):
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        answer.read()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}


def test_health_is_told_to_everybody_and_no_method_goes_past_the_key(port: int) -> None:
    for path in ("/health", "/v1/health"):
        status, headers = _asked(port, "GET", path, {})
        assert status == 503 and headers["retry-after"] == "1"
    for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
        assert _asked(port, method, "/v1/models", {})[0] == 401
        assert _asked(port, method, "/v1/models", {"X-Api-Key": KEY.encode().decode("latin-1")})[0] == 503


def test_pages_of_other_addresses_may_do_what_the_server_lets_them(port: int, tmp_path: Path) -> None:
    shared = ("access-control-", "content-type")
    with serving([MOE, "-c", "256", "--api-key", KEY], tmp_path / "log", command=SERVE) as server:
        real = int(server.url.rpartition(":")[2])
        for origin in ("http://localhost:3000", "https://127.0.0.1", "http://localhost.example.com", ""):
            headers = {"Origin": origin} if origin else {}
            for method, path in (("OPTIONS", "/v1/models"), ("GET", "/v1/models")):  # without the key
                wanted = _asked(real, method, path, headers)
                found = _asked(port, method, path, headers)
                assert found[0] == wanted[0]
                for name in {*found[1], *wanted[1]}:
                    if name.startswith(shared):
                        assert found[1].get(name) == wanted[1].get(name), (origin, method, name)


def test_clients_that_go_on_sending_are_left(port: int) -> None:
    def is_left(client: socket.socket) -> bool:
        try:
            client.sendall(b"x")
        except OSError:
            return True
        return False

    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(64)]
        for client in slow:
            client.sendall(b"POST / HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n")
        assert eventually(lambda: sum(is_left(client) for client in slow) == len(slow))
        assert eventually(lambda: _status(port, {"X-Api-Key": KEY.encode()}) == 503)


def test_a_head_is_of_bounded_length(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        try:
            client.sendall(b"GET / HTTP/1.1\r\n" + b"a: " + b"x" * 60000 + b"\r\nb: " + b"x" * 60000)
            said = client.recv(100)
        except ConnectionError:  # it is not read to its end
            return
        assert b" 431 " in said

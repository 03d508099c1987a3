"""Requests that find all sequences taken: first come, first served, also where one needs several at the same time."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from gguf_mutations import Value, with_value
from hostile import COMPLETION, complete, post
from serving import KEY, PATIENCE, SERVE, Server, eventually, serving

from llama_flash.model.gguf import read_gguf

SHIPPED = Path(str(resources.files("llama_flash") / "models" / "stdlib-moe-q8_0.gguf"))
PARALLEL = 2
ALL, ONE = PARALLEL, 1  # answers to one request
CONTEXT = 16384  # tokens of each sequence
ANSWER = 24  # tokens: the thread that has read one answer notes it before the next one is there
UINT32 = 4  # a type of GGUF


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    longer = Value(UINT32, 2 * CONTEXT)  # than it was trained for
    model = with_value(SHIPPED, folder / SHIPPED.name, f"{read_gguf(SHIPPED).architecture}.context_length", longer)
    arguments = [model, "-c", str(CONTEXT), "--parallel", str(PARALLEL), "--api-key", KEY]
    with serving(arguments, folder / "server.log", command=SERVE) as server:
        yield server


def endless(server: Server) -> Any:
    """A stream that holds a sequence until it is closed, or for a minute at least."""
    stream = server.client().completions.create(
        model="any", prompt="import os", max_tokens=CONTEXT - 100, stream=True, extra_body={"ignore_eos": True}
    )
    next(stream)
    return stream


def waiting(server: Server) -> float:
    return server.metrics()["llamacpp:requests_deferred"]


def running(server: Server) -> float:
    return server.metrics()["llamacpp:requests_processing"]


@pytest.mark.parametrize(
    "asked",
    [[ALL, ONE, ONE, ONE], [ONE, ONE, ALL, ONE, ALL], [ALL, ALL, ONE, ALL, ONE]],
    ids=["several-then-single", "mixed", "several-beside-single"],
)
def test_answers_come_in_the_order_in_which_they_were_asked_for(asked: list[int], server: Server) -> None:
    """No request for several answers waits for ever beside single ones, and no single one beside those."""
    ended, lock = list[int](), threading.Lock()

    def ask(i: int) -> None:
        body = json.dumps(complete(n_predict=ANSWER, n_cmpl=asked[i], ignore_eos=True)).encode()
        status, text = post(server.url, COMPLETION, body, KEY, PATIENCE)
        with lock:
            ended.append(i)
        assert status == 200, text
        answers = json.loads(text)
        assert len(answers if isinstance(answers, list) else [answers]) == asked[i]

    with ThreadPoolExecutor(len(asked)) as pool, ExitStack() as streams:
        taken = [streams.enter_context(closing(endless(server))) for _ in range(PARALLEL)]
        replies = []
        for i in range(len(asked)):
            replies.append(pool.submit(ask, i))
            assert eventually(lambda: waiting(server) == len(replies))
        taken[0].close()
        # a sequence is free: who needs one takes it, but not before somebody who needs both
        assert eventually(lambda: waiting(server) == len(asked) - asked.index(ALL) and running(server) == ONE)
        taken[1].close()
        for reply in replies:
            reply.result()
    several = [i for i, n in enumerate(asked) if n == ALL]
    for i in several:  # each parts those before it from those after it
        at = ended.index(i)
        assert set(ended[:at]) == set(range(i)), ended


def test_who_waits_is_served_when_the_one_before_him_leaves(server: Server) -> None:
    several, body = (json.dumps(complete(n_predict=4, **how)).encode() for how in ({"n_cmpl": ALL}, {}))
    with closing(endless(server)), ThreadPoolExecutor(1) as pool:
        address = urlsplit(server.url)
        assert address.hostname and address.port
        # needs the sequence that is taken
        with socket.create_connection((address.hostname, address.port), PATIENCE) as leaving:
            lines = ("Host: x", f"Authorization: Bearer {KEY}", "Content-Type: application/json")
            first = "\r\n".join((f"POST {COMPLETION} HTTP/1.1", *lines, f"Content-Length: {len(several)}", "", ""))
            leaving.sendall(first.encode() + several)
            assert eventually(lambda: waiting(server) == 1)
            single = pool.submit(post, server.url, COMPLETION, body, KEY, PATIENCE)
            assert eventually(lambda: waiting(server) == 2)
            assert not single.done()
        assert single.result(PATIENCE)[0] == 200  # when that client gives up

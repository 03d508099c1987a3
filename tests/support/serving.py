"""A running server for the tests: a process of its own, below a memory cap if one is given."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
from prometheus_client.parser import text_string_to_metric_families

PATIENCE = 400.0  # seconds: a busy machine is not a failure
KEY = "a key for tests"
SERVE = [sys.executable, "-m", "llama_flash", "serve"]
CLASSIC = [*SERVE, "--classic"]


class Server:
    """`COMMAND --port 0 ARGUMENTS`, which has come to serving.

    Args:
        log: where its stdout and stderr go.
        cap: memory limit in bytes.
        command: CLASSIC or SERVE.
    """

    def __init__(
        self,
        arguments: Sequence[str | Path],
        log: Path,
        cap: int | None = None,
        command: Sequence[str] = CLASSIC,
        **environment: str,
    ) -> None:
        self.log = log
        capped = [] if cap is None else [sys.executable, "-m", "llama_flash", "cap", str(cap), "--"]
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                [*capped, *command, "--port", "0", *map(str, arguments)],
                stdout=stream,
                stderr=stream,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            )
        end = time.monotonic() + PATIENCE
        while not (found := re.search(r"serving http://(\S+)/v1", self.text)):
            assert self.process.poll() is None, self.text
            assert time.monotonic() < end, self.text
            time.sleep(0.05)
        self.url = f"http://{found[1]}"

    @property
    def text(self) -> str:
        return self.log.read_text()

    def stop(self) -> int:
        """The exit code after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)

    def client(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE)

    def get(self, path: str, key: str | None = KEY) -> str:
        request = urllib.request.Request(self.url + path)
        if key is not None:
            request.add_header("Authorization", f"Bearer {key}")
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            text: str = response.read().decode()
        return text

    def metrics(self) -> dict[str, float]:
        """By name and labels: {'llama_flash_tokens_total kind=generated model=name': 3.0}."""
        values = {}
        for family in text_string_to_metric_families(self.get("/metrics")):
            for sample in family.samples:
                values[" ".join([sample.name, *(f"{k}={v}" for k, v in sorted(sample.labels.items()))])] = sample.value
        return values


@contextmanager
def serving(
    arguments: Sequence[str | Path],
    log: Path,
    cap: int | None = None,
    command: Sequence[str] = CLASSIC,
    **environment: str,
) -> Iterator[Server]:
    server = Server(arguments, log, cap, command, **environment)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()


def post(server: Server, path: str, body: dict[str, Any] | bytes) -> tuple[int, dict[str, Any]]:
    """Status and answer."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    try:
        with urllib.request.urlopen(urllib.request.Request(server.url + path, data, headers), timeout=PATIENCE) as done:
            return done.status, json.load(done)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def eventually(what: Callable[[], bool]) -> bool:
    end = time.monotonic() + PATIENCE
    while not (true := what()) and time.monotonic() < end:
        time.sleep(0.05)
    return true


def refusal(*arguments: str | Path, command: Sequence[str] = CLASSIC, **environment: str) -> str:
    """What a server says that does not start: one line, and no traceback."""
    done = subprocess.run(
        [*command, "--port", "0", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 1, done.stderr
    beside = ("loading ", "llama_context: n_ctx_seq")
    lines = [line for line in done.stderr.splitlines() if not line.startswith(beside)]
    assert len(lines) == 1, done.stderr
    return lines[0]


def smallest_budget(model: Path, *arguments: str, command: Sequence[str] = CLASSIC, **environment: str) -> int:
    """Bytes, as a refusal names them."""
    line = refusal(model, *arguments, "--dram-budget", "32MiB", command=command, **environment)
    found = re.search(r"smallest that works is (\d+) MiB", line)
    assert found, line
    return int(found[1]) << 20


@contextmanager
def cut_short(path: Path) -> Iterator[None]:
    """The file without its last two thirds."""
    stat = path.stat()
    tail = path.read_bytes()[stat.st_size // 3 :]
    os.truncate(path, stat.st_size // 3)
    try:
        yield
    finally:
        with path.open("r+b") as file:
            file.seek(stat.st_size // 3)
            file.write(tail)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

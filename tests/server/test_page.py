"""The page for chats, and what the server has at `/` without it."""

from __future__ import annotations

import gzip
import json
import re
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT
from serving import KEY, PATIENCE, SERVE, Server, serving

SHIPPED = Path(str(resources.files("llama_flash") / "models" / "stdlib-moe-q8_0.gguf"))
BUILT = (ROOT / "build/ui/dist/index.html").is_file()  # by `make ui`, before the wheel was


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    arguments = [SHIPPED, "-c", "1024", "--parallel", "2", "--api-key", KEY]
    with serving(arguments, tmp_path_factory.mktemp("log") / "server.log", command=SERVE) as server:
        yield server
        assert server.stop() == 128 + signal.SIGTERM, server.text


def fetch(server: Server, path: str) -> tuple[str, str]:
    """Type and text, as a browser without the key gets them."""
    request = urllib.request.Request(server.url + path, headers={"Accept-Encoding": "gzip"})
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        data = answer.read()
        packed = answer.headers.get("Content-Encoding") == "gzip"
        return answer.headers["Content-Type"], (gzip.decompress(data) if packed else data).decode(errors="replace")


@pytest.mark.skipif(not BUILT, reason="the page was not built: `make ui`")
def test_the_page_and_all_that_it_names_are_served_without_a_key(server: Server) -> None:
    kind, page = fetch(server, "/")
    assert kind.startswith("text/html") and "<script" in page
    parts = set(re.findall(r'(?:src|href)="(?:\./|/)?([^":]+\.(?:js|css|webmanifest|svg|ico))"', page))
    assert any(name.endswith(".webmanifest") for name in parts)
    parts |= set(re.findall(r"_app/immutable/[\w./-]+\.js", page))
    assert any(name.endswith(".js") for name in parts), parts
    for name in parts:
        assert fetch(server, f"/{name}")[1]
    with pytest.raises(urllib.error.HTTPError) as refused:
        fetch(server, "/props")
    assert refused.value.code == 401


@pytest.mark.skipif(BUILT, reason="the page was built")
def test_a_server_without_the_page_says_what_to_do(server: Server) -> None:
    kind, text = fetch(server, "/")
    assert kind.startswith("text/plain") and "`make ui`" in text and "npm" in text


def test_it_can_be_off(tmp_path: Path) -> None:
    arguments = [SHIPPED, "-c", "256", "--parallel", "1", "--no-page", "--api-key", KEY]
    with serving(arguments, tmp_path / "log", command=SERVE) as server:
        kind, text = fetch(server, "/")
        assert kind.startswith("text/plain") and "--no-page" in text and "make ui" not in text
        with pytest.raises(urllib.error.HTTPError):
            fetch(server, "/index.html")


def asked(server: Server, path: str, body: dict[str, Any] | None = None) -> Any:
    """As the page asks: with its headers, and the key that was entered there."""
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json", "Origin": server.url}
    headers["X-Conversation-Id"] = "8a5b9c1e-3c5f-4f0e-9b57-0d8c0a2f6b11"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data, headers)
    return urllib.request.urlopen(request, timeout=PATIENCE)


def test_what_the_page_asks_is_answered(server: Server) -> None:
    """The requests of one chat, as a browser sent them."""
    with asked(server, "/props") as answer:
        props = json.load(answer)
    assert props["default_generation_settings"]["n_ctx"] == 1024
    with asked(server, "/v1/models") as answer:
        assert json.load(answer)["data"][0]["id"] == SHIPPED.name.removesuffix(".gguf")
    body = {
        "messages": [{"role": "user", "content": "import os"}],
        "return_progress": True,
        "sse_ping_interval": 1,
        "stream": True,
        "tools": [{"type": "function", "function": {"name": "get_datetime", "parameters": {"type": "object"}}}],
        **json.loads(props["ui_settings"]["customJson"]),  # else the tools are refused: this model's template has none
        "reasoning_format": "auto",
        "reasoning_control": True,
        "backend_sampling": False,
        "timings_per_token": True,
        "max_tokens": 8,
    }
    with asked(server, "/v1/chat/completions", body) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        told = [line[6:] for line in answer.read().decode().splitlines() if line.startswith("data: ")]
    assert told[-1] == "[DONE]"
    events = [json.loads(line) for line in told[:-1]]
    text = "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"])
    assert text
    assert any(event.get("prompt_progress") for event in events), "it shows how far a prompt is"
    assert any(event.get("timings", {}).get("predicted_n") for event in events), "and how fast tokens come"
    with pytest.raises(urllib.error.HTTPError) as refused:  # of which the page shows the reason
        asked(server, "/v1/chat/completions", {**body, "backend_sampling": True})
    assert "backend_sampling is set by the server" in json.load(refused.value)["error"]["message"]

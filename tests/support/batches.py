"""Files of requests, and `llama-flash batch` on them, for the tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

PATIENCE = 400.0  # seconds: a busy machine is not a failure
BATCH = [sys.executable, "-m", "llama_flash", "batch"]


def request(custom_id: str, prompt: Any, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    """One line, as a value."""
    name = {"/v1/completions": "prompt", "/v1/chat/completions": "messages", "/v1/embeddings": "input"}[url]
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {name: prompt, **body}}


def write(path: Path, lines: Iterable[Mapping[str, Any] | str]) -> Path:
    """A file of requests. Text is written as it is."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def answers(path: Path) -> list[dict[str, Any]]:
    """In the file's order; fails if there is anything but whole lines."""
    text = path.read_text()
    assert not text or text.endswith("\n")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def said(path: Path) -> dict[str, Any]:
    """What was answered, by custom_id, without what differs each time."""
    found = {}
    for line in answers(path):
        body = line["response"]["body"] if line["response"] else line["error"]
        found[line["custom_id"]] = body.get("choices") or body.get("data") or body
    return found


def start(*arguments: str | Path, capped: int | None = None) -> subprocess.Popen[str]:
    """The command, below a cap in bytes if one is given."""
    cap = [] if capped is None else [sys.executable, "-m", "llama_flash", "cap", str(capped), "--"]
    return subprocess.Popen(
        [*cap, *BATCH, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


def run(*arguments: str | Path, capped: int | None = None, code: int = 0) -> str:
    """What it says on stderr; fails if it does not end with this code."""
    process = start(*arguments, capped=capped)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, err
    assert "Traceback" not in err, err
    return err

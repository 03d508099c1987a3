"""Prompts seen before: what reading their state costs beside its bytes, and beside computing it.

A model with the KV cache of Qwen3-30B-A3B (48 layers, 98,304 bytes for each token) and little else is given prompts
whose state is on flash (random values), so that nothing but the reading is measured. A real small model has a
conversation with a server that is started anew before each turn, and with a Llama that has upstream's LlamaDiskCache.

    python ci/bench/benchlib/prompt_store.py CHILD ARGUMENTS...

is what runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

SIZES = (8192, 20480)  # tokens whose state is on flash
STORED = 1000  # prompts, where the look-up is measured
TURNS = 10
_COMPUTED = 1024  # tokens that are computed, for the rate
_BELOW = 1.3  # times what the bytes take at the device's rate
_SOONER = 50.0  # times than computing
_LOOK_UP = 0.02  # seconds
_RATE_BYTES = 2 << 30
_PATIENCE = 300.0


@dataclass
class Result:
    """Seconds, but where something else is said."""

    device: list[float] = field(default_factory=list)  # bytes per second
    bytes: dict[int, int] = field(default_factory=dict)  # by tokens
    restore: dict[int, list[float]] = field(default_factory=dict)
    first: dict[int, list[float]] = field(default_factory=dict)  # first token, the state on flash
    touch: dict[int, list[float]] = field(default_factory=dict)  # of memory for so many tokens, the first time
    computing: float = 0.0  # of a token of a prompt
    write: float = 0.0  # bytes per second
    look_up: dict[str, float] = field(default_factory=dict)
    turns: dict[str, list[float]] = field(default_factory=dict)  # first token of each turn, by how
    cached: dict[str, list[int]] = field(default_factory=dict)  # tokens that were not computed

    def to_json(self) -> dict[str, Any]:
        return vars(self)


def measure(found: Result, models: Path, real: Path | None, say: Callable[[str], None], repeats: int = 5) -> None:
    """Into `found`, part by part: reading states, or conversations with a small `real` model. Leaves no files."""
    models.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="prompt-store-", dir=models) as name:
        if real is not None:
            _converse(real, Path(name), found, say)
        else:
            _read(Path(name), found, say, repeats)


def _read(folder: Path, found: Result, say: Callable[[str], None], repeats: int) -> None:
    from benchlib import machine  # a child does not find it

    model = _model(folder / "kv-shape.gguf")
    say("writing states")
    told = _child("fill", model, folder / "prompts", *SIZES)
    found.bytes = {int(n): size for n, size in told["bytes"].items()}
    _fill(folder / "rate")
    for number in range(repeats):
        say(f"reading states, {number + 1}")
        found.device.append(_child("rate", folder / "rate")["rate"])
        for n in SIZES:
            told = _child("restore", model, folder / "prompts", n)
            found.restore.setdefault(n, []).append(told["restore"])
            found.first.setdefault(n, []).append(told["first"])
            found.touch.setdefault(n, []).append(machine.first_touch(found.bytes[n]))
    say("computing")
    told = _child("compute", model, folder / "written", _COMPUTED)
    found.computing, found.write = told["computing"], told["write"]
    say("looking up")
    found.look_up = _child("look_up", model, folder / "many")


def tables(found: Result) -> Iterator[Table]:
    """For people."""
    reading = Table(
        *("tokens on flash", "bytes", "at the device's rate", "first touch of the memory", "restore", "times the rate"),
        *("first token", "computing"),
    )
    for n, times in found.restore.items():
        bare, took, first = (
            found.bytes[n] / statistics.median(found.device),
            statistics.median(times),
            statistics.median(found.first[n]),
        )
        ratio = took / bare
        computing = found.computing * n
        reading.add_row(
            *(str(n), f"{found.bytes[n] / 1e9:.2f} GB", f"{bare:.2f} s", f"{statistics.median(found.touch[n]):.2f} s"),
            f"{took:.2f} s ({min(times):.2f} to {max(times):.2f})",
            f"{ratio:.2f} ({'ok' if ratio <= _BELOW else f'over {_BELOW}'})",
            f"{first:.2f} s",
            f"{computing:.0f} s or more, {computing / first:.0f}x ({'ok' if computing / first >= _SOONER else 'less'})",
        )
    if found.restore:
        reading.caption = (
            f"device {statistics.median(found.device) / 1e9:.2f} GB/s; written at {found.write / 1e9:.2f} GB/s"
        )
        yield reading
    looking = Table(f"look-up among {STORED} prompts", "seconds", "")
    for name, seconds in found.look_up.items():
        looking.add_row(name, f"{seconds:.4f}", "ok" if seconds < _LOOK_UP else f"over {_LOOK_UP}")
    if found.look_up:
        yield looking
    turns = Table("first token of turn", *map(str, range(1, TURNS + 1)))
    for how, times in found.turns.items():
        turns.add_row(how, *(f"{seconds:.2f} s" for seconds in times))
        if how in found.cached:
            turns.add_row("  tokens not computed", *map(str, found.cached[how]))
    if found.turns:
        yield turns


def _model(path: Path) -> Path:
    from gguf_tools.synthetic import tiny, write

    model = tiny("llama", "Q8_0")
    shape = replace(model.shape, n_layer=48, n_head=32, n_head_kv=4, head_dim=128, n_ctx_train=32768)
    return write(replace(model, shape=shape), path)[0]


def _fill(path: Path) -> None:
    block = np.random.default_rng(0).bytes(16 << 20)
    with path.open("wb") as file:
        for _ in range(_RATE_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _child(*arguments: object) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=_PATIENCE,
    )
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


# in a process of its own


def _tokens(n: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(3, 500, n)]


def _open(model: str, folder: str, n_ctx: int) -> Any:
    import llama_cpp

    from llama_flash import FlashOffload

    options = FlashOffload(prompt_cache=folder, prompt_cache_size="16GiB", warm_start=False)
    return llama_cpp.Llama(model, n_ctx=n_ctx, n_batch=512, flash_offload=options, verbose=False)


def fill(model: str, folder: str, *sizes: str) -> dict[str, Any]:
    """States of prompts, the longer ones beginning as the shorter ones do not."""
    from llama_flash.native import prompts as native
    from llama_flash.native.prompts import HEAD_BYTES
    from llama_flash.prompts.heads import BLOCK, heads_of, seal

    llm = _open(model, folder, 1024)
    llm.eval(_tokens(1))
    store = llm.flash.prompts
    n_bytes = BLOCK * native._call_take(llm._ctx.ctx, 0, False, (0, 1), 0, 0, None)[0]
    body = bytearray(np.random.default_rng(1).normal(0, 0.05, n_bytes // 2).astype(np.float16).tobytes())
    checked, identity = native.checksum(body), store._identity("")
    for n in map(int, sizes):
        tokens = np.array(_tokens(n, seed=n), np.int32)
        for head in heads_of(identity, store._label, tokens):
            path = Path(folder, f"{head.key.hex()}.cells")
            with path.open("wb") as file:
                path.chmod(0o600)
                file.write(seal(head.packed(), n_bytes, checked) + body)
                file.flush()
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return {"bytes": {n: int(n) // BLOCK * (n_bytes + HEAD_BYTES) for n in sizes}}


def rate(path: str) -> dict[str, Any]:
    from llama_flash.native.calls import probe_reads

    probe = probe_reads(path, 1 << 20, 32, 2.0)
    return {"rate": probe.bytes / probe.ns * 1e9}


def restore(model: str, folder: str, n: str) -> dict[str, Any]:
    size = int(n)
    llm = _open(model, folder, size + 256)
    tokens = [*_tokens(size, seed=size), 5]
    keeper, took = llm.flash.keeper_of(llm), []
    recall = keeper.recall

    def timed(*arguments: Any) -> None:
        began = time.perf_counter()
        recall(*arguments)
        took.append(time.perf_counter() - began)

    keeper.recall = timed
    began = time.perf_counter()
    next(llm.generate(tokens, temp=0.0))
    first = time.perf_counter() - began
    assert llm.flash.prompts.stats.recalled == size, llm.flash.prompts.stats.recalled
    os._exit(_print({"restore": took[0], "first": first}))


def compute(model: str, folder: str, n: str) -> dict[str, Any]:
    llm = _open(model, folder, 2 * int(n))
    llm.eval(_tokens(16))
    llm.reset()
    began = time.perf_counter()
    next(llm.generate([*_tokens(int(n)), 5], temp=0.0))
    computing = (time.perf_counter() - began) / int(n)
    began = time.perf_counter()
    llm.flash.keeper.flush()
    seconds = time.perf_counter() - began
    written = sum(file.stat().st_size for file in Path(folder).iterdir())
    return {"computing": computing, "write": written / seconds}


def look_up(model: str, folder: str) -> dict[str, Any]:
    from llama_flash.prompts.heads import BLOCK, heads_of

    llm = _open(model, folder, 1024)
    store = llm.flash.prompts
    prompts = [np.array(_tokens(80 * BLOCK + 1, seed=seed), np.int32) for seed in range(STORED)]
    for tokens in prompts:
        for head in heads_of(store._identity(""), store._label, tokens):
            Path(folder, f"{head.key.hex()}.cells").touch(0o600)
    times = {}
    for name, tokens in (
        ("there", prompts[STORED // 2]),
        ("not there", np.array(_tokens(80 * BLOCK, seed=-1 % 997777), np.int32)),
    ):
        began = time.perf_counter()
        store.find(tokens, 0)
        times[name] = time.perf_counter() - began
    return times


def _print(told: dict[str, Any]) -> int:
    print(json.dumps(told), flush=True)
    return 0


# a conversation


def _converse(real: Path, folder: Path, found: Result, say: Callable[[str], None]) -> None:
    for how, flags in (
        ("server, nothing kept", []),
        ("server, prompts on flash", ["--prompt-cache-dir", str(folder / "chat")]),
    ):
        messages: list[dict[str, str]] = []
        for turn in range(TURNS):
            say(f"{how}: turn {turn + 1}")
            messages.append({"role": "user", "content": _said(turn)})
            with _server(real, flags) as url:
                first, text, cached = _asked(url, messages)
            messages.append({"role": "assistant", "content": text})
            found.turns.setdefault(how, []).append(first)
            found.cached.setdefault(how, []).append(cached)
    for how in ("none", "disk", "flash"):
        name = {"none": "Llama, nothing kept", "disk": "Llama, LlamaDiskCache", "flash": "Llama, prompts on flash"}[how]
        say(name)
        found.turns[name] = _child("llama", real, folder / how, how)["turns"]


def _said(turn: int) -> str:
    import inspect
    import textwrap

    text = inspect.getdoc([textwrap, json, re, subprocess, signal][turn % 5]) or ""
    return f"Question {turn}: what does this say? {text[:200]}"


@contextmanager
def _server(model: Path, flags: list[str]) -> Iterator[str]:
    command = [
        sys.executable,
        "-m",
        "llama_flash",
        "serve",
        str(model),
        "-c",
        "8192",
        "--parallel",
        "1",
        "--port",
        "0",
        *flags,
    ]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        end = time.monotonic() + _PATIENCE
        while True:
            log.seek(0)
            if address := re.search(r"serving (http://\S+)/v1", text := log.read()):
                break
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server did not start: {text}")
            time.sleep(0.02)
        try:
            yield address[1]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(_PATIENCE)


def _asked(url: str, messages: list[dict[str, str]]) -> tuple[float, str, int]:
    """Seconds to the first token, the answer, and the tokens of the prompt that were not computed."""
    body = {"messages": messages, "max_tokens": 16, "temperature": 0, "stream": True, "timings_per_token": True}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    began, first, text, cached = time.perf_counter(), 0.0, "", 0
    with urllib.request.urlopen(request, timeout=_PATIENCE) as answer:
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            said = json.loads(line[6:])
            cached = said.get("timings", {}).get("cache_n", cached)
            for choice in said.get("choices", ()):
                if piece := choice["delta"].get("content"):
                    first = first or time.perf_counter() - began
                    text += piece
    return first, text, cached


def llama(model: str, folder: str, how: str) -> dict[str, Any]:
    """The same with a Llama that is made anew before each turn."""
    import llama_cpp

    messages: list[dict[str, str]] = []
    turns = []
    for turn in range(TURNS):
        options: Any = {"prompt_cache": folder} if how == "flash" else True
        llm = llama_cpp.Llama(model, n_ctx=8192, flash_offload=options, verbose=False)
        if how == "disk":
            llm.set_cache(llama_cpp.LlamaDiskCache(folder))
        messages.append({"role": "user", "content": _said(turn)})
        began, first, text = time.perf_counter(), 0.0, ""
        for chunk in llm.create_chat_completion(messages, max_tokens=16, temperature=0.0, stream=True):
            if piece := chunk["choices"][0]["delta"].get("content"):
                first = first or time.perf_counter() - began
                text += piece
        messages.append({"role": "assistant", "content": text})
        turns.append(first)
        llm.close()
    return {"turns": turns}


if __name__ == "__main__":
    sys.exit(
        _print({f.__name__: f for f in (fill, rate, restore, compute, look_up, llama)}[sys.argv[1]](*sys.argv[2:]))
    )

"""Workers below memory limits of their own, and reads that fail there."""

from __future__ import annotations

import contextlib
import ctypes
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from caps import require_caps
from fault_shim import compiled
from workers import MOE, WorkerProcess, least_budget, logits_of, open_model, workers_of

from gguf_tools.synthetic import PRESETS, write
from llama_flash import FlashBudgetError, FlashReadError, FlashWorkerError
from llama_flash.budget.cgroup import memory_groups
from llama_flash.native import remote
from llama_flash.workers.client import Workers

EIO, HANG = 1, 6  # as in faults.c
CAP = "200MiB"
SENDS_MORE = "calls are of few tokens, and sends more"


@pytest.fixture(scope="module")
def large_model(model_folder: Path) -> Iterator[Path]:
    (path,) = write(PRESETS["moe-400m"], model_folder / "moe-400m.gguf")
    try:
        yield path
    finally:
        path.unlink()


class CappedWorker:
    """A worker below a memory cgroup of its own. Page cache counts there, too."""

    def __init__(self, model: Path, folder: Path, cap: str) -> None:
        self.log = folder / f"capped-{time.monotonic_ns()}.log"
        worker = [sys.executable, "-m", "llama_flash", "worker", str(model), "--listen", "127.0.0.1:0"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "llama_flash", "cap", cap, "--", *worker], stdout=log, stderr=log
            )
        self.endpoint = ""

    def wait_until_ready(self) -> None:
        end = time.monotonic() + 400
        while not (ready := re.search(rb" at (127\.0\.0\.1:\d+), ", self.log.read_bytes())):
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)
        self.endpoint = ready[1].decode()

    def process_id(self) -> int:
        """Of the worker."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return int(children.split()[0])

    def end(self) -> str:
        """What the cap reports."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(200)
        return self.log.read_text()


def test_what_only_prompts_need_is_lent_to_slots_while_tokens_are_generated(large_model: Path, tmp_path: Path) -> None:
    with workers_of(large_model, tmp_path, 1, budget="260MiB") as workers:
        with contextlib.closing(open_model(large_model, flash=False)) as llm:
            alone = _bits(llm, list(range(5, 405)), [7, 8, 9])
        with contextlib.closing(open_model(large_model, workers)) as llm:

            def told() -> dict[str, Any]:
                stats: dict[str, Any] = llm.flash.worker_stats()[0]
                assert stats["held"] <= stats["budget"]
                return stats

            llm.eval(list(range(5, 405)))
            prompt, most = told()["flash"], 0
            end = time.monotonic() + 400
            while most <= prompt + (4 << 20) and time.monotonic() < end:
                llm.reset()
                llm.eval([7])
                most = max(most, told()["flash"])
            assert most > prompt + (4 << 20)
            assert np.array_equal(_bits(llm, list(range(5, 405)), [7, 8, 9]), alone)
            llm.eval(list(range(5, 69)))  # a prompt takes it back before it begins
            assert told()["flash"] <= prompt + (1 << 20)
        assert SENDS_MORE not in workers[0].said()


def _in_kib(status: Path, name: str) -> int:
    return int(status.read_text().partition(f"{name}:")[2].split()[0])


def test_a_client_that_says_few_and_sends_many_gets_no_more_memory_than_the_budget(
    large_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was lent is given back before it is touched."""
    prompt = list(range(5, 405))
    with contextlib.closing(open_model(large_model, flash=False)) as llm:
        alone = _bits(llm, prompt, [7])
    with (
        workers_of(large_model, tmp_path, 1, budget="260MiB") as (worker,),
        contextlib.closing(open_model(large_model, [worker])) as llm,
    ):
        llm.eval(prompt)
        honest = llm.flash.worker_stats()[0]["flash"]
        told = Workers._tell_whether_few
        monkeypatch.setattr(Workers, "_tell_whether_few", lambda self, few: told(self, True))
        most, end = 0, time.monotonic() + 120
        while most <= honest + (4 << 20) and time.monotonic() < end:
            llm.reset()
            llm.eval([7])
            most = max(most, llm.flash.worker_stats()[0]["flash"])
        assert most > honest + (4 << 20), "nothing was lent"
        guest = Path(f"/proc/{worker.guest()}")
        (guest / "clear_refs").write_text("5")  # the peak is counted anew
        llm.reset()
        llm.eval(prompt)
        peak = _in_kib(guest / "status", "VmHWM") + _in_kib(Path(f"/proc/{worker.process.pid}/status"), "VmRSS")
        assert peak <= 260 << 10
        assert SENDS_MORE in worker.said()
        assert llm.flash.worker_stats()[0]["flash"] <= honest + (1 << 20)
        monkeypatch.setattr(Workers, "_tell_whether_few", told)
        assert np.array_equal(_bits(llm, prompt, [7]), alone)


def test_a_client_that_asks_for_further_buffers_gets_no_more_memory_than_the_budget(
    large_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What slots have of it is given back before the buffer is written to."""
    import llama_cpp

    libraries = Path(llama_cpp.__file__).parent / "lib"
    engine = ctypes.CDLL(str(libraries / "libggml-base.so"))
    engine.ggml_backend_buft_alloc_buffer.restype = ctypes.c_void_p
    engine.ggml_backend_buft_alloc_buffer.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    engine.ggml_backend_buffer_clear.argtypes = [ctypes.c_void_p, ctypes.c_uint8]
    engine.ggml_backend_buffer_free.argtypes = [ctypes.c_void_p]
    devices: list[int] = []
    connect = remote.connect

    def noted(endpoint: str, connection: socket.socket) -> int:
        devices.append(connect(endpoint, connection))
        return devices[-1]

    monkeypatch.setattr(remote, "connect", noted)
    with (
        workers_of(large_model, tmp_path, 1, budget="260MiB") as (worker,),
        contextlib.closing(open_model(large_model, [worker])) as llm,
    ):
        before = logits_of(llm)
        llm.eval(list(range(5, 405)))  # slots are filled
        given = llm.flash.worker_stats()[0]["flash"]
        guest = Path(f"/proc/{worker.guest()}")
        (guest / "clear_refs").write_text("5")  # the peak is counted anew
        buffer = engine.ggml_backend_buft_alloc_buffer(remote.buffer_type_of(devices[0]), 40 << 20)
        assert buffer
        engine.ggml_backend_buffer_clear(buffer, 1)
        assert remote.settle(worker.endpoint)
        peak = _in_kib(guest / "status", "VmHWM") + _in_kib(Path(f"/proc/{worker.process.pid}/status"), "VmRSS")
        assert peak <= 260 << 10
        assert "has asked for further buffers" in worker.said()
        assert llm.flash.worker_stats()[0]["flash"] < given - (30 << 20)
        assert np.array_equal(logits_of(llm), before)
        engine.ggml_backend_buffer_free(buffer)


def test_two_workers_in_cgroups_of_their_own_run_what_neither_could_hold(large_model: Path, tmp_path: Path) -> None:
    require_caps()
    capped = [CappedWorker(large_model, tmp_path, CAP) for _ in range(2)]
    try:
        for worker in capped:
            worker.wait_until_ready()
        assert large_model.stat().st_size > 2 * (180 << 20)
        prompt, generated = list(range(5, 69)), list(range(100, 124))
        with contextlib.closing(open_model(large_model, flash=False)) as llm:
            alone = _bits(llm, prompt, generated)
        with contextlib.closing(open_model(large_model, [worker.endpoint for worker in capped])) as llm:
            assert np.array_equal(_bits(llm, prompt, generated), alone)
            stats = llm.flash.worker_stats()
        assert all(one["counters"]["bytes_read"] > 0 and one["slots"] > 0 for one in stats)
        assert all(one["held"] <= one["budget"] <= 190 << 20 for one in stats)
    finally:
        reports = [worker.end() for worker in capped]
    for report in reports:
        assert ", 0 OOM kills" in report, report


def _bits(llm: Any, prompt: list[int], generated: list[int]) -> Any:
    llm.reset()
    llm.eval(prompt)
    for token in generated:
        llm.eval([token])
    return np.array(llm.scores[: llm.n_tokens]).view(np.uint32)


def test_the_budget_of_a_worker_moves_while_the_model_runs(tmp_path: Path) -> None:
    with contextlib.closing(open_model(MOE, flash=False)) as llm:
        alone = logits_of(llm)
    with workers_of(MOE, tmp_path) as two, contextlib.closing(open_model(MOE, two, what="all")) as llm:
        before = llm.flash.worker_stats()
        least = 160
        with pytest.raises(FlashBudgetError, match="too small"):
            while least:
                llm.flash.set_worker_budget(two[0].endpoint, f"{least - 2}MiB")
                least -= 2
                assert np.array_equal(logits_of(llm), alone)
        shrunk = llm.flash.worker_stats()
        assert shrunk[0]["budget"] == least << 20 and shrunk[0]["flash"] < before[0]["flash"]
        llm.flash.set_worker_budget(two[0].endpoint, "400MiB")
        assert np.array_equal(logits_of(llm), alone)
        with pytest.raises(FlashWorkerError, match="none of the workers"):
            llm.flash.set_worker_budget("127.0.0.1:1", "400MiB")
        with pytest.raises(FlashWorkerError, match="not a size"):
            llm.flash.set_worker_budget(two[1].endpoint, "nonsense")
        after = llm.flash.worker_stats()
    assert after[0]["budget"] == 400 << 20 and after[1]["budget"] == before[1]["budget"]
    assert after[0]["flash"] > shrunk[0]["flash"]


def test_a_worker_follows_a_limit_that_moves(large_model: Path, tmp_path: Path) -> None:
    """Its cgroup's limit falls while the model runs: slots are given back, and nobody is killed."""
    require_caps()
    capped = CappedWorker(large_model, tmp_path, "300MiB")
    try:
        capped.wait_until_ready()
        with contextlib.closing(open_model(large_model, [capped.endpoint])) as llm:
            _bits(llm, list(range(5, 69)), list(range(100, 140)))
            (before,) = llm.flash.worker_stats()
            group = next(group for group in memory_groups(Path("/"), capped.process_id()) if group.limit == 300 << 20)
            names = ("memory.limit_in_bytes", "memory.max")
            limit = next(group.path / name for name in names if (group.path / name).exists())
            end = time.monotonic() + 400
            for mib in range(290, 199, -10):
                while True:
                    try:
                        limit.write_text(str(mib << 20))
                        break
                    except OSError:  # not given back yet
                        assert time.monotonic() < end
                        time.sleep(0.1)
            _bits(llm, list(range(5, 69)), list(range(100, 140)))
            (after,) = llm.flash.worker_stats()
        assert after["slots"] < before["slots"] and after["held"] < 200 << 20
    finally:
        assert ", 0 OOM kills" in capped.end()


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("shim"))


def test_a_read_that_fails_at_a_worker_is_its_error_and_the_next_call_works(
    shim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.closing(open_model(MOE, flash=False)) as llm:
        alone = logits_of(llm)
    with (
        _disturbed(shim, tmp_path, monkeypatch) as (disturbed, control),
        workers_of(MOE, tmp_path, 1) as others,
    ):
        with contextlib.closing(open_model(MOE, [disturbed, *others], what="experts")) as llm:
            for skip in (0, 1, 5):
                _set(control, EIO, left=1, skip=skip)
                with pytest.raises(FlashReadError, match=re.escape(disturbed.endpoint)) as caught:
                    for prompt in (b"import os", b"class Tree:", b"0123456789", b"def f(x, y):"):
                        logits_of(llm, 8, prompt)
                error = caught.value
                assert error.errno == 5 and error.file == str(MOE) and error.tensor and error.size
                _set(control, 0)
                assert np.array_equal(logits_of(llm), alone)
        _set(control, EIO, left=1, skip=2)
        with pytest.raises(FlashReadError, match=re.escape(disturbed.endpoint)):
            open_model(MOE, [disturbed, *others])
        _set(control, 0)
        with contextlib.closing(open_model(MOE, [disturbed, *others])) as llm:
            assert np.array_equal(logits_of(llm), alone)


@contextlib.contextmanager
def _disturbed(
    shim: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> Iterator[tuple[WorkerProcess, Path]]:
    """A worker whose reads fail as a file says, that file, and a budget with which it reads in each token."""
    control = folder / "faults"
    control.write_bytes(bytes(4096))
    budget = f"{least_budget(MOE, folder) + 1}MiB"
    with monkeypatch.context() as patched:
        patched.setenv("LD_PRELOAD", str(shim))
        patched.setenv("FAULTS", str(control))
        worker = WorkerProcess(MOE, folder, "--io-engine", "pread", *arguments, budget=budget)
    try:
        yield worker, control
    finally:
        worker.end()


def test_a_drive_that_does_not_answer_ends_the_call_with_the_workers_name(
    shim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a token and within a load; the worker is there for the next client."""
    with contextlib.closing(open_model(MOE, flash=False)) as llm:
        alone = logits_of(llm)
    with (
        _disturbed(shim, tmp_path, monkeypatch, "--read-timeout", "5") as (disturbed, control),
        workers_of(MOE, tmp_path, 1) as others,
    ):
        both = [*others, disturbed]
        for skip in (0, 3):
            with contextlib.closing(open_model(MOE, both, what="experts")) as llm:
                assert np.array_equal(logits_of(llm), alone)
                _set(control, HANG, left=1 << 30, skip=skip)
                with pytest.raises(FlashWorkerError) as caught:
                    for prompt in (b"import os", b"class Tree:", b"0123456789", b"def f(x, y):"):
                        logits_of(llm, 8, prompt)
            _assert_says_which_read(caught.value, disturbed)
            _set(control, 0)
        _set(control, HANG, left=1 << 30, skip=2)
        with pytest.raises(FlashWorkerError) as caught:
            open_model(MOE, both)
        _assert_says_which_read(caught.value, disturbed)
        _set(control, 0)
        with contextlib.closing(open_model(MOE, both)) as llm:
            assert np.array_equal(logits_of(llm), alone)
        assert disturbed.said().count("the client is given up") == 3


def _assert_says_which_read(error: FlashWorkerError, worker: WorkerProcess) -> None:
    assert error.host == worker.endpoint
    assert re.search(rf"a read of {re.escape(str(MOE))} at offset \d+ \(\d+ bytes\) has not ended for", str(error)), (
        error
    )


def _set(control: Path, what: int, left: int = 0, skip: int = 0) -> None:
    with control.open("r+b") as file:
        file.write(struct.pack("<iii", what, left, skip))

"""Workers that die, hang, are cut off or have another file: an error that names them, and the next load works."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from repository import SUPPORT
from rich.console import Console
from workers import MOE, Proxy, WorkerProcess, least_budget, logits_of, open_model, workers_of

from llama_flash import FlashBudgetError, FlashOffload, FlashReadError, FlashWorkerError
from llama_flash.cli.plan_view import print_divided
from llama_flash.model.shape import ContextShape
from llama_flash.workers import client
from llama_flash.workers.planned import plan_workers

Bits = Any


@pytest.fixture(scope="module")
def stock() -> Bits:
    with contextlib.closing(open_model(MOE, flash=False)) as llm:
        return logits_of(llm)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[WorkerProcess]]:
    with workers_of(MOE, tmp_path_factory.mktemp("workers")) as workers:
        yield workers


@pytest.fixture(scope="module")
def little(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A budget with which workers read in each token."""
    return f"{least_budget(MOE, tmp_path_factory.mktemp('least')) + 1}MiB"


@pytest.fixture
def own(tmp_path: Path, little: str) -> Iterator[tuple[Path, list[WorkerProcess]]]:
    """Two workers with a file of their own, which the test may damage: the client has another copy."""
    path = tmp_path / "model.gguf"
    shutil.copy(MOE, path)
    with workers_of(path, tmp_path, budget=little) as workers:
        yield path, workers


def generate_until(llm: Any, happens: type[Exception], most: int = 400) -> Exception:
    """Tokens, until that error."""
    with pytest.raises(happens) as caught:
        for i in range(most):
            if i % 400 == 0:
                llm.reset()
                llm.eval([1, 2, 3])
            llm.eval([5 + i % 100])
    return caught.value


def assert_works(llm: Any, stock: Bits) -> None:
    assert np.array_equal(logits_of(llm), stock)


def test_a_killed_process_of_a_client_is_an_error_and_the_next_load_works(
    two: list[WorkerProcess], stock: Bits
) -> None:
    with contextlib.closing(open_model(MOE, two, what="all")) as llm:
        assert_works(llm, stock)
        os.kill(two[1].guest(), signal.SIGKILL)
        error = generate_until(llm, FlashWorkerError)
        assert error.host == two[1].endpoint and "has to be loaded again" in str(error)
        for _ in range(3):
            with pytest.raises(FlashWorkerError, match="is lost"):
                llm.eval([1])
    assert all(worker.process.poll() is None for worker in two)
    with contextlib.closing(open_model(MOE, two, what="all")) as llm:
        assert_works(llm, stock)


def test_a_killed_worker_is_an_error_and_one_that_is_started_again_works(
    own: tuple[Path, list[WorkerProcess]], stock: Bits, tmp_path: Path
) -> None:
    path, workers = own
    with contextlib.closing(open_model(MOE, workers)) as llm:
        guest = workers[0].guest()
        workers[0].end(signal.SIGKILL)
        os.kill(guest, signal.SIGKILL)
        assert generate_until(llm, FlashWorkerError).host == workers[0].endpoint
    with pytest.raises(FlashWorkerError, match="cannot be reached"):
        open_model(MOE, workers)
    workers[0] = WorkerProcess(path, tmp_path, port=workers[0].port)
    try:
        with contextlib.closing(open_model(MOE, workers)) as llm:
            assert_works(llm, stock)
    finally:
        workers[0].end()


def test_a_worker_that_is_killed_while_a_token_is_computed(two: list[WorkerProcess], stock: Bits) -> None:
    for _ in range(3):
        with contextlib.closing(open_model(MOE, two, what="all")) as llm:
            guest = two[0].guest()
            threading.Timer(0.3, os.kill, (guest, signal.SIGKILL)).start()
            assert generate_until(llm, FlashWorkerError, most=5000).host == two[0].endpoint
    with contextlib.closing(open_model(MOE, two)) as llm:
        assert_works(llm, stock)


def test_a_frozen_worker_is_given_up_in_time_and_is_free_for_the_next(two: list[WorkerProcess], stock: Bits) -> None:
    with contextlib.closing(open_model(MOE, two, worker_timeout=2.5)) as llm:
        assert_works(llm, stock)
        guest = two[0].guest()
        os.kill(guest, signal.SIGSTOP)
        error = generate_until(llm, FlashWorkerError)
        assert error.host == two[0].endpoint and "did not answer in time" in str(error)
    # frozen as it is
    with contextlib.closing(open_model(MOE, two)) as llm:
        assert_works(llm, stock)
        assert two[0].guest() != guest


def test_a_worker_hears_from_its_client_while_another_takes_long_to_answer(two: list[WorkerProcess]) -> None:
    proxy = Proxy(two[1].endpoint)
    try:
        with contextlib.closing(open_model(MOE, [two[0], proxy.endpoint], worker_timeout=60.0)) as llm:
            llm.eval([1])
            guest = two[0].guest()
            os.kill(guest, signal.SIGSTOP)
            try:
                time.sleep(1.5)  # it is being asked for a sign of life
                before, end = sum(proxy.up), time.monotonic() + 50
                while sum(proxy.up) == before:
                    assert time.monotonic() < end, "a worker that hears nothing for two minutes ends"
                    time.sleep(0.05)
            finally:
                os.kill(guest, signal.SIGCONT)
            llm.eval([2])
    finally:
        proxy.close()


def test_a_worker_that_computes_for_long_is_not_given_up(two: list[WorkerProcess]) -> None:
    def is_waited_for() -> bool:
        """Unless the machine kept a sign of life back."""
        proxy = Proxy(two[0].endpoint)
        with (
            contextlib.closing(proxy),
            contextlib.suppress(FlashWorkerError),
            contextlib.closing(open_model(MOE, [proxy.endpoint, two[1]], worker_timeout=0.5)) as llm,
        ):
            llm.eval([1, 2, 3])
            proxy.data_held.clear()
            threading.Timer(2.5, proxy.data_held.set).start()
            llm.eval([4])
            assert proxy.data_held.is_set()
            return True
        return False

    assert any(is_waited_for() for _ in range(5))


def test_a_connection_that_is_cut_within_a_message(two: list[WorkerProcess], stock: Bits) -> None:
    for after in (0, 1, 777, 5_000, 20_000):
        proxy = Proxy(two[1].endpoint)
        try:
            with contextlib.closing(open_model(MOE, [two[0], proxy.endpoint])) as llm:
                llm.eval([1, 2, 3])
                proxy.cut_after = after
                assert generate_until(llm, FlashWorkerError).host == proxy.endpoint
        finally:
            proxy.close()
    with contextlib.closing(open_model(MOE, two)) as llm:
        assert_works(llm, stock)


def test_a_connection_that_is_cut_during_the_load(two: list[WorkerProcess], stock: Bits) -> None:
    for after in (10, 3_000, 7_000, 15_000, 60_000):
        proxy = Proxy(two[0].endpoint)
        proxy.cut_after = after
        try:
            with pytest.raises(FlashWorkerError), contextlib.closing(open_model(MOE, [proxy.endpoint, two[1]])) as llm:
                generate_until(llm, FlashWorkerError)  # more than a load sends
                raise FlashWorkerError("as it should")
        finally:
            proxy.close()
    with contextlib.closing(open_model(MOE, two)) as llm:
        assert_works(llm, stock)


def test_a_network_that_holds_everything_back(two: list[WorkerProcess]) -> None:
    proxy = Proxy(two[0].endpoint)
    try:
        with contextlib.closing(open_model(MOE, [proxy.endpoint, two[1]], worker_timeout=2.5)) as llm:
            llm.eval([1, 2, 3])
            proxy.held.clear()
            error = generate_until(llm, FlashWorkerError)
            assert "did not answer in time" in str(error)
    finally:
        proxy.close()


def _touched(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")


def _truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 3)


@pytest.mark.parametrize("damage", [_touched, _truncated])
def test_a_worker_whose_file_changes_says_so_before_a_result_is_used(
    own: tuple[Path, list[WorkerProcess]], damage: Callable[[Path], None], stock: Bits
) -> None:
    path, workers = own
    with contextlib.closing(open_model(MOE, workers, what="experts")) as llm:
        damage(path)
        error = generate_until(llm, FlashReadError)
        assert any(worker.endpoint in str(error) for worker in workers)
        assert error.file == str(path)
    shutil.copy(MOE, path)
    with contextlib.closing(open_model(MOE, workers, what="experts")) as llm:
        assert_works(llm, stock)


def test_a_second_client_is_told_that_the_worker_is_busy(two: list[WorkerProcess], stock: Bits) -> None:
    with contextlib.closing(open_model(MOE, two)) as llm:
        with pytest.raises(FlashWorkerError, match="busy"):
            open_model(MOE, two)
        assert_works(llm, stock)
    with contextlib.closing(open_model(MOE, two)) as llm:
        assert_works(llm, stock)


def test_a_worker_with_another_file_is_refused(model_file: Any, two: list[WorkerProcess], tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    shutil.copy(MOE, other)
    with other.open("r+b") as file:  # one letter of a key
        head = file.read(4096)
        file.seek(head.index(b"general.architecture") + 28)
        file.write(b"~")
    with pytest.raises(FlashWorkerError, match="a model of"):
        open_model(model_file("llama"), two)
    longer = tmp_path / "longer.gguf"
    longer.write_bytes(MOE.read_bytes() + b"\0")
    with pytest.raises(FlashWorkerError, match="copy the client's file to the worker"):
        open_model(longer, two)


def test_another_cpu_is_allowed_and_named(
    two: list[WorkerProcess],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = client.identity_of
    monkeypatch.setattr(client, "identity_of", lambda meta: {**real(meta), "cpu": "avx2 other"})
    said = rf"worker {two[0].endpoint} has a CPU with .*, this one avx2 other: answers are not promised"
    with contextlib.closing(open_model(MOE, two)) as llm:
        llm.eval([1, 2, 3])
        assert all("this one avx2 other" in stats["other_cpu"] for stats in llm.flash.worker_stats())
    assert re.search(said, caplog.text)
    options = FlashOffload(workers=[worker.endpoint for worker in two])
    print_divided(Console(soft_wrap=True), plan_workers(MOE, options, ContextShape(n_ctx=512)))
    assert f"{two[1].endpoint} has a CPU with" in capsys.readouterr().out


def test_another_build_is_refused(two: list[WorkerProcess], monkeypatch: pytest.MonkeyPatch) -> None:
    real = client.identity_of
    for name, said in (("build", "install the same wheel"), ("head", "another head")):
        with monkeypatch.context() as patched:
            patched.setattr(client, "identity_of", lambda meta, name=name: {**real(meta), name: "other"})
            with pytest.raises(FlashWorkerError, match=said):
                open_model(MOE, two)


def test_without_the_token_nothing_is_served(tmp_path: Path, stock: Bits) -> None:
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    right.write_text("a long secret\n")
    wrong.write_text("another one\n")
    right.chmod(0o600)
    wrong.chmod(0o600)
    with workers_of(MOE, tmp_path, 1, "--token-file", str(right)) as workers:
        for bad in (None, wrong):
            with pytest.raises(FlashWorkerError, match="not the token"):
                open_model(MOE, workers, worker_token_file=bad)
        assert "serves" not in workers[0].said()
        with contextlib.closing(open_model(MOE, workers, worker_token_file=right)) as llm:
            assert_works(llm, stock)


def test_a_worker_with_too_little_memory_is_named(tmp_path: Path) -> None:
    with (
        workers_of(MOE, tmp_path, 1, budget="64MiB") as workers,
        pytest.raises((FlashWorkerError, FlashBudgetError), match=workers[0].endpoint),
    ):
        open_model(MOE, workers)


def test_a_forked_child_that_ends_disturbs_nobody(two: list[WorkerProcess], tmp_path: Path) -> None:
    """Whether it closes the model or just ends: it does not hang, and its parent goes on."""
    script = tmp_path / "forks.py"
    script.write_text(
        f"""
import os, sys
sys.path.insert(0, {str(SUPPORT)!r})
from workers import MOE, logits_of, open_model

llm = open_model(MOE, {[worker.endpoint for worker in two]!r})
before = logits_of(llm)
for closes in (True, False):
    pid = os.fork()
    if pid == 0:
        if closes:
            llm.close()
        sys.exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    assert (logits_of(llm) == before).all()
print("went on")
"""
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0 and "went on" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("frozen", [False, True])
def test_a_client_that_ends_without_closing_does_not_hang(
    two: list[WorkerProcess], tmp_path: Path, frozen: bool
) -> None:
    script = tmp_path / "ends.py"
    script.write_text(
        f"""
import os, signal, sys, threading
sys.path.insert(0, {str(SUPPORT)!r})
from workers import MOE, logits_of, open_model

llm = open_model(MOE, {[worker.endpoint for worker in two]!r})
logits_of(llm)
print("ready", flush=True)
sys.stdin.readline()
if {frozen}:
    threading.Thread(target=llm.eval, args=([1, 2, 3],), daemon=True).start()
"""
    )
    with subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout and process.stdout.readline() == b"ready\n"
        if frozen:
            os.kill(two[0].guest(), signal.SIGSTOP)
        process.stdin.close()
        assert process.wait(400) == 0
    with contextlib.closing(open_model(MOE, two)) as llm:
        llm.eval([1])


def test_a_state_is_saved_as_a_whole_or_not_at_all(two: list[WorkerProcess], stock: Bits) -> None:
    with contextlib.closing(open_model(MOE, two)) as llm:
        assert_works(llm, stock)
        state = llm.save_state()
        llm.eval([7])
        expected = np.array(llm.scores[llm.n_tokens - 1])
        llm.reset()
        llm.eval([1, 2, 3])
        llm.load_state(state)
        llm.eval([7])
        assert np.array_equal(np.array(llm.scores[llm.n_tokens - 1]), expected)
        os.kill(two[1].guest(), signal.SIGKILL)
        with pytest.raises(FlashWorkerError):
            llm.save_state()
        with pytest.raises(FlashWorkerError):
            llm.load_state(state)


def test_a_forked_child_cannot_use_the_workers(two: list[WorkerProcess], stock: Bits) -> None:
    with contextlib.closing(open_model(MOE, two)) as llm:
        pid = os.fork()
        if pid == 0:
            try:
                llm.eval([1])
            except Exception as error:
                os._exit(7 if "fork" in str(error) else 8)
            os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        assert_works(llm, stock)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_worker_ends_cleanly_also_with_a_client(number: int, code: int, tmp_path: Path) -> None:
    for with_client in (False, True):
        with workers_of(MOE, tmp_path, 1) as (worker,), contextlib.ExitStack() as stack:
            if with_client:
                stack.enter_context(contextlib.closing(open_model(MOE, [worker])))
                guest = worker.guest()
            assert worker.end(number) == code
            if with_client:
                assert not Path(f"/proc/{guest}").exists()
            assert "Traceback" not in worker.said()

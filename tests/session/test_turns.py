"""Several threads at one Llama: they take turns, whole generations at a time. Each claim in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import functools
import gc
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

SHIPPED = Path(str(resources.files("llama_flash") / "models" / "stdlib-moe-q8_0.gguf"))
PROMPTS = ("def read(path):\n", "import os\n", "class Point:\n", "for i in range(", "try:\n", "x = [")
N_TOKENS = 12

Scenario = Callable[[Any], None]
_SCENARIOS: dict[str, Scenario] = {}


def claim(scenario: Scenario) -> Scenario:
    _SCENARIOS[scenario.__name__] = scenario
    return scenario


def load(flash: object = True, **settings: Any) -> Any:
    import llama_cpp

    options = {"n_ctx": 256, "n_batch": 64, "n_ubatch": 64, "n_threads": 1, "verbose": False}
    return llama_cpp.Llama(str(SHIPPED), flash_offload=flash, **{**options, **settings})


def ask(llm: Any, number: int, **settings: Any) -> Any:
    return llm.create_completion(PROMPTS[number % 6], max_tokens=N_TOKENS, temperature=0.8, seed=number, **settings)


def text(llm: Any, number: int) -> str:
    return str(ask(llm, number)["choices"][0]["text"])


def joined(stream: Iterator[Any]) -> str:
    return "".join(piece["choices"][0]["text"] for piece in stream)


def slowly(stream: Iterator[Any]) -> Iterator[Any]:
    for piece in stream:
        time.sleep(0.01)
        yield piece


def in_threads(work: Callable[[int], Any], n: int) -> list[Any]:
    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(work, range(n)))


def begun(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """A thread, and what it will have as an answer."""
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(work()), daemon=True)
    thread.start()
    return thread, answers


def waits(work: Callable[[], Any], llm: Any = None) -> tuple[threading.Thread, list[Any]]:
    """The same of one that is waiting for its turn; llm: is looked at until it is."""
    n = len(llm._turn._waiters) if llm is not None else 0
    thread, answers = begun(work)
    thread.join(0.05)
    while llm is not None and len(llm._turn._waiters) == n and thread.is_alive():
        time.sleep(0.001)
    assert not answers and thread.is_alive()
    return thread, answers


def done(thread: threading.Thread, answers: list[Any]) -> Any:
    thread.join(200)
    assert not thread.is_alive(), "it waits for ever"
    (answer,) = answers
    return answer


@claim
def answers_of_many_threads_are_those_of_one_after_the_other(llm: Any) -> None:
    expected = [text(llm, i) for i in range(12)]
    assert len(set(expected)) > 6
    assert in_threads(functools.partial(text, llm), 12) == expected
    streamed = in_threads(lambda i: joined(ask(llm, i, stream=True)), 12)
    assert streamed == expected


@claim
def a_thread_that_asks_again_at_once_does_not_share_the_turn_of_who_was_waiting(llm: Any) -> None:
    expected = [text(llm, i) for i in range(6)]
    stop, others = threading.Event(), []

    def repeat() -> None:
        while not stop.is_set():
            others.append(text(llm, 5))

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        assert [text(llm, i) for i in range(5)] == expected[:5]
        assert [joined(slowly(ask(llm, i, stream=True))) for i in range(5)] == expected[:5]
    finally:
        stop.set()
        thread.join(60)
    assert set(others) == {expected[5]}


@claim
def without_flash_offload_threads_take_turns_too(llm: Any) -> None:
    answers_of_many_threads_are_those_of_one_after_the_other(load(flash=False))


@claim
def a_stream_may_be_read_in_other_threads_than_it_was_begun_in(llm: Any) -> None:
    expected = [text(llm, i) for i in range(4)]
    streams = [ask(llm, i, stream=True) for i in range(4)]
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as two:
        for number, stream in enumerate(streams):
            pieces = []
            while (piece := (one, two)[len(pieces) % 2].submit(next, stream, None).result()) is not None:
                pieces.append(piece)
            assert joined(iter(pieces)) == expected[number]


@claim
def streams_of_an_event_loop_do_not_meet_in_the_threads_of_its_pool(llm: Any) -> None:
    expected = [text(llm, i) for i in range(6)]

    async def read(number: int, copied: bool) -> str:
        stream, pieces = ask(llm, number, stream=True), []
        while True:
            step = functools.partial(next, stream, None)
            run = functools.partial(copy_context().run, step) if copied else step
            if (piece := await asyncio.get_running_loop().run_in_executor(None, run)) is None:
                return joined(iter(pieces))
            pieces.append(piece)

    async def all_of_them(copied: bool) -> list[str]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(8))
        return await asyncio.gather(*(read(number, copied) for number in range(6)))

    assert asyncio.run(all_of_them(copied=False)) == expected
    assert asyncio.run(all_of_them(copied=True)) == expected


@claim
def another_job_in_the_thread_of_a_pool_in_which_a_stream_was_read_waits(llm: Any) -> None:
    expected = [text(llm, i) for i in range(2)]
    for copied in (False, True):  # asyncio and web frameworks give each job a copy of its request's context
        with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as two:

            def submit(pool: ThreadPoolExecutor, work: Callable[[], Any], copied: bool = copied) -> Any:
                return pool.submit(copy_context().run, work) if copied else pool.submit(work)

            stream = ask(llm, 0, stream=True)
            pieces = [submit(one, functools.partial(next, stream)).result()]
            other = submit(one, lambda: text(llm, 1))
            pieces += submit(two, functools.partial(list, slowly(stream))).result()
            assert (joined(iter(pieces)), other.result(60)) == (expected[0], expected[1])


@claim
def who_waits_for_a_stream_that_nobody_reads_is_told_so_and_the_stream_goes_on(llm: Any) -> None:
    from llama_flash import FlashError
    from llama_flash.session import turns

    expected = text(llm, 0)
    turns._LONGEST_REST = 0.3
    stream = ask(llm, 0, stream=True)
    pieces = [next(stream)]
    waiting = [begun(lambda: failure(lambda: text(llm, 1))) for _ in range(2)]
    for one in waiting:
        error = done(*one)
        assert isinstance(error, FlashError) and "close()" in str(error), repr(error)
    turns._LONGEST_REST = 60.0
    assert joined(iter([*pieces, *stream])) == expected
    assert done_in_thread(llm) == text(llm, 1)


@claim
def streams_in_worker_threads_of_a_web_framework_do_not_meet(llm: Any) -> None:
    from starlette.concurrency import iterate_in_threadpool

    expected = [text(llm, i) for i in range(6)]

    async def read(number: int) -> str:
        return joined(iter([piece async for piece in iterate_in_threadpool(ask(llm, number, stream=True))]))

    async def all_of_them() -> list[str]:
        return await asyncio.gather(*map(read, range(6)))

    assert asyncio.run(all_of_them()) == expected


@claim
def a_stream_that_is_closed_gives_up_its_turn(llm: Any) -> None:
    expected = text(llm, 1)
    stream = ask(llm, 0, stream=True)
    next(stream)
    waiting = waits(lambda: text(llm, 1))
    stream.close()
    assert done(*waiting) == expected


@claim
def a_stream_that_is_dropped_gives_up_its_turn(llm: Any) -> None:
    expected = text(llm, 1)
    stream = ask(llm, 0, stream=True)
    next(stream)
    waiting = waits(lambda: text(llm, 1))
    del stream
    assert done(*waiting) == expected


@claim
def a_stream_that_only_garbage_refers_to_gives_up_its_turn(llm: Any) -> None:
    expected = text(llm, 1)
    gc.collect()
    gc.disable()
    stream = ask(llm, 0, stream=True)
    next(stream)
    ring: list[Any] = [stream]
    ring.append(ring)
    del stream, ring
    assert done(*waits(lambda: text(llm, 1))) == expected


@claim
def a_stream_that_failed_gives_up_its_turn(llm: Any) -> None:
    expected = text(llm, 1)

    def stop(*_: object) -> bool:
        raise LookupError

    with contextlib.suppress(LookupError):
        list(ask(llm, 0, stream=True, stopping_criteria=stop))
    assert done_in_thread(llm) == expected


def done_in_thread(llm: Any) -> str:
    answers: list[str] = []
    thread = threading.Thread(target=lambda: answers.append(text(llm, 1)), daemon=True)
    thread.start()
    return str(done(thread, answers))


@claim
def a_thread_does_not_wait_for_its_own_stream(llm: Any) -> None:
    def work() -> None:
        for _ in ask(llm, 0, stream=True):
            llm.tokenize(b"x")
            llm.save_state()
        stream = ask(llm, 0, stream=True)
        next(stream)
        assert text(llm, 1) == expected
        for first, second in zip(ask(llm, 2, stream=True), ask(llm, 3, stream=True), strict=False):
            assert first and second
        del stream

    expected = text(llm, 1)
    work()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result(60)
        pool.submit(copy_context().run, work).result(60)
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()


@claim
def the_longest_waiting_comes_first(llm: Any) -> None:
    order: list[int] = []
    stream = ask(llm, 0, stream=True)
    next(stream)
    waiting = [waits(lambda i=i: (text(llm, i), order.append(i)), llm) for i in range(1, 6)]
    stream.close()
    for thread, _ in waiting:
        thread.join(200)
    assert order == [1, 2, 3, 4, 5]


@claim
def whatever_uses_the_context_waits(llm: Any) -> None:
    llm.reset()
    llm.eval(llm.tokenize(b"import os"))
    state = llm.save_state()
    expected = joined(ask(llm, 0, stream=True))
    stream = ask(llm, 0, stream=True)
    pieces = [next(stream)]
    calls: list[Callable[[], Any]] = [
        lambda: llm.eval([1, 2, 3]),
        llm.reset,
        llm.save_state,
        lambda: llm.load_state(state),
        lambda: llm.set_seed(3),
        lambda: next(llm.generate([1, 2, 3])),
        lambda: llm.create_chat_completion([{"role": "user", "content": "x"}], max_tokens=2),
    ]
    waiting = [waits(call) for call in calls]
    assert llm.detokenize(llm.tokenize(b"import os")) and llm.flash.stats() and llm.n_ctx(), "these need no turn"
    pieces += stream
    assert joined(iter(pieces)) == expected
    for one in waiting:
        done(*one)


@claim
def what_a_chat_handler_puts_into_the_context_is_there_when_its_stream_is_read(llm: Any) -> None:
    def handler(*, llama: Any, stream: bool, **_: Any) -> Any:
        llama.reset()
        llama.eval(llama.tokenize(b"def read(path):"))
        return llama.create_completion(llama.input_ids[: llama.n_tokens].tolist(), max_tokens=4, stream=stream)

    expected = text(llm, 1)
    llm.chat_handler = handler
    question = [{"role": "user", "content": "x"}]
    assert llm.create_chat_completion(question)["choices"]
    stream = llm.create_chat_completion(question, stream=True)
    waiting = waits(lambda: text(llm, 1))
    assert joined(stream)
    assert done(*waiting) == expected
    stream = llm.create_chat_completion(question, stream=True)
    waiting = waits(lambda: text(llm, 1))
    del stream
    assert done(*waiting) == expected


@claim
def closing_waits_for_what_is_computed_and_refuses_what_would_follow(llm: Any) -> None:
    from llama_flash import FlashError

    computing, go_on = threading.Event(), threading.Event()

    def pause() -> None:
        computing.set()
        go_on.wait(30)

    expected = text(llm, 0)
    llm.flash.on_call(pause)
    go_on.set()
    stream = ask(llm, 1, stream=True)
    next(stream)
    del stream
    go_on.clear()
    computing.clear()
    answers: list[Any] = []
    whole = threading.Thread(target=lambda: answers.append(text(llm, 0)), daemon=True)
    whole.start()
    computing.wait(30)
    closing = waits(llm.close)
    go_on.set()
    assert done(whole, answers) == expected
    done(*closing)
    for error in (failure(lambda: text(llm, 2)), failure(llm.reset)):
        assert isinstance(error, FlashError) and "closed" in str(error), repr(error)
    llm.close()


@claim
def a_stream_that_rests_does_not_keep_a_model_from_being_closed(llm: Any) -> None:
    from llama_flash import FlashError

    stream = ask(llm, 0, stream=True)
    next(stream)
    waiting = waits(lambda: failure(lambda: text(llm, 1)))
    thread = threading.Thread(target=llm.close, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    for error in (done(*waiting), failure(lambda: next(stream))):
        assert isinstance(error, FlashError) and "closed" in str(error), repr(error)
    assert next(stream, None) is None


@claim
def a_model_and_its_stream_may_be_garbage_together(llm: Any) -> None:
    for _ in range(3):
        other = load()
        stream = ask(other, 0, stream=True)
        next(stream)
        other.mine = stream
        del other, stream
        gc.collect()
    assert text(llm, 0)


@claim
def a_forked_child_ends_while_its_parent_generates(llm: Any) -> None:
    stream = ask(llm, 0, stream=True)
    in_other = threading.Thread(target=next, args=(stream,))
    in_other.start()
    in_other.join()
    child = os.fork()
    if child == 0:
        llm.close()
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert joined(stream)


def failure(work: Callable[[], Any]) -> BaseException | None:
    try:
        work()
    except Exception as error:
        return error
    return None


@claim
def embeddings_of_many_threads_are_those_of_one_after_the_other(llm: Any) -> None:
    embedding = load(embedding=True)
    expected = [embedding.embed(prompt) for prompt in PROMPTS]
    assert in_threads(lambda i: embedding.embed(PROMPTS[i]), 6) == expected


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """Of all claims, tried in one process one after the other; a crash or a hang is of the one after the last told."""
    try:
        result = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=1200)
        output, end = result.stdout, f"exit code {result.returncode}\n{result.stderr[-3000:]}"
    except subprocess.TimeoutExpired as error:
        output, end = (error.stdout or b"").decode(), "it hangs"
    told = dict(json.loads(line) for line in output.splitlines() if line.startswith('["'))
    for name in _SCENARIOS:
        told.setdefault(name, end)
    return told


@pytest.mark.parametrize("name", _SCENARIOS)
def test_threads_take_turns(name: str, outcomes: dict[str, str]) -> None:
    assert outcomes[name] == "kept", outcomes[name]


def _try_all() -> None:
    for name, scenario in _SCENARIOS.items():
        faulthandler.dump_traceback_later(400, exit=True)
        try:
            scenario(load())
            outcome = "kept"
        except BaseException:
            outcome = traceback.format_exc()
        print(json.dumps([name, outcome]), flush=True)
    os._exit(0)  # whatever threads a broken claim has left


if __name__ == "__main__":
    _try_all()

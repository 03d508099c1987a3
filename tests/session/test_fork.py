"""A child of a process that has loaded a model: each call returns, with an error, and the parent notices nothing."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import llama_cpp
import pytest
from background import meanwhile
from conftest import ModelFile
from engines import LEAST, Model, assert_same_logits, logits_of, open_flash, tokens
from repository import ROOT

from llama_flash import FlashError
from llama_flash.native import bindings
from llama_flash.native.library import library

PROMPT, DECODED = tokens(60, seed=1), tokens(8, seed=2)
N = len(PROMPT) + len(DECODED)
TIMEOUT = 400.0  # seconds, by which a hang is told from a slow machine
FORKS = 20 if "LLAMA_FLASH_SANITIZE" in os.environ else 100  # of each model

HEADER = ROOT / "plugin/include/llama_flash.h"


def in_child(work: Callable[[], object]) -> None:
    """Runs `work` in a forked child, and raises here what it raises there."""
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os.write(tell, traceback.format_exc().encode()[-4000:])
            os._exit(1)
        os._exit(0)
    os.close(tell)
    end = time.monotonic() + TIMEOUT
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(told)
            pytest.fail("the child hangs")
        time.sleep(0.001)
    said = os.read(told, 4000).decode()
    os.close(told)
    assert os.waitstatus_to_exitcode(ended[1]) == 0, said


def calls_of(llm: Any) -> dict[str, Callable[[], tuple[int, str]]]:
    """Each call of the C interface that takes a session: what it returns, and what it says. free comes last."""
    lib, handle = library(), llm.flash.native.address
    ids = (ctypes.c_uint64 * 8)()
    number = ctypes.c_uint64()

    def call(name: str, *arguments: Any, error: bool = True) -> Callable[[], tuple[int, str]]:
        def run() -> tuple[int, str]:
            said = bindings.llama_flash_error()
            code = getattr(lib, f"llama_flash_{name}")(handle, *arguments, *([said] if error else []))
            return code or 0, said.message.decode()

        return run

    bundle, params = bindings.llama_flash_bundle(), bindings.llama_flash_neuron_params(n_ubatch=16)
    path = os.fsencode(llm.model_path)
    return {
        "session_bind_begin": call("session_bind_begin"),
        "session_bind_end": call("session_bind_end"),
        "session_add_bundle": call("session_add_bundle", bundle),
        "session_add_rows": call("session_add_rows", b"w", True),
        "session_add_router": call("session_add_router", b"w", (ctypes.c_float * 1)(), None, 1, 1),
        "session_bind_weight": call("session_bind_weight", b"w", path, 0, 0, 32, 1, 1),
        "session_set_neurons": call("session_set_neurons", params),
        "session_requirements": call("session_requirements", bindings.llama_flash_requirements(), error=False),
        "session_divide": call("session_divide", 1 << 30, bindings.llama_flash_memory()),
        "session_set_memory": call("session_set_memory", 1 << 30),
        "session_resize": call("session_resize", 1 << 30, True, bindings.llama_flash_resize()),
        "session_few_tokens": call("session_few_tokens", True),
        "session_memory": call("session_memory", bindings.llama_flash_memory(), error=False),
        "session_hot": call("session_hot", ids, 8, error=False),
        "session_warm": call("session_warm", ids, 8, number),
        "session_trace": call("session_trace", 100),
        "session_trace_take": call(
            "session_trace_take", (bindings.llama_flash_trace_entry * 8)(), 8, number, error=False
        ),
        "session_trace_tensor": call("session_trace_tensor", 0, bindings.llama_flash_trace_tensor(), error=False),
        "session_tensors": call("session_tensors", (bindings.llama_flash_tensor * 8)(), 8, error=False),
        "session_residency": call("session_residency", None, None, 144),
        "session_reuse": call("session_reuse", (ctypes.c_uint64 * 256)()),
        "abort": call("abort", error=False),
        "session_take_error": call("session_take_error"),
        "session_waiting": call("session_waiting"),
        "session_stats": call("session_stats", bindings.llama_flash_stats(), error=False),
        "session_free": call("session_free", error=False),
    }


def test_every_call_with_a_session_is_among_those_tried_here(model_file: ModelFile) -> None:
    declared = re.findall(
        r"llama_flash_(\w+)\((?:const )?(?:struct llama_flash_session \*|void \* data)", HEADER.read_text()
    )
    with open_flash(model_file("qwen3moe", "Q4_0")) as llm:
        # a worker is made by the process that has made its session a moment before
        assert sorted(calls_of(llm)) == sorted(set(declared) - {"worker_new"})


@pytest.mark.sanitize
@pytest.mark.parametrize("form", ["qwen3moe", "llama"])
def test_a_forked_child_is_refused_by_every_call(form: str, model_file: ModelFile) -> None:
    numbers = {"session_hot", "session_trace_take", "session_tensors", "session_waiting", "session_free"}
    silent = {"session_requirements", "session_memory", "session_trace_tensor", "session_stats"}
    with open_flash(model_file(form, "Q4_0"), share=LEAST) as llm:
        expected = logits_of(llm, PROMPT, DECODED)  # so that there is a pool of threads
        calls = calls_of(llm)
        token = (llama_cpp.llama_token * 1)(1)
        # of a context of its own: that of llm is computing
        context = llama_cpp.llama_init_from_model(llm._model.model, llm.context_params)
        assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(token, 1)) == 0

        def child() -> None:
            with pytest.raises(FlashError, match="fork"):
                llm.eval([1])  # while another thread of the parent has its turn
            assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(token, 1)) == 2, "not aborted"
            for name, call in calls.items():
                code, said = call()
                if name in numbers:
                    assert code == 0, name
                elif name == "abort":
                    assert code, "llama_decode would go on"
                else:
                    assert code == bindings.llama_flash_code.LLAMA_FLASH_E_INVALID, (name, code)
                    assert "fork" in said or name in silent, (name, said)

        def decode() -> None:
            assert_same_logits(logits_of(llm, PROMPT, DECODED), expected, N)

        with meanwhile(decode):
            for _ in range(FORKS):
                in_child(child)
        decode()
        assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(token, 1)) == 0
        llama_cpp.llama_free(context)


def test_a_forked_child_gets_an_error_or_the_last_numbers(model_file: ModelFile) -> None:
    """Of a model whose memory follows limits: there is a thread that moves it."""
    options = {"what": "experts", "dram_budget": "1GiB"}
    with Model(
        str(model_file("qwen3moe", "Q4_0")), n_ctx=640, logits_all=True, verbose=False, flash_offload=options
    ) as llm:
        expected = logits_of(llm, PROMPT, DECODED)
        seen = llm.flash.stats()
        assert seen.total.tokens == N

        def child() -> None:
            assert llm.flash.stats().prompt.tokens > 0
            for ask in (
                lambda: llm.eval([1]),
                lambda: llm("one", max_tokens=1),
                lambda: llm.flash.set_budget("auto"),
                llm.flash.residency,
                llm.flash.reuse,
                llm.flash.snapshot,
            ):
                with pytest.raises(FlashError, match="fork"):
                    ask()
            n_open = len(os.listdir("/proc/self/fd"))
            llm.flash.close()
            llm.close()
            assert len(os.listdir("/proc/self/fd")) < n_open
            assert llm.flash.stats().prompt.tokens > 0

        def disturb() -> None:
            llm.flash.set_budget("900MiB")
            llm.flash.set_budget("1GiB")
            llm.flash.residency()

        with meanwhile(disturb):
            for _ in range(20):
                in_child(child)
        assert_same_logits(logits_of(llm, PROMPT, DECODED), expected, N)


def test_a_model_that_a_child_loads_itself_works(model_file: ModelFile) -> None:
    """The engine's threads, with which the parent has computed, are not there in the child."""
    path = model_file("qwen3moe", "Q4_0")
    with open_flash(path, share=LEAST) as llm:
        expected = logits_of(llm, PROMPT, DECODED)

        def child() -> None:
            with open_flash(path, share=LEAST) as own:
                assert_same_logits(logits_of(own, PROMPT, DECODED), expected, N)
                assert own.flash.stats().total.tokens == N

        for _ in range(3):
            in_child(child)
            assert_same_logits(logits_of(llm, PROMPT, DECODED), expected, N)


@pytest.mark.parametrize(
    "call",
    [lambda llm: llm.eval([1]), lambda llm: llm.reset(), lambda llm: llm.sample(), lambda llm: next(llm.generate([1]))],
    ids=["eval", "reset", "sample", "generate"],
)
def test_a_child_is_refused_before_the_engine_is_asked(call: Callable[[Any], object], model_file: ModelFile) -> None:
    """What another thread of the parent was changing, cells of the KV cache above all, is half changed in the child."""
    with open_flash(model_file("llama", "Q4_0"), share=LEAST) as llm:
        llm.eval([1, 2])

        def child() -> None:
            llm._ctx = llm._model = None  # whoever asks one of them fails
            with pytest.raises(FlashError, match="fork"):
                call(llm)

        in_child(child)


def test_a_stock_model_goes_on_in_a_child(model_file: ModelFile) -> None:
    """It starts threads of its own, and waits for none of its parent's, also where those were computing."""
    with Model(str(model_file("llama", "Q4_0")), n_ctx=128, logits_all=True, verbose=False, n_threads=3) as llm:
        expected = logits_of(llm, PROMPT, DECODED)
        other = llama_cpp.llama_init_from_model(llm._model.model, llm.context_params)
        text = (llama_cpp.llama_token * 4)(1, 2, 3, 4)
        batch = llama_cpp.llama_batch_get_one(text, 4)
        assert llama_cpp.llama_decode(other, batch) == 0

        def child() -> None:
            assert llama_cpp.llama_decode(other, batch) == 0
            llama_cpp.llama_free(other)

        def decode() -> None:
            assert_same_logits(logits_of(llm, PROMPT, DECODED), expected, N)

        with meanwhile(decode):
            for _ in range(20):
                in_child(child)
        decode()
        llama_cpp.llama_free(other)


def test_a_child_loads_a_model_while_a_thread_of_its_parent_loads_one(model_file: ModelFile) -> None:
    """None of the locks of a load stays taken in it."""
    path = str(model_file("llama", "Q4_0"))

    def load() -> None:
        with Model(path, n_ctx=32, verbose=False, flash_offload={"what": "ffn"}) as llm:
            llm.eval([1])

    with meanwhile(load):
        for _ in range(20):
            in_child(load)


def test_a_child_may_exit_as_any_process(model_file: ModelFile) -> None:
    """Through the interpreter's end, with the model still there."""
    program = """
import os, sys, llama_cpp
llm = llama_cpp.Llama(sys.argv[1], n_ctx=64, verbose=False, flash_offload={"what": "ffn", "dram_budget": "1GiB"})
llm.eval([1, 2, 3])
children = []
for _ in range(5):
    child = os.fork()
    if child == 0:
        sys.exit(0)
    children.append(child)
for child in children:
    assert os.waitpid(child, 0)[1] == 0
llm.eval([1, 2, 3])
"""
    command = [sys.executable, "-c", program, str(model_file("llama", "Q4_0"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

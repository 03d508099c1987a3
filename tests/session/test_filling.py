"""Filling up: whatever a hook asks for, the engine computes no more than there is room for, and loses nothing."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import llama_cpp
import pytest

from llama_flash.native import bindings
from llama_flash.native.server import hooks_of
from llama_flash.server.driver import EngineDriver

DENSE = Path(str(resources.files("llama_flash") / "models" / "stdlib-arcee-q8_0.gguf"))
DECODE, N, N_CTX, N_BATCH = 1, 4, 256, 64  # sequences, cells of each, tokens of a call


class _Filling(EngineDriver):
    """Asks for what the test says; notes how many tokens each call has."""

    def __init__(self) -> None:
        super().__init__({"what": "all", "warm_start": False}, lambda session: None)
        self.more: Callable[[Sequence[int]], Sequence[int]] = lambda counts: counts
        self.computed: list[int] = []

    def even(self, context: int, counts: Sequence[int]) -> Sequence[int]:
        return self.more(counts)

    def begin(self, context: int, n_tokens: int, n_sequences: int) -> None:
        self.computed.append(n_tokens)
        super().begin(context, n_tokens, n_sequences)


class _Engine:
    """A context below the hooks, as llama-server has one."""

    def __init__(self, driver: _Filling) -> None:
        self._driver = driver
        lib = self._lib = ctypes.CDLL(str(bindings.library_path().with_name("libllama.so")))
        lib.llama_batch_ext_init.restype = ctypes.c_void_p
        shape = llama_cpp.llama_context_default_params()
        shape.n_ctx, shape.n_batch, shape.n_ubatch = N * N_CTX, N_BATCH, N_BATCH
        shape.n_seq_max = shape.n_outputs_max = N
        shape.n_threads = shape.n_threads_batch = 1
        self._model = driver.load(str(DENSE), llama_cpp.llama_model_default_params(), shape)
        self.context = driver.init(self._model, shape)
        assert self.context, driver.failure
        self.memory = llama_cpp.llama_get_memory(self.context)
        self._hooks = hooks_of(driver)
        self._set(self._hooks)

    def _set(self, hooks: ctypes.Structure) -> None:
        self._lib._Z15llama_set_hooksRK11llama_hooks(ctypes.byref(hooks))  # of llama-ext.h, which has no C names

    def decode(self, *parts: tuple[int, int, int]) -> tuple[int, list[Any]]:
        """parts: sequence, first position, tokens. What the engine returns, and the logits of each part's last one."""
        lib = self._lib
        batch = ctypes.c_void_p(lib.llama_batch_ext_init(ctypes.c_void_p(self.context)))
        last = []
        for sequence, first, n in parts:
            for position in range(first, first + n):
                i = lib.llama_batch_ext_add_token(batch, sequence, 5 + position % 50)
                assert i >= 0 and lib.llama_batch_ext_set_pos(batch, i, ctypes.byref(ctypes.c_int32(position)))
            lib.llama_batch_ext_set_output_logits(batch, i, ctypes.c_bool(True))
            last.append(i)
        code = lib.llama_process(ctypes.c_void_p(self.context), DECODE, batch)
        lib.llama_batch_ext_free(batch)
        n_vocab = 8
        logits = [llama_cpp.llama_get_logits_ith(self.context, i)[:n_vocab] for i in last] if code == 0 else []
        return code, logits

    def ends(self) -> list[int]:
        """The last position of each sequence, -1: it is empty."""
        return [llama_cpp.llama_memory_seq_pos_max(self.memory, sequence) for sequence in range(N)]

    def close(self) -> None:
        self._set(type(self._hooks)())
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self._model)
        self._driver.freed(self._model)


@pytest.fixture
def driver() -> _Filling:
    return _Filling()


@pytest.fixture
def engine(driver: _Filling) -> Iterator[_Engine]:
    engine = _Engine(driver)
    yield engine
    engine.close()


def test_what_is_filled_up_is_forgotten_and_changes_nothing(driver: _Filling, engine: _Engine) -> None:
    plain = [engine.decode((0, 0, 3), (3, 0, 5)), engine.decode((3, 5, 1), (0, 3, 1))]
    assert engine.ends() == [3, -1, -1, 5]
    for sequence in range(N):
        llama_cpp.llama_memory_seq_rm(engine.memory, sequence, -1, -1)
    driver.more = lambda counts: [max(counts)] * N
    driver.computed.clear()
    assert [engine.decode((0, 0, 3), (3, 0, 5)), engine.decode((3, 5, 1), (0, 3, 1))] == plain
    assert driver.computed == [20, 4]
    assert engine.ends() == [3, -1, -1, 5]


def test_no_more_is_computed_than_a_call_has_room_for(driver: _Filling, engine: _Engine) -> None:
    driver.more = lambda counts: [N_BATCH] * N
    code, _ = engine.decode((0, 0, 3), (2, 0, 5))
    assert code == 0
    assert driver.computed == [N_BATCH]
    assert engine.ends() == [2, -1, 4, -1]


def test_nothing_is_computed_beyond_a_context(driver: _Filling, engine: _Engine) -> None:
    for first in range(0, N_CTX, N_BATCH):
        assert engine.decode((1, first, N_BATCH))[0] == 0
    driver.more = lambda counts: [max(counts)] * N
    driver.computed.clear()
    assert engine.decode((0, 0, 3), (2, 0, 3))[0] == 0
    assert driver.computed == [9], "sequence 1 is full"
    assert engine.ends() == [2, N_CTX - 1, 2, -1]


def test_a_batch_that_is_refused_leaves_what_is_there(driver: _Filling, engine: _Engine) -> None:
    assert engine.decode((0, 0, 40), (1, 0, 8))[0] == 0
    driver.more = lambda counts: [max(counts)] * N
    code, _ = engine.decode((0, 10, 2), (1, 8, 4))  # the positions of sequence 0 are taken
    assert code == -1
    assert engine.ends() == [39, 7, -1, -1]

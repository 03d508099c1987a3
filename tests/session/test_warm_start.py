"""What was hot is read first after the next load; nothing depends on it, and nothing is harmed by it."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ModelFile
from engines import assert_same_logits, logits_of, tokens
from llama_cpp import Llama
from neurons import bundled, open_neurons, some_active, with_predictors, write_model

from llama_flash import Controller, FlashOffload
from llama_flash.native.library import library
from llama_flash.planning import hot

PROMPT, DECODED = tokens(60, seed=1), tokens(24, seed=2)
N = len(PROMPT) + len(DECODED)


@pytest.fixture(autouse=True)
def _wanted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLAMA_FLASH_WARM_START", "1")
    monkeypatch.setenv("LLAMA_FLASH_CACHE", str(tmp_path / "cache"))


@pytest.fixture(params=["experts", "neurons"])
def model(request: pytest.FixtureRequest, model_file: ModelFile, model_folder: Path) -> Path:
    if request.param == "experts":
        return model_file("qwen3moe", "Q4_0")
    plain = bundled(write_model(model_folder, "arcee", "F32"))
    return with_predictors(plain, plain.with_name("warm.gguf"), some_active)


def load(path: Path, **options: Any) -> Any:
    predictor = "lowrank" if path.name == "warm.gguf" else "auto"
    flash = FlashOffload(what="experts", predictor=predictor, **options)  # type: ignore[arg-type]
    wanted = os.environ["LLAMA_FLASH_WARM_START"]
    os.environ["LLAMA_FLASH_WARM_START"] = "0"  # not before the memory is as the test wants it
    llm = Llama(str(path), n_ctx=256, n_threads=2, logits_all=True, verbose=False, flash_offload=flash)
    if path.name == "warm.gguf":  # there is room for all: with slots, and not pinned
        needs = llm.flash.native.requirements()
        llm.flash.native.set_memory(int(needs.min_memory + 0.8 * needs.neuron_bytes))
    os.environ["LLAMA_FLASH_WARM_START"] = wanted
    controller = Controller.of_process()
    with controller.locked():  # it may have looked already, and would not look again
        controller._unsettled = True
        controller._call()
    return llm


def slots_used(llm: Any) -> int:
    raw = llm.flash.native.stats()
    return int(raw.slots_used + raw.neuron_slots_used)


def until(condition: Any, seconds: float = 400.0) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def kept(tmp_path: Path) -> Path:
    (found,) = (tmp_path / "cache/hot").iterdir()
    return found


def test_what_was_hot_is_there_before_anybody_asks(model: Path, tmp_path: Path) -> None:
    first = load(model)
    expected = logits_of(first, PROMPT, DECODED)
    used = slots_used(first)
    assert used > 0
    first.close()
    assert kept(tmp_path).stat().st_size > 8 * used
    beside = {path.name for path in model.parent.iterdir()}

    second = load(model)
    room = second.flash.native.memory()  # less than the first had while it decoded
    wanted = min(used, room.n_slots + room.n_neuron_slots)
    assert until(lambda: slots_used(second) >= wanted), f"{slots_used(second)} of {wanted} records are there"
    assert second.flash.stats().total.misses == 0
    asked = second.flash.stats().total.bytes_used
    assert_same_logits(logits_of(second, PROMPT, DECODED), expected, N)
    if model.name != "warm.gguf":  # a prompt passes over neurons in order
        assert second.flash.stats().total.bytes_used == asked, "what was hot had to be read again"
    second.close()
    assert {path.name for path in model.parent.iterdir()} == beside


def test_the_hottest_come_first(model: Path) -> None:
    llm = load(model)
    logits_of(llm, PROMPT, DECODED)
    n = slots_used(llm)
    ids = llm.flash.native.hot()
    assert len(ids) == n == len(set(ids.tolist()))
    few = np.zeros(3, np.uint64)
    pointer = few.ctypes.data_as(ctypes.POINTER(ctypes.c_uint64))
    assert library().llama_flash_session_hot(llm.flash.native.address, pointer, 3) == n
    assert few.tolist() == ids[:3].tolist()
    llm.close()


@pytest.mark.parametrize("harm", ["cut", "flipped", "no json", "nested", "another version", "another model", "empty"])
def test_a_file_that_does_not_fit_is_ignored_with_one_line(
    harm: str, model_file: ModelFile, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = model_file("qwen3moe", "Q4_0")
    first = load(path)
    logits_of(first, PROMPT, DECODED)
    first.close()
    file = kept(tmp_path)
    head, _, data = file.read_bytes().partition(b"\n")
    header = json.loads(head)
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:-5])
    elif harm == "flipped":
        file.write_bytes(head + b"\n" + bytes([data[0] ^ 1]) + data[1:])
    elif harm == "no json":
        file.write_bytes(b"\xff" + file.read_bytes())
    elif harm == "nested":
        file.write_bytes(b"[" * 100_000)
    elif harm == "empty":
        file.write_bytes(b"")
    else:
        header["version" if harm == "another version" else "fingerprint"] = 7
        file.write_bytes(json.dumps(header).encode() + b"\n" + data)
    with caplog.at_level(logging.WARNING, logger="llama_flash"):
        second = load(path)
        assert until(lambda: second.flash.share.memento.hot.left is not None)
    assert len([record for record in caplog.records if "hot weights" in record.message]) == 1
    assert slots_used(second) == 0
    second.close()


def test_ids_that_make_no_sense_are_passed_over(model_file: ModelFile) -> None:
    llm = load(model_file("qwen3moe", "Q4_0"))
    assert until(lambda: llm.flash.share.memento.hot.left is not None)
    Controller.of_process()._unsettled = True
    llm.flash.share.memento.hot.left = np.array([1 << 62, (1 << 63) | 5, 2**64 - 1, 10**6, 0, 0, 3], np.uint64)
    assert until(lambda: len(llm.flash.share.memento.hot.left) == 0)
    assert until(lambda: slots_used(llm) == 2)
    logits_of(llm, PROMPT, DECODED)
    llm.close()


def test_slots_are_left_for_who_asks(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As much read ahead as the fewest slots take, and at once a token that needs other neurons."""
    monkeypatch.setenv("LLAMA_FLASH_WARM_START", "0")  # by hand
    plain = bundled(write_model(model_folder, "arcee", "F32"))
    path = with_predictors(plain, plain.with_name("few.gguf"), some_active)
    ids = np.arange((1 << 63) + 1000, (1 << 63) + 1500, dtype=np.uint64)  # of the last layers
    with open_neurons(path, predictor="lowrank", share=0.0, n_ctx=64) as llm:
        needs = llm.flash.native.requirements()
        for share in (0.0, 0.05):
            for token in DECODED[:4]:
                answers = []
                for warm in (False, True):
                    llm.flash.native.set_memory(int(needs.min_memory + share * needs.neuron_bytes))
                    if warm:
                        assert 0 < llm.flash.native.warm(ids) < len(ids)
                    llm.reset()
                    llm.eval([token])
                    answers.append(np.array(llm.scores[:1], copy=True))
                assert np.isfinite(answers[0]).all() and (answers[0] != 0).any()
                assert (answers[0] == answers[1]).all()


def test_a_folder_that_cannot_be_written_is_no_error(
    model_file: ModelFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLAMA_FLASH_CACHE", str(tmp_path / "file/cache"))
    llm = load(model_file("qwen3moe", "Q4_0"))
    logits_of(llm, PROMPT, DECODED)
    llm.close()
    assert hot.save(Path("x.gguf"), "", np.zeros(1, np.uint64)) is None


def test_switched_off(model_file: ModelFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for option, allowed in ((False, "1"), (True, "0")):
        monkeypatch.setenv("LLAMA_FLASH_WARM_START", allowed)
        llm = load(model_file("qwen3moe", "Q4_0"), warm_start=option)
        logits_of(llm, PROMPT, DECODED)
        llm.close()
        assert not (tmp_path / "cache/hot").exists()

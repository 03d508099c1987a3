"""Memory that moves while the model runs: the same answers, what fits stays cached, what is given back is gone."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ModelFile
from engines import LEAST, MOST, QUARTER, Logits, assert_same_logits, logits_of, open_flash, tokens
from neurons import bundled, open_neurons, some_active, with_predictors, write_model

from gguf_tools.synthetic import tiny, write
from llama_flash.budget.cgroup import process_memory
from llama_flash.native import bindings

PROMPT, DECODED = tokens(60, seed=1), tokens(24, seed=2)
N = len(PROMPT) + len(DECODED)
NEURONS = ("exact", "lowrank", "off", "experts-exact", "experts-off")
FORMS = ("experts", "panels", "both", *NEURONS)

pytestmark = pytest.mark.sanitize


@pytest.fixture(scope="module")
def files(model_file: ModelFile, model_folder: Path) -> dict[str, Path]:
    plain = bundled(write_model(model_folder, "arcee", "F32"))
    predicted = with_predictors(plain, plain.with_name("resized.gguf"), some_active)
    moe = model_file("qwen3moe", "Q4_0")
    return {
        "experts": moe,
        "panels": model_file("llama", "Q4_0"),
        "both": moe,
        "exact": plain,
        "lowrank": predicted,
        "off": plain,
        "experts-exact": bundled(model_file("smallthinker", "F16")),
        "experts-off": bundled(model_file("smallthinker", "F16")),
    }


def open_form(form: str, files: dict[str, Path], share: float) -> Any:
    if form in NEURONS:
        return open_neurons(files[form], predictor=form.removeprefix("experts-"), share=share)
    return open_flash(files[form], what={"experts": "experts", "panels": "ffn", "both": "all"}[form], share=share)


def resize(llm: Any, n_bytes: int, urgent: bool = False) -> Any:
    return llm.flash.native.resize(n_bytes, urgent)


def settle(llm: Any, n_bytes: int) -> Any:
    """Resizes while nothing is computed."""
    end = time.monotonic() + 400
    while not (out := resize(llm, n_bytes)).done:
        assert time.monotonic() < end, f"resizing to {n_bytes} bytes does not end"
    return out


def given(llm: Any) -> Any:
    return llm.flash.native.memory()


def bounds(llm: Any) -> tuple[int, int]:
    needs = llm.flash.native.requirements()
    return needs.min_memory, needs.max_memory


@pytest.fixture(scope="module")
def wide(model_folder: Path) -> Path:
    """Many panels: moving them all takes much longer than an op gives to it."""
    return write(tiny("llama", "Q4_0", n_ff=8192), model_folder / "wide-panels.gguf")[0]


@contextmanager
def resizing(llm: Any, seed: int) -> Iterator[list[int]]:
    """Meanwhile another thread asks for other sizes, now and then before the last one is reached."""
    rng, stop, sizes, failures = random.Random(seed), threading.Event(), [], []
    least, most = bounds(llm)

    def repeat() -> None:
        try:
            while not stop.is_set():
                size = rng.randint(least, most)
                sizes.append(size)
                for _ in range(rng.randint(1, 30)):
                    if resize(llm, size, urgent=rng.random() < 0.3).done:
                        break
                    stop.wait(0.0005)
                stop.wait(rng.random() * 0.01)
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield sizes
    finally:
        stop.set()
        thread.join()
    if failures:
        raise failures[0]


@pytest.mark.parametrize("form", FORMS)
def test_the_answers_stay_while_the_memory_moves(form: str, files: dict[str, Path]) -> None:
    with open_form(form, files, QUARTER) as llm:
        expected = logits_of(llm, PROMPT, DECODED)
    with open_form(form, files, QUARTER) as llm, resizing(llm, seed=len(form)) as sizes:
        times = 0
        while times < 3 or (len(sizes) <= 3 and times < 1000):
            times += 1
            llm.reset()
            assert_same_logits(logits_of(llm, PROMPT, DECODED), expected, N)
    assert len(sizes) > 3


def row_bytes(llm: Any) -> int:
    """Of the only table that rows are read of."""
    tables = [llm.flash.meta.tensors[name] for name in llm.flash.plan.tables]
    return tables[0].size // tables[0].shape[1] if tables else 0


@pytest.mark.parametrize("form", FORMS)
def test_from_all_to_the_least_and_back(form: str, files: dict[str, Path]) -> None:
    with open_form(form, files, MOST) as llm:
        least, most = bounds(llm)
        llm.flash.native.set_memory(most)
        needs = llm.flash.native.requirements()
        n_all = needs.n_experts + needs.n_panels + needs.n_neurons
        expected: Logits = logits_of(llm, PROMPT, DECODED)
        for size in (least, (least + most) // 2, most, least, most):
            out = settle(llm, size)
            memory = given(llm)
            used = memory.slots + memory.pinned + memory.stream + memory.bookkeeping + memory.resident
            assert out.total == max(out.least, size) == memory.total
            assert used <= memory.total
            if memory.n_slots + memory.n_pinned + memory.n_neuron_slots + memory.n_neurons_pinned < n_all:
                assert used > 0.9 * memory.total - (4 << 20), "memory that nobody uses"
            llm.reset()
            assert_same_logits(logits_of(llm, PROMPT, DECODED), expected, N)
            if size == most:  # all that was read once is there; prompts pass by in order where neurons are in slots
                logits_of(llm, PROMPT, DECODED)
                before = llm.flash.stats()
                logits_of(llm, PROMPT, DECODED)
                after = llm.flash.stats()
                rows = after.decode.rows_read - before.decode.rows_read  # of tables, which are read and not kept
                assert (rows > 0) == bool(llm.flash.plan.tables)
                assert after.decode.bytes_used - before.decode.bytes_used == rows * row_bytes(llm)
                rows = after.total.rows_read - before.total.rows_read
                assert form in NEURONS or after.total.bytes_used - before.total.bytes_used == rows * row_bytes(llm)


def parts(memory: Any) -> dict[str, int]:
    return {name: getattr(memory, name) for name, _ in memory._fields_}


@pytest.mark.parametrize("form", FORMS)
def test_a_size_is_divided_one_way(form: str, files: dict[str, Path]) -> None:
    """By a plan, a load, and a resize that comes back to it."""
    with open_form(form, files, MOST) as llm:
        least, most = bounds(llm)
        for share in (0.1, 0.35, 0.5, 0.8):
            size = least + int(share * (most - least))
            planned = llm.flash.native.divide(size)
            llm.flash.native.set_memory(size)
            expected = parts(given(llm))
            assert parts(planned) == expected
            for other in (0.6, 1.3):
                settle(llm, int(other * size))
            settle(llm, size)
            # all neurons are pinned by a load only, where the mode has slots
            assert parts(given(llm)) == expected or (form != "off" and expected["n_neurons_pinned"])


def test_what_fits_stays_cached(files: dict[str, Path]) -> None:
    """Half of the slots go: what the cache would have kept is not read again."""
    with open_form("experts", files, MOST) as llm:
        llm.flash.native.set_memory(bounds(llm)[1])
        logits_of(llm, PROMPT, DECODED)
        memory = given(llm)
        cached = llm.flash.native.stats().slots_used
        keep = memory.n_slots // 2
        assert cached > keep
        settle(llm, resize(llm, memory.total).least + memory.slots // 2)
        assert abs(int(llm.flash.native.stats().slots_used) - keep) <= 3
        read = llm.flash.stats().total.bytes_read
        settle(llm, memory.total)
        assert llm.flash.stats().total.bytes_read == read, "growing reads nothing"
        assert abs(int(llm.flash.native.stats().slots_used) - keep) <= 3


def test_given_back_is_gone(model_folder: Path) -> None:
    path = bundled(write(tiny("arcee", "F32", n_ff=16384), model_folder / "wide.gguf")[0])
    with open_neurons(path, predictor="exact", share=1.2) as llm:
        least, _ = bounds(llm)
        logits_of(llm, PROMPT, DECODED)
        before, used = process_memory().anonymous, llm.flash.stats().slots_in_use
        settle(llm, least)
        gone = before - process_memory().anonymous
        freed = used - llm.flash.stats().slots_in_use
        assert freed > 16 << 20
        assert gone > freed - (6 << 20), f"{freed} bytes of slots were given up, {gone} bytes of memory"


def begin_growing(llm: Any, least: int, most: int) -> None:
    """Ops come while the resize is under way: one call does not finish it, unless the machine slept in between."""
    for _ in range(20):
        settle(llm, least)
        llm.reset()
        llm.eval([1])
        if not resize(llm, most).done:
            return
    raise AssertionError("growing takes no time")


def test_panels_while_growing_is_overtaken_by_shrinking(wide: Path) -> None:
    with open_flash(wide, what="ffn", share=LEAST, n_ubatch=64) as llm:
        least, most = bounds(llm)
        expected = logits_of(llm, PROMPT, DECODED)
        for n, share in ((1, 0.0), (2, 0.02), (3, 0.05)):
            begin_growing(llm, least, most)
            for token in range(n):
                llm.eval([token])
            resize(llm, int(least + share * (most - least)), urgent=True)
            llm.reset()
            assert_same_logits(logits_of(llm, PROMPT, DECODED), expected, N)


def test_panels_are_read_ahead_after_growing_while_decoding(wide: Path) -> None:
    with open_flash(wide, what="ffn", share=LEAST, n_ubatch=64) as llm:
        least, most = bounds(llm)
        size = (least + most) // 2
        begin_growing(llm, least, size)
        llm.eval([1])
        settle(llm, size)
        assert 0 < given(llm).n_pinned < llm.flash.native.requirements().n_panels
        read = [llm.flash.stats().total.bytes_used]
        for token in (2, 3, 4, 5):
            llm.eval([token])
            read.append(llm.flash.stats().total.bytes_used)
        of_a_token = read[-1] - read[-2]
        ahead = read[-1] - read[0] - 4 * of_a_token
        assert ahead > 0, "nothing is read before the next token asks for it"


def test_a_panel_more_or_less_leaves_the_others_in_their_order(wide: Path) -> None:
    """The next token finds the first panels in the ring or reads them again; it reads ahead as before in both cases."""
    with open_flash(wide, what="ffn", share=LEAST, n_ubatch=64) as llm:
        least, most = bounds(llm)
        needs = llm.flash.native.requirements()
        panel, size = needs.panel_bytes // needs.n_panels, (least + most) // 2
        settle(llm, size)
        for token in range(3):
            llm.eval([token])
        again = []
        for step in (-1, -1, -1, -1, 1, 1):
            before, size = given(llm).n_pinned, size + step * panel
            settle(llm, size)
            assert (given(llm).n_pinned - before) * step > 0
            read = [llm.flash.stats().total.bytes_used]
            for token in range(4):
                llm.eval([token])
                read.append(llm.flash.stats().total.bytes_used)
            first, *others = np.diff(read)
            assert len(set(others)) == 1, "the order was learnt again: nothing was read ahead meanwhile"
            again.append(int(first - others[0]))
        assert 0 in again[:4], "what is in the ring stays, unless the panel comes before it"


@pytest.mark.parametrize("form", ["exact", "lowrank", "experts-exact", "experts-off"])
def test_decoding_goes_on_when_pinned_neurons_leave(form: str, files: dict[str, Path]) -> None:
    with open_form(form, files, QUARTER) as llm:
        least, most = bounds(llm)
        expected = logits_of(llm, PROMPT, DECODED)
        for urgent in (False, True):
            llm.flash.native.set_memory(most)
            assert given(llm).n_neurons_pinned > 0
            llm.reset()
            llm.eval(PROMPT)
            resize(llm, least, urgent)
            for token in DECODED:
                llm.eval([token])
            assert_same_logits(np.array(llm.scores[:N]), expected, N)


@pytest.mark.parametrize("form", ["panels", "off", "both"])
def test_never_more_than_given(form: str, files: dict[str, Path]) -> None:
    """Also with rings that are larger than they would be with all there is."""
    with open_form(form, files, MOST) as llm:
        least, most = bounds(llm)
        for k in (20, 19, 18, 15, 11, 7, 3, 1, 2, 5, 10, 13, 16, 17, 20):
            out = settle(llm, least + (most - least) * k // 20)
            memory = given(llm)
            used = memory.slots + memory.pinned + memory.stream + memory.bookkeeping + memory.resident
            assert used <= memory.total == out.total


def bytes_in_homes() -> int:
    """Of this process, in mappings that are never given huge pages: homes, and little else (rings and heap are not).

    The stacks of threads are left out: newer kernels give them no huge pages either."""
    total = resident = 0
    guard, is_stack = "", False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *values = line.split()
        if not key.endswith(":"):  # the head of a mapping
            begin, end = key.split("-")
            is_stack = begin == guard
            guard = end if values[0] == "---p" else ""
        elif key == "Rss:":
            resident = int(values[0]) * 1024
        elif key == "VmFlags:" and "nh" in values and not is_stack:
            total += resident
    return total


@pytest.mark.weighs
def test_memory_of_pinned_panels_is_counted(model_folder: Path) -> None:
    """To the page: what is pinned is less than the homes' addresses, which would be given huge pages."""
    path = write(tiny("llama", "Q4_0", n_ff=32768), model_folder / "homes.gguf")[0]
    before, slack = bytes_in_homes(), 64 << 10
    with open_flash(path, what="ffn", share=LEAST, n_ubatch=64) as llm:
        needs = llm.flash.native.requirements()
        least = given(llm).total
        logits_of(llm, PROMPT, DECODED[:3])
        assert bytes_in_homes() - before <= given(llm).pinned + slack
        settle(llm, least + needs.panel_bytes // 10)
        logits_of(llm, PROMPT, DECODED[:3])
        pinned = given(llm).pinned
        assert pinned > 1 << 20
        assert abs(bytes_in_homes() - before - pinned) <= slack
        settle(llm, least)
        assert bytes_in_homes() - before <= given(llm).pinned + slack


def test_before_there_is_memory(model_file: ModelFile) -> None:
    library = bindings.load()
    session = library.llama_flash_session_new(None, None)
    error, out = bindings.llama_flash_error(), bindings.llama_flash_resize()
    assert library.llama_flash_session_resize(session, 1 << 30, False, out, error) == 1
    assert b"set_memory" in error.message
    assert library.llama_flash_session_resize(None, 1 << 30, False, out, error) == 1
    library.llama_flash_session_free(session)

"""What the plugin tells of its records, where they are and when they were last used, is what has happened."""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from background import meanwhile
from conftest import ModelFile
from engines import LEAST, QUARTER, assert_same_logits, logits_of, open_flash, tokens
from neurons import bundled, open_neurons, some_active, with_predictors, write_model

from gguf_tools.routing import trace_routing
from llama_flash import FlashError
from llama_flash.native import bindings
from llama_flash.native.library import library
from llama_flash.observe.residency import NEVER, Place, Residency

IN_FILE, IN_SLOT, PINNED = Place.LLAMA_FLASH_IN_FILE, Place.LLAMA_FLASH_IN_SLOT, Place.LLAMA_FLASH_PINNED
EVERYTHING = 1.5  # of the experts' bytes: a slot takes whole sectors


def by_expert(found: Residency, values: Any, layer: int, part: str) -> list[int]:
    (tensor,) = (t for t in found.tensors if t.layer == layer and f"ffn_{part}_exps" in t.name)
    assert tensor.kind == "experts"
    return [int(value) for value in values[found.of(tensor)]]


def test_the_experts_that_were_used_are_there_and_their_ages_are_those_of_the_routing(model_file: ModelFile) -> None:
    path, text = model_file("qwen3moe", "Q4_0"), tokens(6, seed=5)
    trace = trace_routing(path, text, n_batch=1)  # [token, layer, experts used]
    n_layers, n_used = trace.shape[1:]
    with open_flash(path, share=EVERYTHING, lookahead=False) as llm:
        assert (llm.flash.residency().age == NEVER).all()
        for token in text:
            llm.eval([token])
        found = llm.flash.residency()
        reuse = llm.flash.reuse()

    uses: Counter[int] = Counter()  # by distance to the use before, 0: none
    for layer in range(n_layers):
        last: dict[int, int] = {}
        for t, experts in enumerate(trace[:, layer].tolist()):
            uses.update(t - last[e] if e in last else 0 for e in experts)
            last |= dict.fromkeys(experts, t)
        ages = [len(text) - 1 - last[e] if e in last else NEVER for e in range(16)]
        assert NEVER in ages and 0 in ages and len(set(ages)) > 3
        for part in ("gate", "up", "down"):
            assert by_expert(found, found.age, layer, part) == ages
            places = by_expert(found, found.place, layer, part)
            assert places == [IN_FILE if age == NEVER else IN_SLOT for age in ages]
    assert {d: int(n) for d, n in enumerate(reuse) if n} == {d: 3 * n for d, n in uses.items()}
    assert reuse.sum() == 3 * len(text) * n_layers * n_used


def test_a_token_misses_exactly_what_is_not_there(model_file: ModelFile) -> None:
    path, text = model_file("qwen3moe", "Q4_0"), tokens(10, seed=6)
    trace = trace_routing(path, text, n_batch=1)
    with open_flash(path, share=EVERYTHING, lookahead=False) as llm:
        for token, routed in zip(text, trace.tolist(), strict=True):
            before = llm.flash.residency()
            there = [
                by_expert(before, before.in_dram, il, part) for il in range(len(routed)) for part in ("gate", "up")
            ]
            missing = sum(
                not there[2 * il + p][e] for il, experts in enumerate(routed) for e in experts for p in (0, 1)
            )
            llm.eval([token])
            # down is as up
            assert llm.flash.stats().last.misses == missing + missing // 2


def test_slots_are_counted_alike_when_they_are_few(model_file: ModelFile) -> None:
    # what was read ahead in vain may still be on its way
    with open_flash(model_file("qwen3moe", "Q4_0"), share=QUARTER, lookahead=False) as llm:
        for token in tokens(20, seed=7):
            llm.eval([token])
            found = llm.flash.residency()
            assert (found.place == IN_SLOT).sum() == llm.flash.native.stats().slots_used
        assert 0 < (found.place == IN_SLOT).sum() < len(found.place) / 2
        llm.flash.native.set_memory(llm.flash.native.requirements().max_memory)
        after = llm.flash.residency()
        assert (after.place == IN_FILE).all() and (after.age == NEVER).all()


def test_panels_are_pinned_or_pass_by_and_all_are_used(model_file: ModelFile) -> None:
    with open_flash(model_file("llama", "Q4_0"), share=0.5) as llm:
        given = llm.flash.native.memory()
        found = llm.flash.residency()
        assert {t.kind for t in found.tensors} == {"panels"} and (found.age == NEVER).all()
        assert 0 < (found.place == PINNED).sum() == given.n_pinned < len(found.place)
        llm.eval(tokens(30, seed=1))
        llm.eval([1])
        assert (llm.flash.residency().age == 0).all()


@pytest.fixture(scope="module")
def bundles(model_folder: Path) -> Path:
    return bundled(write_model(model_folder, "arcee", "F32"))


@pytest.mark.parametrize("predictor", ["exact", "lowrank"])
def test_the_neurons_of_the_last_token_have_no_age(predictor: str, bundles: Path) -> None:
    path = bundles
    if predictor == "lowrank":
        path = with_predictors(bundles, bundles.with_name("residency.gguf"), some_active)
    with open_neurons(path, predictor=predictor, share=0.5) as llm:
        llm.eval(tokens(40, seed=1))
        for token in tokens(20, seed=2):
            llm.eval([token])
            found, stats = llm.flash.residency(), llm.flash.stats()
            assert {t.kind for t in found.tensors if "bundle" in t.name} == {"neurons"}
            assert (found.age == 0).sum() == stats.last.neurons_active
            there = found.place >= Place.LLAMA_FLASH_COMING  # what is read ahead has its slot already
            assert there.sum() == llm.flash.native.stats().neuron_slots_used
        reuse, total = llm.flash.reuse(), llm.flash.stats().total
        assert reuse.sum() == total.neurons_active > 0
        assert reuse[1:6].sum() == total.neurons_active - total.neurons_newly_active > 0


def test_neurons_that_all_fit_are_pinned(bundles: Path) -> None:
    with open_neurons(bundles, predictor="exact", share=3.0) as llm:
        llm.eval([1])
        found = llm.flash.residency()
        assert (found.place == PINNED).all()
        assert 0 < (found.age == 0).sum() == llm.flash.stats().last.neurons_active < len(found.age)


def test_numbers_follow_one_another(model_file: ModelFile) -> None:
    with open_flash(model_file("qwen3moe", "Q4_0"), what="all") as llm:
        tensors = llm.flash.residency().tensors
        assert {t.kind for t in tensors} == {"experts", "panels"}
        first = 0
        for tensor in tensors:
            assert (tensor.first, tensor.layer) == (
                first,
                int(tensor.name.split(".")[1]) if "blk" in tensor.name else -1,
            )
            first += tensor.count
        assert sum(t.count for t in tensors if t.kind == "experts") == llm.flash.native.requirements().n_experts
        few = (bindings.llama_flash_tensor * 2)()
        assert library().llama_flash_session_tensors(llm.flash.native.address, few, 2) == len(tensors)
        assert few[1].name.decode() == tensors[1].name


def test_what_cannot_be_told_is_an_error(model_file: ModelFile) -> None:
    lib = bindings.load()
    new = lib.llama_flash_session_new(None, None)
    assert lib.llama_flash_session_tensors(new, None, 0) == 0
    error = bindings.llama_flash_error()
    assert lib.llama_flash_session_residency(new, None, None, 0, ctypes.byref(error)) == 1
    assert b"before set_memory" in error.message
    lib.llama_flash_session_free(new)
    assert lib.llama_flash_session_residency(None, None, None, 0, None) == 1
    assert lib.llama_flash_session_reuse(None, None, None) == 1
    with open_flash(model_file("qwen3moe", "Q4_0"), n_threads=1) as llm:
        with pytest.raises(FlashError, match="of 5 records where there are 144"):
            llm.flash.native.residency(5)
        llm.flash.native.residency(144)
        if (child := os.fork()) == 0:
            said = 0
            for ask in (llm.flash.residency, llm.flash.reuse):
                try:
                    ask()
                except FlashError as failure:
                    said += "child" in str(failure)
            os._exit(said)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert llm.flash.residency() is None
    assert len(llm.flash.reuse()) == 0


@pytest.mark.sanitize
@pytest.mark.parametrize("form", ["qwen3moe", "llama", "arcee"])
def test_it_can_be_asked_while_a_model_decodes(form: str, model_file: ModelFile, bundles: Path) -> None:
    prompt, decoded = tokens(60, seed=1), tokens(8, seed=2)
    opened = (
        open_neurons(bundles, predictor="exact")
        if form == "arcee"
        else open_flash(model_file(form, "Q4_0"), share=LEAST)
    )
    with opened as llm:
        expected = logits_of(llm, prompt, decoded)

        def ask() -> None:
            found = llm.flash.residency()
            given = llm.flash.native.memory()
            assert (found.place == PINNED).sum() == given.n_pinned + given.n_neurons_pinned
            assert (found.place == IN_SLOT).sum() <= given.n_slots + given.n_neuron_slots
            assert np.diff(llm.flash.reuse().astype(np.int64)).any() or form == "llama"

        with meanwhile(ask):
            for _ in range(3):
                assert_same_logits(logits_of(llm, prompt, decoded), expected, 68)

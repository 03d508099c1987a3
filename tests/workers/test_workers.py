"""A model divided among workers gives the bits of one machine, and errors in place of everything else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ModelFile
from workers import DENSE, MOE, WorkerProcess, least_budget, logits_of, open_model, workers_of

Bits = Any


@pytest.fixture(scope="module")
def stock() -> dict[Path, Bits]:
    """By model: bits of the logits of a single machine, without flash."""
    found = {}
    for path in (MOE, DENSE):
        with contextlib.closing(open_model(path, flash=False)) as llm:
            found[path] = logits_of(llm)
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[WorkerProcess]]:
    with workers_of(MOE, tmp_path_factory.mktemp("workers")) as workers:
        yield workers


@pytest.mark.parametrize("what", ["auto", "experts", "ffn", "all"])
def test_a_mixture_over_two_workers_gives_the_bits_of_one_machine(
    two: list[WorkerProcess], stock: dict[Path, Bits], what: str
) -> None:
    with contextlib.closing(open_model(MOE, two, what=what)) as llm:
        assert np.array_equal(logits_of(llm), stock[MOE])
        read = [stats["counters"]["bytes_read"] for stats in llm.flash.worker_stats()]
    assert all(read) if what != "auto" else not any(read)


def test_a_worker_reads_ahead_from_one_of_its_layers_to_the_next(stock: dict[Path, Bits], tmp_path: Path) -> None:
    """With a budget with which it reads in each token."""
    budget = f"{least_budget(MOE, tmp_path, 1, what='experts') + 1}MiB"
    for option in ("--lookahead", "--no-lookahead"):
        with (
            workers_of(MOE, tmp_path, 1, option, "--no-warm-start", budget=budget) as workers,
            contextlib.closing(open_model(MOE, workers, what="experts")) as llm,
        ):
            assert np.array_equal(logits_of(llm), stock[MOE])
            counters = llm.flash.worker_stats()[0]["counters"]
        assert (counters["experts_expected"] > 0) == (option == "--lookahead")


def test_a_dense_model_over_two_workers_gives_the_bits_of_one_machine(stock: dict[Path, Bits], tmp_path: Path) -> None:
    with workers_of(DENSE, tmp_path) as workers, contextlib.closing(open_model(DENSE, workers, what="all")) as llm:
        assert np.array_equal(logits_of(llm), stock[DENSE])
        assert all(stats["pinned"] for stats in llm.flash.worker_stats())


def test_one_worker_and_as_many_as_layers_give_the_same_bits(stock: dict[Path, Bits], tmp_path: Path) -> None:
    for n in (1, 3):
        with workers_of(MOE, tmp_path, n) as workers, contextlib.closing(open_model(MOE, workers, what="all")) as llm:
            assert np.array_equal(logits_of(llm), stock[MOE])


def test_shards_are_found_by_their_number(model_file: ModelFile, tmp_path: Path) -> None:
    path = model_file("llama", "Q4_0", 3)
    with contextlib.closing(open_model(path, flash=False)) as llm:
        alone = _few(llm)
    with workers_of(path, tmp_path) as workers, contextlib.closing(open_model(path, workers, what="all")) as llm:
        assert np.array_equal(_few(llm), alone)


def _few(llm: Any) -> Bits:
    llm.reset()
    llm.eval([1, 2, 3, 4, 5])
    llm.eval([6])
    return np.array(llm.scores[: llm.n_tokens]).view(np.uint32)


@pytest.mark.parametrize("form", ["llama", "qwen3moe", "olmoe"])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "F16"])
def test_other_architectures_give_the_same_bits(model_file: ModelFile, tmp_path: Path, form: str, kind: str) -> None:
    path = model_file(form, kind)
    with contextlib.closing(open_model(path, flash=False)) as llm:
        alone = _few(llm)
    with workers_of(path, tmp_path) as workers, contextlib.closing(open_model(path, workers, what="all")) as llm:
        assert np.array_equal(_few(llm), alone)

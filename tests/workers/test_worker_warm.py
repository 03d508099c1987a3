"""A worker begins with what was used most when its layers were last computed there."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from workers import MOE, logits_of, open_model, workers_of

from llama_flash.native import bindings
from llama_flash.workers.remembered import Numbers


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("LLAMA_FLASH_WARM_START", "1")
    monkeypatch.setenv("LLAMA_FLASH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/hot"


@contextlib.contextmanager
def _model(tmp_path: Path, *arguments: str, n: int = 2) -> Iterator[Any]:
    with workers_of(MOE, tmp_path, n, *arguments) as workers:
        with contextlib.closing(open_model(MOE, workers, what="experts")) as llm:
            yield llm
        for worker in workers:
            worker.wait_until_said(" has left")


def _sums(llm: Any, *names: str) -> list[int]:
    """Of each worker."""
    return [sum(worker["counters"][name] for name in names) for worker in llm.flash.worker_stats()]


def _until_warm(llm: Any) -> list[int]:
    """Bytes that each worker has asked for, once these are no more."""
    end, before = time.monotonic() + 400, [-1, -1]
    while (read := _sums(llm, "bytes_used")) != before or not all(read):
        assert time.monotonic() < end, read
        before = read
        time.sleep(0.3)
    return read


def test_what_was_hot_is_there_before_anybody_asks(cache: Path, tmp_path: Path) -> None:
    with _model(tmp_path) as llm:
        alone = logits_of(llm)
        first = _sums(llm, "misses")
    assert all(first)
    seen = []

    def is_there() -> bool:
        """Unless the device was so slow that reading was taken for ended."""
        with _model(tmp_path) as llm:
            read = _until_warm(llm)
            assert np.array_equal(logits_of(llm), alone)
            again = [now - before for now, before in zip(_sums(llm, "bytes_used"), read, strict=True)]
        seen.append((again, read))
        # while tokens are generated there are more slots than after the load: what was hot may have had no room there
        return all(few < most / 4 for few, most in zip(again, read, strict=True))

    assert any(is_there() for _ in range(4)), seen


def test_what_is_kept_serves_another_division(cache: Path, tmp_path: Path) -> None:
    with _model(tmp_path, n=1) as llm:
        alone = logits_of(llm)
    (kept,) = cache.iterdir()
    size = kept.stat().st_size
    for _ in range(2):
        with _model(tmp_path) as llm:
            assert all(_until_warm(llm))
            assert np.array_equal(logits_of(llm), alone)
        assert kept.stat().st_size == size  # what the one does not have, the other leaves in the list


def test_nothing_is_kept_or_read_where_the_worker_says_no(cache: Path, tmp_path: Path) -> None:
    with _model(tmp_path, "--no-warm-start") as llm:
        logits_of(llm)
    assert not cache.exists() or not os.listdir(cache)


def test_a_worker_that_is_ended_remembers_too(cache: Path, tmp_path: Path) -> None:
    with (
        workers_of(MOE, tmp_path, 1) as workers,
        contextlib.closing(open_model(MOE, workers, what="experts")) as llm,
    ):
        llm.eval([1, 2, 3])
        workers[0].end()
    assert len(list(cache.iterdir())) == 1


def _tensor(name: str, kind: int, first: int, n: int, layer: int) -> bindings.llama_flash_tensor:
    return bindings.llama_flash_tensor(
        name=name.encode(), layer=layer, kind=kind, first_record=first, n_records=n, record_bytes=1
    )


def test_numbers_of_records_mean_the_same_in_every_division() -> None:
    kinds, names = bindings.llama_flash_kind, ["embedding", *"abcd"]
    neuron = 1 << 63

    def session(*parts: tuple[str, int, int], bundles: tuple[tuple[int, int], ...] = ()) -> Numbers:
        """parts: name, first, records; bundles: layer, neurons."""
        tensors = [_tensor(name, kinds.LLAMA_FLASH_EXPERTS, first, n, 0) for name, first, n in parts]
        first = sum(n for _, _, n in parts)
        for layer, n in bundles:
            tensors.append(_tensor(f"blk.{layer}.ffn_bundle", kinds.LLAMA_FLASH_NEURONS, first, n, layer))
            first += n
        return Numbers(tensors, names)

    whole = session(("a", 0, 8), ("b", 8, 8), ("c", 16, 4), bundles=((0, 10), (1, 10)))
    ids = np.array([17, 3, 9, neuron | 12, neuron | 9], np.uint64)  # 1 of c, 3 of a, 1 of b, 2 of layer 1, 9 of layer 0
    kept = whole.kept(ids)
    assert np.array_equal(whole.here(kept), ids)
    first, second = session(("b", 0, 8), ("a", 8, 8), bundles=((0, 10),)), session(("c", 0, 4), bundles=((1, 10),))
    assert np.array_equal(first.here(kept), np.array([11, 1, neuron | 9], np.uint64))
    assert np.array_equal(second.here(kept), np.array([1, neuron | 2], np.uint64))
    assert np.array_equal(second.has(kept), ~first.has(kept))
    for numbers in (first, second):
        assert np.array_equal(numbers.kept(numbers.here(kept)), kept[numbers.has(kept)])
    nonsense = np.array([0, 99, 2**64 - 1, (1 << 32) | 8], np.uint64)  # no such record, tensor or layer
    assert not first.has(nonsense).any() and len(first.here(nonsense)) == 0

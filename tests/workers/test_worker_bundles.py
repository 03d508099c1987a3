"""Neuron bundles over workers: the bits of one machine, whichever way active neurons are found."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundled_experts import TinyExperts
from gguf import GGMLQuantizationType as K
from neurons import bundled, some_active, with_predictors, write_model
from workers import WorkerProcess, open_model, workers_of

from llama_flash import FlashFormatError

PROMPT, DECODED = list(range(3, 40)), [7, 8, 9, 10, 11]


def _bits(llm: Any) -> Any:
    llm.reset()
    llm.eval(PROMPT)
    for token in DECODED:
        llm.eval([token])
    return np.array(llm.scores[: llm.n_tokens]).view(np.uint32)


def _over(path: Path, workers: list[WorkerProcess], **options: Any) -> tuple[Any, list[dict[str, Any]]]:
    with contextlib.closing(open_model(path, workers, **options)) as llm:
        return _bits(llm), llm.flash.worker_stats()


@pytest.mark.parametrize("form", ["llama", "arcee"])  # with and without gates
@pytest.mark.parametrize("kind", ["Q4_0", "F32"])
def test_bundles_over_two_workers_give_the_bits_of_one_machine(
    model_folder: Path, tmp_path: Path, form: str, kind: str
) -> None:
    plain = bundled(write_model(model_folder, form, kind, "fatrelu" if form == "llama" else None))
    path = with_predictors(plain, plain.with_name(f"workers-{plain.name}"), some_active)
    with workers_of(path, tmp_path) as workers:
        for predictor in ("exact", "lowrank", "off"):
            with contextlib.closing(open_model(path, predictor=predictor)) as llm:
                alone = _bits(llm)
            bits, stats = _over(path, workers, predictor=predictor)
            assert np.array_equal(bits, alone)
            assert all(worker["predictor"] == predictor and worker["counters"]["bytes_read"] for worker in stats)
            assert all(worker["counters"]["neurons_active"] for worker in stats) == (predictor != "off")


@pytest.mark.parametrize("kind", [K.Q8_0, K.F32])
def test_bundles_of_experts_over_two_workers_give_the_bits_of_one_machine(
    model_folder: Path, tmp_path: Path, kind: K
) -> None:
    path = model_folder / f"workers-experts-{kind.name}.gguf"
    TinyExperts(kind).write_bundled(path)
    with workers_of(path, tmp_path) as workers:
        for predictor in ("exact", "off"):
            with contextlib.closing(open_model(path, predictor=predictor)) as llm:
                alone = _bits(llm)
            bits, stats = _over(path, workers, predictor=predictor)
            assert np.array_equal(bits, alone)
            assert all(worker["counters"]["neurons_active"] for worker in stats)


def test_what_the_file_lacks_is_refused_with_the_workers_name(model_folder: Path, tmp_path: Path) -> None:
    path = bundled(write_model(model_folder, "arcee", "F32"))  # no predictors
    with workers_of(path, tmp_path, 1) as workers, pytest.raises(FlashFormatError) as refused:
        open_model(path, workers, predictor="lowrank")
    assert workers[0].endpoint in str(refused.value) and "has no predictors" in str(refused.value)

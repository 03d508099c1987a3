"""Reads that fail, stop early or meet another file: FlashReadError, never a crash, a hang or a wrong answer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bundled_experts import TinyExperts
from conftest import ModelFile
from engines import IO_ENGINES
from fault_shim import compiled
from neurons import bundled, some_active, with_predictors, write_model
from repository import SUPPORT

from gguf_tools.synthetic import tiny, write

_SCENARIOS = SUPPORT / "fault_scenarios.py"
_TIMEOUT = 400.0  # seconds, by which a hang is told from a slow machine


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("shim"))


DISTURBED = [
    "eio_while_loading_raises",
    "eio_raises_and_the_next_call_works",
    "errors_of_a_failed_call_do_not_meet_the_next",
    "eio_in_any_read_of_a_token_is_forgotten_by_the_next",
    pytest.param("eio_while_decoding_raises", marks=pytest.mark.sanitize),
    pytest.param("eintr_and_short_reads_are_continued", marks=pytest.mark.sanitize),
    "end_of_file_where_there_should_be_bytes_raises",
]


def run_scenario(name: str, model: Path, *arguments: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, str(_SCENARIOS), name, str(model), *arguments],
        env=os.environ | environment,
        timeout=_TIMEOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}{done.stderr}"


@pytest.fixture(params=["qwen3moe", "llama"])
def model(request: pytest.FixtureRequest, tmp_path: Path, model_file: ModelFile) -> Path:
    path = tmp_path / "model.gguf"  # a copy: the scenarios damage it
    return Path(shutil.copy(model_file(request.param, "Q4_0"), path))


def one_each_time(first: str, *others: str) -> list[Any]:
    """Parameters of which the first is tried before every change."""
    return [first, *(pytest.param(other, marks=pytest.mark.full) for other in others)]


@pytest.fixture
def bundles(tmp_path: Path, model_folder: Path) -> Path:
    """A model of neuron bundles with predictors."""
    source = model_folder / "faults-bundles.gguf"
    if not source.exists():
        with_predictors(bundled(write_model(model_folder, "llama", "F32", "reglu")), source, some_active)
    return Path(shutil.copy(source, tmp_path / "model.gguf"))


@pytest.mark.parametrize("io_engine", IO_ENGINES)
@pytest.mark.parametrize(
    "scenario",
    [
        pytest.param("truncated_file_raises_and_the_next_call_works_once_it_is_whole", marks=pytest.mark.sanitize),
        "changed_file_raises",
        "replaced_file_does_not_disturb_a_loaded_model",
        "failure_in_one_model_leaves_the_other_alone",
    ],
)
def test_file_on_disk(scenario: str, io_engine: str, model: Path) -> None:
    run_scenario(scenario, model, io_engine)


@pytest.mark.parametrize("scenario", DISTURBED)
def test_disturbed_reads(scenario: str, model: Path, shim: Path, tmp_path: Path) -> None:
    run_disturbed(scenario, model, shim, tmp_path)


@pytest.mark.parametrize("predictor", one_each_time("lowrank", "exact", "off"))
@pytest.mark.parametrize("scenario", DISTURBED)
def test_disturbed_reads_of_neurons(scenario: str, predictor: str, bundles: Path, shim: Path, tmp_path: Path) -> None:
    run_disturbed(scenario, bundles, shim, tmp_path, predictor)


def test_an_expert_that_was_expected_in_vain(model_file: ModelFile, shim: Path, tmp_path: Path) -> None:
    run_disturbed("a_wrong_guess_that_fails_is_nobodys_error", model_file("qwen3moe", "Q4_0"), shim, tmp_path)


def test_a_warm_start_that_fails(model_file: ModelFile, bundles: Path, shim: Path, tmp_path: Path) -> None:
    scenario = "a_warm_start_that_fails_is_nobodys_error"
    run_disturbed(scenario, model_file("qwen3moe", "Q4_0"), shim, tmp_path)
    run_disturbed(scenario, bundles, shim, tmp_path, "lowrank")


@pytest.mark.parametrize("predictor", one_each_time("lowrank", "exact", "off"))
@pytest.mark.parametrize(
    "scenario", ["truncated_file_raises_and_the_next_call_works_once_it_is_whole", "changed_file_raises"]
)
def test_file_of_neurons_on_disk(scenario: str, predictor: str, bundles: Path) -> None:
    run_scenario(scenario, bundles, "auto", predictor)


@pytest.mark.parametrize("predictor", one_each_time("exact", "off"))
@pytest.mark.parametrize("scenario", DISTURBED)
def test_disturbed_reads_of_experts_in_bundles(scenario: str, predictor: str, shim: Path, tmp_path: Path) -> None:
    run_disturbed(scenario, TinyExperts().write_bundled(tmp_path / "model.gguf"), shim, tmp_path, predictor)


@pytest.mark.parametrize("predictor", one_each_time("exact", "off"))
@pytest.mark.parametrize(
    "scenario", ["truncated_file_raises_and_the_next_call_works_once_it_is_whole", "changed_file_raises"]
)
def test_file_of_experts_in_bundles_on_disk(scenario: str, predictor: str, tmp_path: Path) -> None:
    run_scenario(scenario, TinyExperts().write_bundled(tmp_path / "model.gguf"), "auto", predictor)


def run_disturbed(scenario: str, model: Path, shim: Path, tmp_path: Path, *predictor: str) -> None:
    control = tmp_path / "control"
    control.write_bytes(bytes(4096))
    # a sanitizer's runtime must stay the first
    preload = " ".join([*os.environ.get("LD_PRELOAD", "").split(), str(shim)])
    run_scenario(scenario, model, "pread", *predictor, LD_PRELOAD=preload, FAULTS=str(control))


def test_a_missing_shard_is_an_error_at_load(tmp_path: Path) -> None:
    from engines import open_flash

    from llama_flash import FlashError

    first, second, *_ = write(tiny("qwen3moe"), tmp_path / "model.gguf", n_shards=3)
    second.unlink()
    with pytest.raises((FlashError, ValueError, OSError), match=second.name):
        open_flash(first)

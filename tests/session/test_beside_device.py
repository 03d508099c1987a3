"""A GPU beside flash, with an RPC server in its place: its memory is no part of the budget, all other memory is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from beside_device import Run, beside
from caps import require_caps
from conftest import ModelFile
from rpc_device import rpc_device

from gguf_tools.synthetic import SyntheticModel, forms, tiny, write
from gguf_tools.synthetic.types import everything

MIB = 1 << 20
LARGE = 2 << 30  # a budget with room for everything


@pytest.fixture(scope="module")
def device() -> Iterator[str]:
    with rpc_device() as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Iterator[Path]:
    """Attention and output have 70 MB, which a device can take."""
    shape = replace(tiny("qwen3moe").shape, n_layer=6, n_embd=1024, n_head=32, n_head_kv=4, head_dim=128, n_vocab=16384)
    (path,) = write(SyntheticModel(shape, everything("Q8_0")), model_folder / "attention.gguf")
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def alone(model: Path) -> Run:
    return beside(model, None, n_gpu_layers=0, what="experts", dram_budget=LARGE)


@pytest.mark.parametrize("n_gpu_layers", [-1, 3])
def test_answers_are_those_without_a_device(model: Path, device: str, alone: Run, n_gpu_layers: int) -> None:
    run = beside(model, device, n_gpu_layers=n_gpu_layers, what="experts", dram_budget=LARGE)
    assert run.logits == alone.logits
    assert run.bytes_read > 0


def test_what_lies_on_the_device_is_planned_as_the_engine_puts_it_there(model: Path, device: str, alone: Run) -> None:
    whole = beside(model, device, what="experts", dram_budget=LARGE, follow=False)
    half = beside(model, device, n_gpu_layers=3, what="experts", dram_budget=LARGE, follow=False)
    none = beside(model, device, n_gpu_layers=0, what="experts", dram_budget=LARGE, follow=False)
    for run in (whole, half, none):
        assert run.expected["weights"] == run.memory["weights"]
        assert run.expected["kv"] == run.memory["kv"]
        assert run.expected["weights"] + run.device == alone.memory["weights"]
        assert abs(run.expected["compute"] - run.memory["compute"]) <= MIB
    assert whole.memory["kv"] == 0 < half.memory["kv"] < none.memory["kv"] == alone.memory["kv"]
    assert whole.device > 60 * MIB and none.device == 0 < half.device < whole.device


def test_an_embedding_that_is_the_output_is_counted_here_and_sent_there(
    model_folder: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine makes two of it."""
    all_of = forms.tensors
    monkeypatch.setattr(forms, "tensors", lambda shape: (t for t in all_of(shape) if t.name != "output.weight"))
    shape = replace(tiny("qwen3moe").shape, n_vocab=65536)
    (path,) = write(SyntheticModel(shape, everything("Q8_0")), model_folder / "tied.gguf")
    try:
        run = beside(path, device, what="experts", dram_budget=LARGE, follow=False)
    finally:
        path.unlink()
    assert run.expected["weights"] == run.memory["weights"] > 16 * MIB
    assert run.staging > 32 * MIB


def test_a_budget_that_is_too_small_for_all_is_enough_beside_a_device(model: Path, device: str, alone: Run) -> None:
    """The kernel ends a process that takes more than its cap."""
    require_caps()
    refused = beside(model, None, n_gpu_layers=0, what="experts", dram_budget=16 * MIB)
    assert refused.refused and refused.smallest > 0
    budget = refused.smallest - 24 * MIB
    assert beside(model, None, n_gpu_layers=0, what="experts", dram_budget=budget).refused
    run = beside(model, device, cap=str(budget), what="experts")
    assert run.logits == alone.logits
    assert run.held <= budget
    assert run.memory["slots"] > 8 * MIB


def test_the_smallest_budget_beside_a_device_is_told_and_works(model: Path, device: str, alone: Run) -> None:
    refused = beside(model, device, what="experts", dram_budget=16 * MIB)
    assert refused.refused and refused.smallest > 0
    run = beside(model, device, what="experts", dram_budget=refused.smallest)
    assert run.logits == alone.logits
    assert run.held <= refused.smallest


def test_weights_on_their_way_to_the_device_are_counted_while_the_model_loads(model: Path, device: str) -> None:
    run = beside(model, device, what="experts", dram_budget=LARGE)
    assert run.staging > 32 * MIB  # twice the output matrix
    loaded = run.memory["interpreter"] + run.memory["weights"]
    assert run.peak - loaded > run.staging // 2, "nothing passed through memory: this test shows nothing"
    assert run.peak - loaded <= run.staging + 16 * MIB + run.memory["slots"]


@pytest.mark.parametrize("form", ["qwen3moe", "deepseek2", "gpt-oss"])
def test_experts_are_read_ahead_where_the_router_lies_on_the_device(
    form: str, model_file: ModelFile, device: str
) -> None:
    path = model_file(form)
    least = beside(path, device, what="experts", dram_budget=MIB, follow=False).smallest
    runs = [
        beside(path, where, n_gpu_layers=-1, what="experts", dram_budget=least, lookahead=lookahead, follow=False)
        for where, lookahead in ((device, True), (device, False))
    ]
    assert runs[0].logits == runs[1].logits
    assert runs[0].experts_expected > 0 == runs[1].experts_expected


def test_everything_lies_on_the_device_where_nobody_asks_for_flash(model: Path, device: str, alone: Run) -> None:
    """Though the budget is less than the weights, and than what they and the context would need."""
    stock = beside(model, device)
    run = beside(model, device, dram_budget=beside(model, device, dram_budget=MIB).smallest)
    assert run.logits == stock.logits
    assert run.device > 140 * MIB and run.bytes_read < MIB  # rows of the embedding
    assert sum(run.memory.values()) < sum(alone.memory.values()) - alone.memory["slots"] - 64 * MIB

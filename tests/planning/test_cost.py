"""What a token costs, against numbers worked out by hand and counted on a device with round rates."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_heads import DENSE, MIB, SHAPE, model, told

from llama_flash import DeviceProfile, FlashOffload
from llama_flash.budget.rooms import Breakdown, Budget
from llama_flash.device.identity import Device
from llama_flash.device.profile import ReadRate
from llama_flash.model.bundles import Bundles, LayerBundle
from llama_flash.model.flash_keys import BundleFormat, Part
from llama_flash.model.gguf import GgufMeta, TensorInfo
from llama_flash.planning.cost import ASSUMED_ACTIVE, Cost, expect
from llama_flash.planning.misses import neuron_misses
from llama_flash.planning.placed import Plan
from llama_flash.planning.placement import make_plan

SECTORS = 4064  # beyond a record, on average
RATE, DRAM = 1e9, 1e10


def device(rate: float = RATE) -> DeviceProfile:
    """So many bytes per second, however they are read."""
    reads = tuple(ReadRate(chunk, depth, rate, 1e-4, 1e-4) for chunk in (4096, 1 << 22) for depth in (1, 128))
    return DeviceProfile(Device("0:0", "x", "", "", ""), "", "defaults", "", True, 0, DRAM, reads)


def placed(meta: GgufMeta, what: str = "all") -> Plan:
    return make_plan(meta, FlashOffload(what=what), Budget(1 << 31, 0, "dram_budget"), SHAPE, 0, told)  # type: ignore[arg-type]


def needs(plan: Plan, n_experts: int = 0, n_panels: int = 0) -> Any:
    return SimpleNamespace(
        n_experts=n_experts, n_panels=n_panels, expert_bytes=plan.expert_bytes, panel_bytes=plan.panel_bytes
    )


def test_experts_that_are_not_in_slots_are_read() -> None:
    meta = model()  # 4 layers, 8 experts of 2 MiB in 3 weights, 2 used
    plan = placed(meta, "experts")
    assert plan.expert_bytes == 192 * MIB
    for held in (0.0, 0.25, 0.5):
        slots = int(held * 96 * (2 * MIB + 4096))  # each of whole sectors, wherever the expert begins
        cost = expect(meta, plan, Breakdown(slots=slots), needs(plan, 96), device())
        records = 96 * 2 / 8 * (1 - held)
        assert cost.bytes_per_token == pytest.approx(records * (2 * MIB + SECTORS))
        assert cost.reads_per_token == pytest.approx(records * 3), "in pieces of 1 MiB"
        assert cost.io_seconds == pytest.approx(cost.bytes_per_token / RATE)
        assert cost.traffic[0].hit_rate == held
        assert any("evenly" in text for text in cost.assumptions)


def test_experts_that_all_fit_are_not_read() -> None:
    plan = placed(model(), "experts")
    cost = expect(model(), plan, Breakdown(slots=plan.expert_bytes + 96 * 4096), needs(plan, 96), device())
    assert (cost.bytes_per_token, cost.reads_per_token, cost.bound_by) == (0, 0, "DRAM")
    assert not any("evenly" in text for text in cost.assumptions)


def test_a_token_computes_with_the_experts_it_uses_and_not_with_the_embedding() -> None:
    meta = model()
    everything, embedding, experts = meta.file_bytes, 32 * MIB, 192 * MIB
    expected = everything - embedding - experts * 6 // 8
    resident = Plan("resident", (), everything, 0, 0, Breakdown())
    for plan, numbers in ((resident, None), (placed(meta, "experts"), needs(placed(meta, "experts"), 96))):
        cost = expect(meta, plan, Breakdown(), numbers, device())
        assert cost.touched == expected
        assert cost.compute_seconds == pytest.approx(expected / DRAM)


def test_under_a_quota_computing_takes_longer_and_reading_does_not() -> None:
    meta = model()
    plan = placed(meta)
    numbers = needs(plan, n_experts=96)
    all_the_time, half = (
        expect(meta, plan, Breakdown(slots=96 * 4096), numbers, device(), awake=awake) for awake in (1.0, 0.5)
    )
    assert half.compute_seconds == 2 * all_the_time.compute_seconds
    assert half.io_seconds == all_the_time.io_seconds
    assert any("quota" in said and "50%" in said for said in half.assumptions)
    assert not any("quota" in said for said in all_the_time.assumptions)


def test_an_embedding_that_is_the_output_is_computed_with() -> None:
    meta = model()
    del meta.tensors["output.weight"]
    size = sum(tensor.size for tensor in meta.tensors.values())
    cost = expect(meta, Plan("resident", (), size, 0, 0, Breakdown()), Breakdown(), None, device())
    assert cost.touched == size - 192 * MIB * 6 // 8


def test_panels_that_are_not_pinned_are_read_for_every_token() -> None:
    meta = model(**DENSE)
    plan = placed(meta, "ffn")
    assert plan.panel_bytes == 128 * MIB
    cost = expect(meta, plan, Breakdown(pinned=32 * MIB, stream=8 * MIB), needs(plan, n_panels=64), device())
    assert cost.bytes_per_token == pytest.approx(48 * (2 * MIB + SECTORS))
    assert cost.traffic[0].at_once == 8, "the ring's bytes in pieces of 1 MiB"
    assert cost.touched == meta.file_bytes - 32 * MIB, "all but the embedding"


def test_the_slower_of_the_two_clocks_counts() -> None:
    meta = model(**DENSE)
    plan = placed(meta, "ffn")
    arguments = (meta, plan, Breakdown(pinned=64 * MIB, stream=MIB), needs(plan, n_panels=64))
    slow, fast = expect(*arguments, device(1e8)), expect(*arguments, device(1e12))
    assert (slow.bound_by, fast.bound_by) == ("flash", "DRAM")
    assert slow.tokens_per_second == pytest.approx(1 / slow.io_seconds)
    assert fast.tokens_per_second == pytest.approx(1 / fast.compute_seconds)
    assert slow.compute_seconds == fast.compute_seconds


def bundles(predictors: bool = False) -> tuple[GgufMeta, Plan, Any]:
    """2 layers of 10000 neurons of 3000 bytes, up and down; 1 MiB beside them."""
    form = BundleFormat((Part("up", 8, 0, 1500), Part("down", 8, 1500, 1500)), 3000, 1000, False, "relu", 0.0)
    tensors = {f"blk.{i}.x": TensorInfo(f"blk.{i}.x", (3000, 10000), 17996, Path("m"), 0, 30_000_000) for i in (0, 1)}
    layers = tuple(LayerBundle(i, 10000, 0, tensors[f"blk.{i}.x"], None, None, 0, None) for i in (0, 1))
    tensors["output.weight"] = TensorInfo("output.weight", (10, 10), 0, Path("m"), 0, MIB)
    values: dict[str, Any] = {"general.architecture": "x"}
    if predictors:
        values["flash.predictor.predicted_share"] = [0.05, 0.15]
        values["flash.predictor.active_share"] = [0.02, 0.06]
    meta = GgufMeta((Path("m"),), values, tensors, 60_000_000 + MIB)
    plan = Plan("flash", (), MIB, 0, 0, Breakdown(), Bundles(form, layers, 0))
    return meta, plan, plan.bundles


def neurons(predictor: str, slots: int, *, said: bool = True, window: int | None = None) -> tuple[Cost, GgufMeta]:
    meta, plan, _ = bundles(said)
    resident = 30_000_000 if predictor == "exact" else 0
    record = 1500 if predictor == "exact" else 3000
    numbers = SimpleNamespace(neuron_record=record, neuron_resident=resident, n_panels=0, n_experts=0)
    memory = Breakdown(slots=slots * record, stream=4 * MIB)
    return expect(meta, plan, memory, numbers, device(), predictor=predictor, window=window, io_depth=128), meta


def test_active_shares_are_those_that_the_file_states() -> None:
    by_predictors, _ = neurons("lowrank", 0)
    assert by_predictors.touched == pytest.approx(MIB + 0.10 * 60e6)
    # with nothing in slots all of them are read; neighbours, and those one further, share a read
    wanted, p = 20000 * 0.10, 0.10
    assert by_predictors.reads_per_token == pytest.approx(wanted * (1 - p) ** 2)
    covered = wanted * (1 + p * (1 - p)) * 3000
    assert by_predictors.bytes_per_token == pytest.approx(covered + by_predictors.reads_per_token * SECTORS)
    exact, _ = neurons("exact", 0)
    assert exact.touched == pytest.approx(MIB + 30e6 + 0.04 * 30e6)
    assert exact.bytes_per_token < by_predictors.bytes_per_token


def test_where_the_file_says_nothing_that_is_said() -> None:
    cost, _ = neurons("exact", 0, said=False)
    assert cost.touched == pytest.approx(MIB + 30e6 + ASSUMED_ACTIVE * 30e6)
    assert any("does not say" in text for text in cost.assumptions)
    cost, _ = neurons("exact", 0)
    assert not any("does not say" in text for text in cost.assumptions)


def test_whole_layers_are_read_without_a_predictor() -> None:
    cost, _ = neurons("off", 0)
    assert cost.bytes_per_token == pytest.approx(60e6 + 20000 / 256 * SECTORS)
    assert cost.touched == MIB + 60e6


def test_a_window_limits_what_slots_hold() -> None:
    unlimited, few, none = (neurons("lowrank", 10000, window=window)[0].bytes_per_token for window in (None, 1, 0))
    assert unlimited < few < none
    assert none == neurons("lowrank", 0)[0].bytes_per_token


@given(st.floats(0.001, 1), st.floats(0, 1), st.floats(0, 1))
def test_more_slots_never_miss_more(active: float, held: float, more: float) -> None:
    least, most = sorted((held, more))
    assert 0 <= neuron_misses(active, most) <= neuron_misses(active, least) <= 1
    assert neuron_misses(active, 0) == 1
    assert neuron_misses(active, 1) == 0
    assert neuron_misses(active, held, window=0) == 1
    assert neuron_misses(active, held, window=1 << 20) == neuron_misses(active, held)

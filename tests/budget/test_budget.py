"""The budget is the least of all limits, what others hold is not ours, and a plan takes no more than it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cgroup_trees import unpack_all
from hypothesis import given
from hypothesis import strategies as st
from model_heads import DENSE, MIB, SHAPE, model, told

from llama_flash import FlashBudgetError, FlashFormatError, FlashOffload
from llama_flash.budget.rooms import (
    RESERVE_MIN,
    Budget,
    default_reserve,
    held_by_process,
    resolve_budget,
    smallest_budget,
)
from llama_flash.model.gguf import GgufMeta, read_gguf, shard_paths
from llama_flash.planning.placement import make_plan

GIB = 1 << 30
OWN = 101 * MIB  # anonymous memory and page tables of the process in the recorded trees


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack_all(tmp_path_factory.mktemp("trees"))


@pytest.mark.parametrize(
    ("tree", "total", "reason"),
    [
        # 2 GiB in the middle; the group holds 350 MiB there, 101 of them our own
        ("v1_nested", 2 * GIB - (350 * MIB - OWN), "cgroup job 7"),
        ("v1_unlimited", 12 * GIB + OWN, "free memory"),
        ("v1_container", 1 * GIB - (200 * MIB - OWN), "cgroup memory"),
        ("v2_nested", 3 * GIB - (624 * MIB - OWN), "cgroup user-1000.slice"),
        ("v2_high", 1 * GIB - (400 * MIB - OWN), "cgroup svc"),
        ("v2_max", 12 * GIB + OWN, "free memory"),
        ("no_cgroups", 12 * GIB + OWN, "free memory"),
    ],
)
def test_auto_is_the_tightest_limit_less_what_others_hold(trees: Path, tree: str, total: int, reason: str) -> None:
    budget = resolve_budget(root=trees / tree)
    assert (budget.total, budget.reason, budget.asked) == (total, reason, None)
    assert budget.reserve == default_reserve(total)


def test_a_stated_budget_is_taken_as_it_is(trees: Path) -> None:
    budget = resolve_budget("512MiB", root=trees / "v1_nested")
    assert (budget.total, budget.reason, budget.asked) == (512 * MIB, "dram_budget", 512 * MIB)


def test_a_share_is_of_the_model_file(trees: Path) -> None:
    assert resolve_budget("50%", model_bytes=1 * GIB, root=trees / "no_cgroups").total == 512 * MIB


def test_a_budget_above_the_limit_is_cut_to_it(trees: Path) -> None:
    auto = resolve_budget(root=trees / "v1_nested")
    budget = resolve_budget("8GiB", root=trees / "v1_nested")
    assert (budget.total, budget.asked, budget.reason) == (auto.total, 8 * GIB, auto.reason)


@pytest.mark.parametrize("bad", ["-1", "5 parsecs", 0, -1, float("nan"), float("inf"), True, "", "0%"])
def test_what_is_not_a_budget_is_refused_with_the_accepted_forms(bad: int | str, trees: Path) -> None:
    with pytest.raises(ValueError, match=r"accepted: .*2GiB.*50%"):
        resolve_budget(bad, model_bytes=1 * GIB, root=trees / "no_cgroups")


@pytest.mark.parametrize("much", ["4000TiB", (1 << 63) - 1, "99999%"])
def test_more_than_the_machine_has_is_cut_to_what_there_is(much: int | str, trees: Path) -> None:
    budget = resolve_budget(much, model_bytes=1 * GIB, root=trees / "no_cgroups")
    assert budget.total == resolve_budget(root=trees / "no_cgroups").total < (budget.asked or 0)


def test_the_reserve_can_be_stated(trees: Path) -> None:
    assert resolve_budget("1GiB", "10MiB", root=trees / "no_cgroups").reserve == 10 * MIB
    assert resolve_budget("1GiB", 0, root=trees / "no_cgroups").reserve == 0


def test_what_the_process_holds_is_measured_on_this_machine() -> None:
    def taken() -> int:
        before = held_by_process()
        block = bytearray(256 * MIB)
        block[::4096] = b"x" * len(block[::4096])
        return held_by_process() - before

    # models of other tests may be collected meanwhile
    assert any(250 * MIB < taken() < 300 * MIB for _ in range(4))
    assert resolve_budget().total > 256 * MIB  # our own memory is part of the budget


@given(st.integers(1, 1 << 42))
def test_the_smallest_budget_leaves_what_is_needed_and_is_the_smallest(needed: int) -> None:
    total = smallest_budget(needed)
    assert total - default_reserve(total) >= needed
    less = total - 2 * MIB
    assert less - default_reserve(less) < needed


def kinds(meta: GgufMeta, total: int, what: str = "auto") -> tuple[str, set[str]]:
    budget = Budget(total, RESERVE_MIN, "dram_budget")
    plan = make_plan(meta, FlashOffload(what=what), budget, SHAPE, 40 * MIB, told)  # type: ignore[arg-type]
    if plan.mode == "flash":
        assert plan.flash_bytes + plan.resident_bytes == meta.file_bytes
    return plan.mode, {re.sub(r"blk\.\d+\.|\.weight", "", tensor.name) for tensor in plan.tensors}


EXPERTS = {"ffn_up_exps", "ffn_gate_exps", "ffn_down_exps"}
FEED_FORWARD = {"ffn_up_shexp"}
EVERYTHING = EXPERTS | FEED_FORWARD | {"attn_q", "output", "token_embd"}


def test_everything_stays_resident_where_it_fits() -> None:
    assert kinds(model(), 2 * GIB) == ("resident", set())


def test_experts_and_tables_go_first_then_dense_ffn_then_every_other_matrix() -> None:
    meta = model()
    seen = []
    for total in range(600, 100, -5):
        try:
            seen.append(kinds(meta, total * MIB))
        except FlashBudgetError:
            break
    assert list(dict.fromkeys((mode, len(which)) for mode, which in seen)) == [
        ("resident", 0),
        ("flash", 4),
        ("flash", 5),
        ("flash", 7),
    ]
    assert seen[-1][1] == EVERYTHING


def test_what_is_used_otherwise_than_as_a_matrix_or_a_table_stays_resident_whatever_is_asked() -> None:
    assert kinds(model(), 2 * GIB, "all") == ("flash", EVERYTHING)
    assert kinds(model(), 2 * GIB, "ffn") == ("flash", EXPERTS | FEED_FORWARD)
    assert kinds(model(), 2 * GIB, "experts") == ("flash", EXPERTS)


def test_a_dense_model_has_no_experts_to_offload() -> None:
    meta = model(**DENSE)
    assert kinds(meta, 2 * GIB, "experts") == ("nothing", set())
    assert kinds(meta, 2 * GIB, "ffn") == ("flash", FEED_FORWARD)


def test_too_small_a_budget_is_refused_with_a_number_that_works() -> None:
    meta = model()
    with pytest.raises(FlashBudgetError) as error:
        kinds(meta, 100 * MIB)
    assert error.value.smallest > 100 * MIB
    assert f"{error.value.smallest >> 20} MiB" in str(error.value)
    assert error.value.breakdown["interpreter"] >= 40 * MIB
    assert error.value.breakdown["weights"] > 0
    assert kinds(meta, error.value.smallest)[0] == "flash"


@given(st.integers(100, 600), st.sampled_from(["auto", "experts", "ffn", "all"]))
def test_a_plan_is_within_its_budget_or_refused(total: int, what: str) -> None:
    budget = Budget(total * MIB, default_reserve(total * MIB), "dram_budget")
    try:
        plan = make_plan(model(), FlashOffload(what=what), budget, SHAPE, 40 * MIB, told)  # type: ignore[arg-type]
    except FlashBudgetError as error:
        assert error.smallest > budget.total
        return
    assert plan.resident_bytes + 40 * MIB + budget.reserve <= budget.total


def test_patterns_match_the_flash_tensors_and_no_others() -> None:
    meta = model()
    plan = make_plan(meta, FlashOffload(what="all"), Budget(2 * GIB, 0, "dram_budget"), SHAPE, 0, told)
    patterns = [re.compile(pattern) for pattern in plan.patterns()]
    flash = {tensor.name for tensor in plan.tensors}
    for name in [*meta.tensors, "blk.10.attn_q.weight", "output_norm.weight", "blk.1.attn_q.bias", "xoutput.weight"]:
        assert any(pattern.search(name) for pattern in patterns) == (name in flash), name


def test_a_damaged_head_is_a_format_error(tmp_path: Path) -> None:
    for content in (b"", b"GGUF", b"GGML" + bytes(64), b"GGUF" + bytes(64), b"GGUF\3\0\0\0" + b"\xff" * 64):
        file = tmp_path / "model.gguf"
        file.write_bytes(content)
        with pytest.raises(FlashFormatError, match=r"model\.gguf"):
            read_gguf(file)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    for i in (1, 3):
        (tmp_path / f"m-{i:05d}-of-00003.gguf").touch()
    with pytest.raises(FlashFormatError, match="m-00002-of-00003"):
        shard_paths(tmp_path / "m-00001-of-00003.gguf")

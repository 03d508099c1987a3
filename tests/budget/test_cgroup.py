"""Limits and usage are read right from recorded cgroup trees, and from the machine's own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cgroup_trees import NAMES, unpack_all
from hypothesis import given
from hypothesis import strategies as st

from llama_flash.budget.cgroup import machine_memory, memory_controller, memory_groups, parse_limit, process_memory

MIB, GIB = 1 << 20, 1 << 30


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack_all(tmp_path_factory.mktemp("trees"))


def limits(tree: Path) -> list[int | None]:
    return [group.limit for group in memory_groups(tree)]


def test_every_recorded_tree_has_a_test() -> None:
    source = Path(__file__).read_text()
    assert [name for name in NAMES if f'"{name}"' not in source] == []


def test_v1_counts_all_ancestors_innermost_first(trees: Path) -> None:
    groups = memory_groups(trees / "v1_nested")
    assert [group.path.name for group in groups] == ["step", "job 7", "batch", "memory"]
    assert [group.limit for group in groups] == [2 * GIB, 2 * GIB, 4 * GIB, None]


def test_v1_page_cache_can_be_dropped_but_shmem_cannot(trees: Path) -> None:
    group = memory_groups(trees / "v1_nested")[0]
    assert group.usage == 400 * MIB
    assert group.droppable == 250 * MIB  # the 64 MiB of shmem in total_cache are not in it
    assert group.held == 150 * MIB


def test_v1_numbers_near_2_to_the_63_mean_unlimited(trees: Path) -> None:
    assert limits(trees / "v1_unlimited") == [None, None]


def test_v1_without_hierarchy_ancestors_do_not_count(trees: Path) -> None:
    assert limits(trees / "v1_flat") == [1 * GIB]


def test_v1_container_sees_its_own_group_at_the_mount(trees: Path) -> None:
    assert limits(trees / "v1_container") == [1 * GIB]


def test_v1_ancestor_that_a_container_does_not_show_still_counts(trees: Path) -> None:
    assert limits(trees / "v1_hidden_ancestor") == [768 * MIB]


def test_v1_path_outside_of_the_mount_falls_back_to_its_root(trees: Path) -> None:
    assert limits(trees / "v1_foreign_path") == [1 * GIB]


def test_v1_missing_files_are_no_limits(trees: Path) -> None:
    (group,) = memory_groups(trees / "v1_missing_files")
    assert (group.limit, group.usage, group.droppable) == (None, 200 * MIB, 0)


def test_v2_counts_all_ancestors_innermost_first(trees: Path) -> None:
    groups = memory_groups(trees / "v2_nested")
    assert [group.path.name for group in groups] == ["app.scope", "user-1000.slice", "user.slice"]
    assert [group.limit for group in groups] == [6 * GIB, 3 * GIB, None]
    assert groups[0].held == 300 * MIB


def test_v2_max_means_unlimited(trees: Path) -> None:
    assert limits(trees / "v2_max") == [None]


def test_v2_high_limits_below_max(trees: Path) -> None:
    assert limits(trees / "v2_high") == [1 * GIB]


def test_v2_container_sees_its_own_group_at_the_mount(trees: Path) -> None:
    (group,) = memory_groups(trees / "v2_container")
    assert (group.limit, group.held) == (2 * GIB, 400 * MIB)


def test_v2_without_the_memory_controller_has_no_groups(trees: Path) -> None:
    assert memory_controller(trees / "v2_no_memory_controller") is None
    assert memory_groups(trees / "v2_no_memory_controller") == []


def test_hybrid_memory_is_in_v1(trees: Path) -> None:
    controller = memory_controller(trees / "hybrid")
    assert controller is not None
    assert controller.version == 1
    assert limits(trees / "hybrid") == [1500 * MIB, None]


def test_machine_without_cgroups_has_no_groups(trees: Path) -> None:
    assert memory_groups(trees / "no_cgroups") == []
    assert machine_memory(trees / "no_cgroups").total == 16 * GIB


def test_no_proc_at_all_is_no_controller(tmp_path: Path) -> None:
    assert memory_controller(tmp_path) is None


@given(st.integers(0, (1 << 62) - 1))
def test_limits_are_read_back(limit: int) -> None:
    assert parse_limit(f"{limit}\n") == limit


@given(st.sampled_from([4096, 16384, 65536]))
def test_unlimited_depends_on_the_page_size(page: int) -> None:
    assert parse_limit(str((1 << 63) - page)) is None


@given(st.text())
def test_any_text_is_a_limit_or_a_value_error(text: str) -> None:
    try:
        limit = parse_limit(text)
    except ValueError:
        return
    assert limit is None or 0 <= limit < 1 << 62


def test_own_memory_is_what_the_kernel_says() -> None:
    block = bytearray(64 * MIB)
    block[::4096] = b"x" * len(block[::4096])
    before = process_memory()
    assert before.anonymous > 64 * MIB
    del block
    assert process_memory().anonymous < before.anonymous - 48 * MIB


def test_own_groups_hold_at_least_nothing_and_at_most_their_usage() -> None:
    for group in memory_groups():
        assert 0 <= group.held <= group.usage
    machine = machine_memory()
    assert 0 < machine.available <= machine.total
    assert machine.total <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 1.05

"""How many threads compute: from recorded trees of cgroups and topologies, and whatever the numbers are."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cgroup_trees import unpack_all
from conftest import ModelFile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_flash.budget.cgroup import cpu_groups
from llama_flash.budget.cores import (
    Threads,
    Throttling,
    choose_threads,
    default_threads,
    describe_threads,
    explain_throttling,
    physical_cores,
)

V1 = "sys/fs/cgroup/cpu,cpuacct"
V2 = "sys/fs/cgroup"
PERIOD = 100_000  # microseconds


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack_all(tmp_path_factory.mktemp("trees"))


@pytest.fixture
def v1(tmp_path: Path) -> Path:
    """The recorded process of /batch/job 7/step."""
    root = unpack_all(tmp_path) / "v1_nested"
    (root / V1 / "batch/job 7/step").mkdir(parents=True)
    return root


@pytest.fixture
def v2(tmp_path: Path) -> Path:
    """The recorded process of /user.slice/user-1000.slice/app.scope."""
    return unpack_all(tmp_path) / "v2_nested"


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")


def quota_v1(root: Path, group: str, quota: int, throttled: int = 0, nanoseconds: int = 0) -> None:
    """Files of a group as Linux 6.18 writes them."""
    stat = f"nr_periods 40\nnr_throttled {throttled}\nthrottled_time {nanoseconds}\nnr_bursts 0\nburst_time 0"
    names = {"cpu.cfs_quota_us": str(quota), "cpu.cfs_period_us": str(PERIOD), "cpu.stat": stat}
    write(root / V1 / group, names)


def quota_v2(root: Path, group: str, quota: int | None, throttled: int = 0, microseconds: int = 0) -> None:
    stat = f"usage_usec 5000\nnr_periods 40\nnr_throttled {throttled}\nthrottled_usec {microseconds}"
    write(root / V2 / group, {"cpu.max": f"{'max' if quota is None else quota} {PERIOD}", "cpu.stat": stat})


def cpus(root: Path, siblings: list[str], online: str) -> None:
    """siblings: of each CPU, as the kernel lists them."""
    topology = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    write(root, {"sys/devices/system/cpu/online": online})
    write(root, {topology.format(i): text for i, text in enumerate(siblings)})


TWO_PER_CORE = ["0,4", "1,5", "2,6", "3,7", "0,4", "1,5", "2,6", "3,7"]


def test_two_threads_of_a_core_count_once(tmp_path: Path) -> None:
    cpus(tmp_path, TWO_PER_CORE, "0-7")
    assert physical_cores(range(8), tmp_path) == 4
    assert physical_cores({0, 4}, tmp_path) == 1
    assert physical_cores({0, 1, 5}, tmp_path) == 2
    assert choose_threads(tmp_path, allowed=range(8)) == Threads(4, "4 physical cores")


def test_the_newer_name_of_a_core_wins(tmp_path: Path) -> None:
    cpus(tmp_path, ["0", "1"], "0-1")
    for i in range(2):
        write(tmp_path, {f"sys/devices/system/cpu/cpu{i}/topology/core_cpus_list": "0-1"})
    assert physical_cores(range(2), tmp_path) == 1


def test_without_topology_every_cpu_is_a_core(tmp_path: Path) -> None:
    assert physical_cores({0, 3, 9}, tmp_path) == 3
    assert physical_cores(set(), tmp_path) == 1


def test_affinity_is_said(tmp_path: Path) -> None:
    cpus(tmp_path, TWO_PER_CORE, "0-7")
    chosen = choose_threads(tmp_path, allowed={0, 1, 4})
    assert str(chosen) == "2 threads: 2 physical cores among the 3 of 8 CPUs that affinity allows"


def test_v1_the_tightest_ancestor_counts(v1: Path) -> None:
    cpus(v1, [str(i) for i in range(8)], "0-7")
    quota_v1(v1, "batch/job 7/step", -1)
    quota_v1(v1, "batch/job 7", 250_000)
    quota_v1(v1, "batch", 400_000)
    quota_v1(v1, "", -1)
    assert [(group.path.name, group.cores) for group in cpu_groups(v1)] == [("job 7", 2.5), ("batch", 4.0)]
    chosen = choose_threads(v1, allowed=range(8))
    assert chosen.n == 3 and "job 7 is 2.5 of 8 physical cores" in chosen.reason


def test_v2_the_tightest_ancestor_counts(v2: Path) -> None:
    cpus(v2, [str(i) for i in range(8)], "0-7")
    quota_v2(v2, "user.slice/user-1000.slice/app.scope", 400_000)
    quota_v2(v2, "user.slice/user-1000.slice", None)
    quota_v2(v2, "user.slice", 50_000)
    assert [(group.path.name, group.cores) for group in cpu_groups(v2)] == [("app.scope", 4.0), ("user.slice", 0.5)]
    chosen = choose_threads(v2, allowed=range(8))
    assert chosen.n == 1 and str(chosen).startswith("1 thread: the quota of ") and "0.5" in chosen.reason


@pytest.mark.parametrize("text", ["", "max", "max 100000", "x y", "-1 100000", "100000 0", "1 2 3"])
def test_v2_what_is_no_quota(text: str, v2: Path) -> None:
    write(v2 / V2 / "user.slice", {"cpu.max": text})
    assert cpu_groups(v2) == []


def test_recorded_trees_without_quotas_have_none(trees: Path) -> None:
    for tree in trees.iterdir():
        assert cpu_groups(tree) == []
        assert choose_threads(tree, allowed={0, 1}).n == 2


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    version=st.sampled_from([1, 2]),
    quotas=st.lists(st.none() | st.integers(1_000, 10_000_000), min_size=3, max_size=3),
    cores=st.integers(1, 64),
)
def test_never_more_than_cores_or_quota_and_never_none(
    version: int, quotas: list[int | None], cores: int, v1: Path, v2: Path
) -> None:
    root, write_quota = (v1, quota_v1) if version == 1 else (v2, quota_v2)
    names = ("batch", "job 7", "step") if version == 1 else ("user.slice", "user-1000.slice", "app.scope")
    for i, quota in enumerate(quotas):
        absent = -1 if version == 1 else None
        write_quota(root, "/".join(names[: i + 1]), absent if quota is None else quota)  # type: ignore[arg-type]
    cpus(root, [str(i) for i in range(cores)], f"0-{cores - 1}")
    chosen = choose_threads(root, allowed=range(cores))
    limits = [math.ceil(quota / PERIOD) for quota in quotas if quota is not None]
    assert chosen.n == max(1, min([cores, *limits]))
    assert chosen.awake == pytest.approx(min([1.0, *(q / PERIOD / chosen.n for q in quotas if q is not None)]))
    assert ("quota" in chosen.reason) == (min([*limits, cores + 1]) <= cores)


@pytest.mark.parametrize("version", [1, 2])
def test_throttling_counts_from_when_it_began(version: int, v1: Path, v2: Path) -> None:
    root = v1 if version == 1 else v2

    def stopped(times: int, seconds: float) -> None:
        if version == 1:
            quota_v1(root, "batch", 50_000, times, int(seconds * 1e9))
        else:
            quota_v2(root, "user.slice", 50_000, times, int(seconds * 1e6))

    stopped(7, 1.5)
    watch = Throttling(root)
    assert watch.since() == (0, 0.0)
    stopped(12, 4.0)
    assert watch.since() == (5, 2.5)
    assert "5 periods" in explain_throttling(*watch.since()) and "2.5 s" in explain_throttling(*watch.since())


def test_a_quota_that_comes_later_counts_from_then(v2: Path) -> None:
    watch = Throttling(v2)
    assert watch.since() == (0, 0.0)
    quota_v2(v2, "user.slice", 50_000, 3, 1_000_000)
    assert watch.since() == (0, 0.0)
    quota_v2(v2, "user.slice", 50_000, 4, 1_500_000)
    assert watch.since() == (1, 0.5)


def test_here_there_is_a_number_and_a_reason() -> None:
    chosen = choose_threads()
    assert 1 <= chosen.n == default_threads() <= len(os.sched_getaffinity(0))
    assert describe_threads(chosen.n) == str(chosen)
    assert describe_threads(99).startswith("99 threads as asked for (default: ")


def test_llama_takes_the_default_and_keeps_what_is_given(model_file: ModelFile) -> None:
    import llama_cpp

    path = str(model_file("llama", "Q4_0"))
    llm = llama_cpp.Llama(path, n_ctx=32, verbose=False, flash_offload={"what": "ffn"})
    assert llm.n_threads == llm.n_threads_batch == default_threads()
    assert str(choose_threads()) in llm.flash.summary
    llm.close()
    llm = llama_cpp.Llama(path, n_ctx=32, verbose=False, n_threads=3, flash_offload={"what": "ffn"})
    assert llm.n_threads == 3 and "3 threads as asked for" in llm.flash.summary
    llm.close()


def test_affinity_of_a_process_decides() -> None:
    one = min(os.sched_getaffinity(0))
    program = (
        f"import os; os.sched_setaffinity(0, {{{one}}}); import llama_cpp; from llama_cpp.server.settings import *; "
        "from llama_flash.threads import default_threads; "
        "print(default_threads(), ModelSettings(model='x').n_threads, ModelSettings(model='x').n_threads_batch)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1", "1"]

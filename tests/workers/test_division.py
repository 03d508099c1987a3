"""Who gets which layers: by room, and by the time that a token is expected to take."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from workers import MOE, workers_of

from llama_flash.device.kept import remember
from llama_flash.device.profile import quick_profile
from llama_flash.workers.division import divide_layers
from llama_flash.workers.times import NONE, Host, Layer, added, divide_by_time, seconds_of


def total(layers: list[Layer], hosts: list[Host], ranges: list[range]) -> float:
    """Seconds of a token."""
    seconds = 0.0
    for host, mine in zip(hosts, ranges, strict=True):
        part = NONE
        for i in mine:
            part = added(part, layers[i])
        seconds += seconds_of(part, host)
    return seconds


@st.composite
def layers_of(draw: st.DrawFn, n: int) -> list[Layer]:
    skewed = draw(st.booleans())
    found = []
    for _ in range(n):
        size = draw(st.integers(1 << 20, 1 << 28))
        least = draw(st.integers(0, size // 4))
        touched = draw(st.floats(0.05, 1.0)) * (size - least)
        found.append(Layer(size, least, touched + least, touched, skewed))
    return found


hosts_of = st.builds(
    Host, st.integers(1 << 22, 1 << 30), st.floats(1e8, 1e10), st.floats(2e9, 1e11)
)  # rooms from less than a layer's to all


@given(st.data(), st.integers(1, 4), st.integers(0, 5))
def test_no_other_division_is_clearly_faster(data: st.DataObject, n_hosts: int, more: int) -> None:
    n = n_hosts + more
    layers = data.draw(layers_of(n))
    hosts = data.draw(st.lists(hosts_of, min_size=n_hosts, max_size=n_hosts))
    found = divide_by_time(layers, hosts)
    every = [
        [range(a, b) for a, b in itertools.pairwise((0, *borders, n))]
        for borders in itertools.combinations(range(1, n), n_hosts - 1)
    ]
    best = min(total(layers, hosts, ranges) for ranges in every)
    if not found:
        assert math.isinf(best)
        return
    assert [i for mine in found for i in mine] == list(range(n)) and all(found)
    # what decides between equals is a small part of computing all at the fastest host, for rooms that are alike
    room, size = sum(host.room for host in hosts), sum(layer.size for layer in layers)
    uneven = max(
        sum(
            (sum(layers[i].size for i in mine) / size) ** 2 * room / host.room
            for host, mine in zip(hosts, r, strict=True)
        )
        for r in every
    )
    tie = 0.011 * sum(layer.touched for layer in layers) / max(host.dram for host in hosts) * uneven
    assert total(layers, hosts, found) <= best + tie + 1e-9


@given(st.integers(2, 40), st.integers(1, 4), st.floats(1.0, 8.0), st.booleans())
def test_hosts_alike_get_as_much(n: int, n_hosts: int, more: float, skewed: bool) -> None:
    layers = [Layer(100 << 20, 1 << 20, 90e6, 80e6, skewed)] * (n * n_hosts)
    host = Host(int(n * (100 << 20) / more), 2e9, 1e10)
    assert [len(mine) for mine in divide_by_time(layers, [host] * n_hosts)] == [n] * n_hosts


def test_rooms_alone_decide_where_rates_are_the_same() -> None:
    layers = [Layer(100 << 20, 1 << 20, 90e6, 80e6)] * 24
    hosts = [Host(200 << 20, 2e9, 1e10), Host(600 << 20, 2e9, 1e10)]
    by_room = divide_layers([layer.size for layer in layers], [host.room for host in hosts])
    assert divide_by_time(layers, hosts) == by_room == [range(6), range(6, 24)]


@given(st.booleans(), st.floats(1.5, 20.0), st.integers(100, 1500), st.booleans())
def test_a_faster_host_gets_more(skewed: bool, faster: float, room: int, first: bool) -> None:
    layers = [Layer(100 << 20, 1 << 20, 90e6, 80e6, skewed)] * 20
    slow = Host(room << 20, 1e9, 1e10)
    fast = Host(room << 20, 1e9 * faster, 1e10 * faster)
    equal = len(divide_by_time(layers, [slow, slow])[0])
    ranges = divide_by_time(layers, [fast, slow] if first else [slow, fast])
    assert len(ranges[0 if first else 1]) >= equal


def test_what_must_be_in_memory_finds_room_at_the_slower_host() -> None:
    layers = [Layer(100 << 20, 50 << 20, 90e6, 40e6)] * 10
    fast, slow = Host(170 << 20, 1e9, 1e9), Host(400 << 20, 1e3, 1e3)
    assert divide_by_time(layers, [fast, slow]) == [range(3), range(3, 10)]
    assert divide_by_time(layers, [fast, fast]) == []


def _rates_at(folder: Path, *, measured: bool) -> list[float]:
    """Of two workers, as a plan tells them."""
    with workers_of(MOE, folder) as workers:
        named = ",".join(worker.endpoint for worker in workers)
        command = [sys.executable, "-m", "llama_flash", "plan", str(MOE), "--workers", named]
        done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=400, check=True)
        shown = subprocess.run(command, capture_output=True, text=True, timeout=400, check=True).stdout
    assert ("a token, expected" in shown) == measured
    assert ("layers by budgets alone" in shown) != measured
    told = json.loads(done.stdout)["workers"]
    assert all((each["expected_seconds"] > 0) == measured for each in told)
    return [each["flash_rate"] for each in told]


def test_a_plan_shows_the_rates_that_were_measured_on_each_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setenv("LLAMA_FLASH_CACHE", str(tmp_path / "cache"))
    assert _rates_at(tmp_path, measured=False) == [0.0, 0.0]
    profile = dataclasses.replace(quick_profile(MOE), source="measured")
    remember(profile)
    expected = profile.rate(1 << 20, profile.depth_for(1 << 20))
    assert _rates_at(tmp_path, measured=True) == [expected, expected]


def test_no_host_gets_layers_that_leave_no_room_for_slots() -> None:
    layer = Layer(64 << 20, 24 << 20, 1e6, 1e6)
    quick, slow = Host(60 << 20, 1e12, 1e12), Host(1 << 30, 1e8, 1e9)
    (first, _) = divide_by_time([layer] * 4, [quick, slow])
    assert len(first) == 1  # what two need in memory would fit, slots beside them would not
    assert math.isinf(seconds_of(added(layer, layer), quick))

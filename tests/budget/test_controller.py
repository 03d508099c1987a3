"""The controller: shares of the budget, moving limits, neighbours, pressure. With made-up trees, and in real groups."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from caps import require_caps
from hypothesis import given
from hypothesis import strategies as st

from gguf_tools.synthetic import PRESETS, write
from gguf_tools.synthetic.opt import OptModel, OptShape
from gguf_tools.synthetic.opt_writer import write_opt
from llama_flash import FlashBudgetError, FlashError, FlashEvent
from llama_flash.budget.cgroup import Gauge, memory_controller, process_memory
from llama_flash.budget.controller import Controller, divide

MiB = 1 << 20
PATIENCE = 400.0  # seconds: a busy machine is not a failure

# shares

SESSIONS = st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000)).map(lambda p: (p[0], sum(p))), max_size=5)


@given(pool=st.integers(-1000, 10000), sessions=SESSIONS)
def test_shares(pool: int, sessions: list[tuple[int, int]]) -> None:
    shares = divide(pool, sessions)
    assert len(shares) == len(sessions)
    for share, (least, most) in zip(shares, sessions, strict=True):
        assert least <= share <= most
    assert sum(shares) <= max(pool, sum(least for least, _ in sessions))
    left, wanted = pool - sum(shares), sum(most for _, most in sessions) - sum(shares)
    assert min(left, wanted) <= len(sessions), "memory that somebody wants is left"  # parts of bytes are dropped


# decisions, in a group of a made-up tree (v2, as the kernel writes it)


class Tree:
    """A root with one v2 group whose files can be rewritten, and a process in it that holds `own` bytes."""

    def __init__(self, root: Path) -> None:
        self.root, self.group = root, root / "sys/fs/cgroup/app"
        self.group.mkdir(parents=True)
        (root / "proc/self").mkdir(parents=True)
        (root / "proc/self/cgroup").write_text("0::/app\n")
        (root / "proc/self/mountinfo").write_text("30 1 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
        (root / "proc/meminfo").write_text("MemTotal: 67108864 kB\nMemAvailable: 60000000 kB\n")
        (root / "sys/fs/cgroup/cgroup.controllers").write_text("memory\n")
        (self.group / "memory.high").write_text("max\n")
        self.within(os.getpid())
        (self.group / "memory.events.local").write_text("low 0\nhigh 0\nmax 0\noom 0\noom_kill 0\n")
        self.stalled(0)
        self.set(limit=1000, own=300, others=0)

    def set(self, *, limit: int | None = None, own: int | None = None, others: int | None = None) -> None:
        """In MiB."""
        self.limit = self.limit if limit is None else limit
        self.own = self.own if own is None else own
        self.others = self.others if others is None else others
        (self.group / "memory.max").write_text(f"{self.limit * MiB}\n")
        (self.group / "memory.current").write_text(f"{(self.own + self.others) * MiB}\n")
        (self.group / "memory.stat").write_text(f"anon {(self.own + self.others) * MiB}\n")
        status = f"VmRSS:\t{self.own * 1024} kB\nRssAnon:\t{self.own * 1024} kB\nRssFile:\t0 kB\nRssShmem:\t0 kB\n"
        (self.root / "proc/self/status").write_text(status)

    def within(self, *pids: int) -> None:
        """The processes of the group."""
        (self.group / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in pids))

    def stalled(self, microseconds: int) -> None:
        line = f"avg10=0.00 avg60=0.00 avg300=0.00 total={microseconds}\n"
        (self.group / "memory.pressure").write_text(f"some {line}full {line}")

    limit = own = others = 0


class Model:
    """A session of which the tests know all: it needs 100 MiB beside flash, and arrives at once."""

    asked: int | None = None
    fixed, interpreter = 60 * MiB, 40 * MiB
    certain, touched = 40 * MiB, 0
    decoding, grows = False, 0

    def __init__(self, granted: int, least: int = 50, most: int = 2000) -> None:
        self.granted, self.least, self.most = granted * MiB, least * MiB, most * MiB
        self.events: list[FlashEvent] = []
        self.urgent: list[bool] = []
        self.budget = 0

    def soon(self, now: float) -> int:
        return self.grows

    def reserve(self, total: int, rise: int | None = None) -> int:
        return 40 * MiB if rise is None else min(40 * MiB, self.steady * MiB + 2 * rise)

    steady = 40

    def move(self, n_bytes: int, urgent: bool) -> bool:
        if n_bytes != self.granted:
            self.urgent.append(urgent)
        self.granted = n_bytes
        return True

    def warm(self) -> bool:
        return False

    def limited(self, total: int, reserve: int, beside: int, reason: str) -> None:
        self.budget = total

    def tell(self, event: FlashEvent) -> None:
        self.events.append(event)

    def describe(self) -> dict[str, object]:
        return {}


class Clock:
    """A controller whose looks the test makes itself."""

    def __init__(self, tree: Tree, *models: Model) -> None:
        self.controller, self.now, self.models = Controller(tree.root), 100.0, models
        self.controller._stopping = True  # no thread
        for model in models:
            self.controller.join(model)

    def look(self, seconds: float = 0.5) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now += 0.25
            self.controller.tick(self.now)
            self.controller._deliver()


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_a_lower_limit_takes_and_a_higher_one_gives(tree: Tree) -> None:
    model = Model(granted=800)
    clock = Clock(tree, model)
    clock.look()
    assert model.granted == (1000 - 40 - 280) * MiB, (
        "all that the process holds beside flash counts, half the reserve off"
    )
    tree.set(own=100)
    clock.look()
    assert model.granted == (1000 - 40 - 100) * MiB
    tree.set(limit=500)
    clock.look()
    assert model.granted == (500 - 40 - 100) * MiB == model.events[-1].after
    assert model.budget == 500 * MiB
    tree.set(limit=900)
    clock.look()
    assert model.granted == (900 - 40 - 100) * MiB
    assert [event.kind for event in model.events] == ["shrink", "grow", "shrink", "grow"]


def test_neighbours_count_and_are_remembered_for_a_while(tree: Tree) -> None:
    tree.set(own=100)
    model = Model(granted=860)
    clock = Clock(tree, model)
    tree.set(others=200)
    clock.look()
    assert model.granted == (1000 - 200 - 40 - 100) * MiB
    tree.set(others=0)
    clock.look(10)
    assert model.granted == (1000 - 200 - 40 - 100) * MiB, "they may come back"
    clock.look(15)
    assert model.granted == (1000 - 40 - 100) * MiB


def test_near_the_limit_nothing_is_moved_but_dropped(tree: Tree) -> None:
    tree.set(own=900)
    model = Model(granted=860)
    model.touched = 800 * MiB
    clock = Clock(tree, model)
    clock.look()
    assert model.granted == (1000 - 40 - 100) * MiB and not model.urgent
    tree.set(others=90)
    clock.look()
    assert model.granted == (1000 - 90 - 40 - 100) * MiB and model.urgent == [True]


def test_pressure_takes_bit_by_bit_and_is_forgotten(tree: Tree) -> None:
    tree.set(own=100)
    model = Model(granted=860)
    clock = Clock(tree, model)
    clock.look()
    tree.stalled(10_000_000)
    clock.look()
    assert model.granted == 860 * MiB, "somebody below waits; there is room"
    for step in range(1, 6):
        before = model.touched = model.granted
        tree.set(own=before // MiB + 100, others=860 - before // MiB)
        clock.controller._neighbours.clear()
        tree.stalled(10_000_000 + step * 200_000)
        clock.look(0.25)
        assert 0.9 * before < model.granted < before
    tree.set(own=100, others=0)
    model.touched = 0
    clock.controller._neighbours.clear()
    clock.look(1.0)
    assert model.granted < before, "not yet calm"
    clock.look(20)
    assert model.granted > 0.95 * (1000 - 40 - 100) * MiB
    assert {event.kind for event in model.events} == {"pressure", "shrink", "grow"}


def test_after_pressure_giving_back_goes_on_for_a_moment(tree: Tree) -> None:
    """A lower limit is accepted the moment usage is below it, and then there must be something to spare."""
    tree.set(own=960)
    model = Model(granted=860)
    model.touched = 860 * MiB
    clock = Clock(tree, model)
    clock.look(0.25)
    tree.stalled(10_000_000)
    clock.look(0.25)
    steps = [model.granted]
    for _ in range(3):
        clock.now += 0.06
        clock.controller.tick(clock.now)
        steps.append(model.granted)
    assert steps == sorted(set(steps), reverse=True), "it stands still"
    clock.now += 0.1
    before = model.granted
    clock.controller.tick(clock.now)
    assert model.granted == before, "it goes on for ever"


def test_a_limit_that_leaves_too_little_is_told(tree: Tree) -> None:
    tree.set(own=100)
    model = Model(granted=860)
    clock = Clock(tree, model)
    tree.set(limit=150)
    clock.look()
    assert model.granted == model.least
    assert model.events[-1].kind == "short" and model.events[-1].after == model.least


def test_models_share(tree: Tree) -> None:
    tree.set(own=120)
    small, large = Model(granted=400, most=150), Model(granted=400, most=1050)
    clock = Clock(tree, small, large)
    clock.look()
    pool = 1000 - 40 - 40 - 2 * 60
    assert small.granted == pytest.approx((50 + (pool - 100) * 100 / 1100) * MiB, abs=8 * MiB)
    assert large.granted == pytest.approx((50 + (pool - 100) * 1000 / 1100) * MiB, abs=8 * MiB)
    before = large.granted
    loader = Model(granted=0)
    clock.controller.begin_load(loader)
    assert large.granted < 0.75 * before
    shrunk = large.granted
    clock.look()
    assert large.granted == shrunk, "nobody grows while a model is loaded"
    tree.set(limit=500)
    clock.look()
    assert large.granted < shrunk, "but limits are kept"
    tree.set(limit=1000)
    clock.look()
    assert clock.controller.squeeze() and (small.granted, large.granted) == (small.least, large.least)
    assert not clock.controller.squeeze()
    clock.controller.end_load(loader)
    clock.controller.end_load(loader)
    clock.look()
    assert large.granted == before
    clock.controller.leave(small)
    clock.look()
    assert large.granted == (1000 - 40 - 40 - 60) * MiB


def test_what_the_user_asked_for_is_the_most(tree: Tree) -> None:
    tree.set(own=120)
    model, other = Model(granted=860), Model(granted=0, least=0, most=0)
    model.asked = 400 * MiB
    clock = Clock(tree, model, other)
    clock.look()
    assert model.granted == (400 - 40 - 160) * MiB
    needs: list[int] = []
    clock.controller.ask(other, 300 * MiB, needs.append)
    assert needs == [(160 + 50) * MiB] and model.granted == (300 - 40 - 160) * MiB, "the last word counts"

    def refuse(needed: int) -> None:
        raise ValueError(needed)

    with pytest.raises(ValueError):
        clock.controller.ask(model, 200 * MiB, refuse)
    clock.look()
    assert model.granted == (300 - 40 - 160) * MiB
    clock.controller.ask(model, None, needs.append)
    assert model.granted == (1000 - 40 - 160) * MiB


def test_while_models_decode_what_only_prompts_need_is_lent(tree: Tree) -> None:
    tree.set(own=70)
    model = Model(granted=860)
    model.certain = 20 * MiB
    clock = Clock(tree, model)
    clock.look()
    assert model.granted == (1000 - 40 - 100) * MiB, "as planned: a prompt may come"
    model.decoding, model.grows = True, 5 * MiB
    clock.controller.look_soon()
    clock.look()
    assert model.granted == (1000 - 40 - 70 - 5) * MiB
    tree.set(own=90)
    clock.look()
    assert model.granted == (1000 - 40 - 90 - 5) * MiB, "it follows a context that fills"
    tree.set(own=130)
    clock.look()
    assert model.granted == (1000 - 40 - 110) * MiB, "no less than without"
    tree.set(own=70)
    clock.look()
    model.decoding = False
    clock.controller.recall()
    assert model.granted == (1000 - 40 - 100) * MiB, "before the prompt begins"


def test_nothing_is_lent_while_one_of_the_models_may_get_a_prompt(tree: Tree) -> None:
    tree.set(own=100)
    decodes, waits = Model(granted=400, most=450), Model(granted=400, most=450)
    decodes.decoding = True
    clock = Clock(tree, decodes, waits)
    clock.look()
    before = decodes.granted
    waits.decoding = True
    clock.controller.look_soon()
    clock.look()
    assert decodes.granted > before


def test_the_reserve_of_models_that_decode_follows_what_is_taken(tree: Tree) -> None:
    tree.set(own=100)
    model = Model(granted=860)
    model.decoding, model.steady = True, 10
    clock = Clock(tree, model)
    clock.look(0.75)
    assert model.granted == (1000 - 40 - 100) * MiB, "too little was seen"
    clock.look(3.0)
    assert model.granted == (1000 - 10 - 100) * MiB
    tree.set(others=4)
    clock.look(0.5)
    assert model.granted == (1000 - 10 - 2 * 4 - 4 - 100) * MiB, "a neighbour that moves"
    model.decoding = False
    clock.controller.recall()
    assert model.granted == (1000 - 40 - 4 - 100) * MiB


def test_nothing_is_lent_where_others_may_take_it_at_once(tree: Tree) -> None:
    tree.set(own=70)
    model = Model(granted=860)
    model.certain, model.decoding, model.steady = 20 * MiB, True, 10
    clock = Clock(tree, model)
    clock.look(4.0)
    lent, planned = (1000 - 10 - 70) * MiB, (1000 - 40 - 100) * MiB
    assert model.granted == lent
    tree.within(os.getpid(), 1)
    clock.now += 0.06
    clock.controller.tick(clock.now)
    assert model.granted == planned, "a glance tells"
    tree.within(os.getpid())
    clock.look(4.0)
    assert model.granted == lent
    (tree.group / "below").mkdir()
    clock.look(2.0)
    assert model.granted == planned, "groups of others below"
    (tree.group / "below").rmdir()
    clock.look(4.0)
    assert model.granted == lent
    tree.set(limit=900)
    clock.look(2.0)
    assert model.granted == planned - 100 * MiB, "a limit that moves may move again"
    clock.look(30.0)
    assert model.granted == lent - 100 * MiB
    tree.stalled(10_000_000)
    tree.set(own=890)
    model.touched = model.granted
    clock.look(0.5)
    assert model.granted <= planned - 100 * MiB


def test_of_the_machines_memory_the_whole_reserve_is_left(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    (tree.root / "proc/self/cgroup").write_text("")
    tree.set(own=100)
    (tree.root / "proc/meminfo").write_text("MemTotal: 1024000 kB\nMemAvailable: 400000 kB\n")
    model = Model(granted=860)
    model.decoding, model.steady = True, 10
    clock = Clock(tree, model)
    clock.look(3.0)
    assert model.granted == pytest.approx(400000 * 1024 + 100 * MiB - (40 + 100) * MiB, abs=MiB)


def test_what_is_planned_and_not_in_use_counts_for_another_load(tree: Tree) -> None:
    tree.set(own=100)
    model = Model(granted=300)
    clock = Clock(tree, model)
    clock.look()
    assert clock.controller.idle(70 * MiB) == 30 * MiB
    model.touched = 200 * MiB
    assert clock.controller.idle(270 * MiB) == 30 * MiB and clock.controller.idle(400 * MiB) == 0
    clock.controller.leave(model)
    assert clock.controller.idle(70 * MiB) == 0


def test_gauge(tree: Tree) -> None:
    gauge = Gauge(tree.group)
    assert not gauge.alarmed(100 * MiB)
    tree.set(own=950)
    assert gauge.alarmed(100 * MiB) and not gauge.alarmed(10 * MiB)
    tree.set(limit=2000)
    assert gauge.alarmed(10 * MiB) and not gauge.alarmed(10 * MiB), "once for each change"
    (tree.group / "memory.max").write_text("max\n")
    assert gauge.alarmed(0) and not gauge.alarmed(0)
    gauge.close()
    gauge.close()
    assert not Gauge(tree.root).alarmed(0), "a folder without the files"


def test_without_a_group(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    (tree.root / "proc/self/cgroup").write_text("")
    tree.set(own=100)
    (tree.root / "proc/meminfo").write_text("MemTotal: 1024000 kB\nMemAvailable: 400000 kB\n")
    model = Model(granted=860)
    clock = Clock(tree, model)
    clock.look()
    assert model.granted == pytest.approx(400000 * 1024 + 100 * MiB - (40 + 100) * MiB, abs=MiB)


# real groups

_CHILD = """
import json, os, sys
import llama_cpp, llama_flash
import numpy as np

path, out, n, flash, stop = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]), sys.argv[5]
llm = llama_cpp.Llama(path, n_ctx=512, n_batch=64, n_ubatch=64, n_threads=2, verbose=False, flash_offload=flash)
events = []
if flash:
    llm.flash.on_event(lambda event: events.append((event.kind, event.before, event.after)))
rng = np.random.default_rng(1)
llm.eval(rng.integers(0, llm.n_vocab(), 60).tolist())
tokens, hits = [], []
for i in range(n):
    if os.path.exists(stop):
        break
    print(i, hits[-1] if hits else 0, flush=True)
    tokens.append(int(llm.sample(temp=0.0)))
    if llm.n_tokens == 500:
        llm.reset()
    llm.eval([(tokens[-1] + 7 * i) % llm.n_vocab()])  # else some models repeat themselves
    if flash:
        last = llm.flash.stats().last
        panels = llm.flash.plan.panel_bytes  # of different lengths
        hits.append(last.hit_rate if last.hit_rate is not None else 1 - last.bytes_read / panels)
open(out, "w").write(json.dumps({"tokens": tokens, "hits": hits, "events": events}))
"""
_NEIGHBOUR = """
import random, sys, time
import numpy as np
limit, end, rng = int(sys.argv[1]), time.monotonic() + float(sys.argv[2]), random.Random(1)
while time.monotonic() < end:
    block = np.ones(int(limit * 0.2 * rng.random()) + 1, np.uint8)
    time.sleep(rng.random() * 0.5)
    del block
    time.sleep(rng.random() * 0.5)
"""
ENTER = 'echo $$ > "$1"/cgroup.procs || exit 126; shift; exec "$@"'


_OPTIONS: dict[str, dict[str, Any]] = {
    "moe": {"what": "experts"},
    "dense": {"what": "all"},
    "relu": {"predictor": "lowrank"},
}


def write_kind(kind: str, path: Path) -> Path:
    if kind == "relu":
        shape = OptShape(n_layer=6, n_embd=2048, n_ff=8192, n_head=16, n_vocab=8192, n_ctx=1024)
        write_opt(OptModel(shape), path, "bundled")
        return path
    return write(PRESETS[f"{kind}-400m"], path)[0]


@pytest.fixture(scope="module")
def moe(model_folder: Path) -> Iterator[Path]:
    path = write_kind("moe", model_folder / "controlled.gguf")
    yield path
    path.unlink()


@pytest.fixture(
    scope="module", params=["moe", *(pytest.param(kind, marks=pytest.mark.full) for kind in ("dense", "relu"))]
)
def kind_and_model(request: pytest.FixtureRequest, model_folder: Path) -> Iterator[tuple[str, Path]]:
    path = write_kind(request.param, model_folder / "any.gguf")
    yield request.param, path
    path.unlink()


class Group:
    """A v1 memory group with a limit that can be moved."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def number(self, name: str) -> int:
        return int((self.path / name).read_text())

    def limit(self, n_bytes: int) -> bool:
        """False: the kernel does not accept it, as long as more is in use."""
        try:
            (self.path / "memory.limit_in_bytes").write_text(str(n_bytes))
        except OSError:
            return False
        return True

    def kills(self) -> int:
        table = dict(line.split() for line in (self.path / "memory.oom_control").read_text().splitlines())
        return int(table.get("oom_kill", 0))

    def start(self, *command: object, **options: Any) -> subprocess.Popen[str]:
        arguments = ["sh", "-c", ENTER, "sh", str(self.path), *map(str, command)]
        return subprocess.Popen(arguments, text=True, **options)


class Generation:
    """What a child says while it generates: how far it is, and how much each token found in memory."""

    def __init__(self, child: subprocess.Popen[str]) -> None:
        self._child = child
        self.hits: list[float] = []  # of the token before each
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            self.hits.append(float(line.split()[1]))

    def until(self, condition: Callable[[], bool], what: str) -> int:
        """Waits for that. Returns the token at hand."""
        end = time.monotonic() + PATIENCE
        while not condition():
            assert self._child.poll() is None and time.monotonic() < end, what
            time.sleep(0.02)
        return len(self.hits)

    def until_token(self, n: int) -> int:
        return self.until(lambda: len(self.hits) >= n, f"token {n} never came")

    def hit_rate(self, first: int, last: int) -> float:
        """Of these tokens."""
        return sum(self.hits[first + 1 : last + 1]) / (last - first)


@contextmanager
def group() -> Iterator[Group]:
    require_caps()
    controller = memory_controller()
    if controller is None or controller.version != 1:
        pytest.skip("moves the limit of a cgroup v1 group; there is no v1 memory controller here")
    path = controller.group / f"llama-flash-test-{os.getpid()}"
    path.mkdir()
    try:
        yield Group(path)
    finally:
        for pid in (path / "cgroup.procs").read_text().split():
            os.kill(int(pid), signal.SIGKILL)
        for _ in range(100):
            try:
                path.rmdir()
                break
            except OSError:
                time.sleep(0.05)


def test_a_limit_that_moves_while_text_is_generated(kind_and_model: tuple[str, Path], tmp_path: Path) -> None:
    kind, model = kind_and_model
    size = model.stat().st_size
    free, moved, stop, never = (tmp_path / name for name in ("free.json", "moved.json", "stop", "never"))
    beside = 130 * MiB  # of the interpreter: the model is small
    high, low = beside + int(0.75 * size), beside + int(0.40 * size)
    with group() as it:
        assert it.limit(high)
        options = json.dumps({**_OPTIONS[kind], "warm_start": False})
        child = it.start(sys.executable, "-c", _CHILD, model, moved, 10**6, options, stop, stdout=subprocess.PIPE)
        said = Generation(child)
        before = said.hit_rate(30, said.until_token(62) - 2)
        # the kernel's refusal is what tells the process
        lowered = said.until(lambda: it.limit(low), "the lower limit was never accepted")
        assert it.number("memory.usage_in_bytes") <= low
        raised = said.until_token(lowered + 100)
        squeezed = said.hit_rate(raised - 32, raised - 2)
        assert it.limit(high)

        def is_back() -> bool:
            n = len(said.hits)
            return n > raised + 60 and said.hit_rate(n - 42, n - 2) > before - 0.05

        said.until(is_back, f"the cache does not come back: {before}, {squeezed}")
        stop.touch()
        assert child.wait() == 0
        assert it.kills() == 0
    actual = json.loads(moved.read_text())
    # neuron bundles do not run without flash offload: there the undisturbed run has all in memory
    plain = json.dumps({"predictor": "lowrank", "warm_start": False}) if kind == "relu" else "false"
    alone = [sys.executable, "-c", _CHILD, model, free, str(len(actual["tokens"])), plain, never]
    subprocess.run(alone, check=True, stdout=subprocess.DEVNULL)
    assert actual["tokens"] == json.loads(free.read_text())["tokens"] and len(set(actual["tokens"])) > 100
    kinds = [kind for kind, *_ in actual["events"]]
    assert "pressure" in kinds and "shrink" in kinds and kinds.index("shrink") < len(kinds) - kinds[::-1].index("grow")
    assert squeezed < before - 0.01, "the lower limit made no difference"


@pytest.mark.parametrize("seconds", [8.0, pytest.param(120.0, marks=pytest.mark.full)])
def test_a_neighbour_that_comes_and_goes(seconds: float, kind_and_model: tuple[str, Path], tmp_path: Path) -> None:
    kind, model = kind_and_model
    limit = 130 * MiB + int(0.75 * model.stat().st_size)
    with group() as it:
        assert it.limit(limit)
        options = json.dumps({**_OPTIONS[kind], "warm_start": False})
        never = tmp_path / "never"
        child = it.start(sys.executable, "-c", _CHILD, model, never, 10**6, options, never, stdout=subprocess.PIPE)
        said = Generation(child)
        said.until_token(40)
        neighbour = it.start(sys.executable, "-c", _NEIGHBOUR, limit, seconds)
        said.until(lambda: neighbour.poll() is not None, "the neighbour does not go")
        assert neighbour.returncode == 0 and child.poll() is None and it.kills() == 0
        child.terminate()
        child.wait()


# what goes on around it


def test_the_interpreter_ends_although_the_thread_is_at_work(model_file: Any) -> None:
    """Nothing is closed: the thread may be anywhere when the interpreter goes."""
    script = (
        "import sys, llama_cpp\n"
        "llm = llama_cpp.Llama(sys.argv[1], n_ctx=128, verbose=False, flash_offload={'what': 'experts'})\n"
    )
    for _ in range(8):
        subprocess.run([sys.executable, "-c", script, model_file("qwen3moe", "Q4_0")], check=True, timeout=PATIENCE)


def test_a_callback_may_close_the_model_and_raise(model_file: Any) -> None:
    llm = llama_cpp.Llama(str(model_file("qwen3moe")), n_ctx=128, verbose=False, flash_offload={"what": "experts"})
    seen: list[FlashEvent] = []

    def close(event: FlashEvent) -> None:
        seen.append(event)
        llm.close()
        raise SystemExit

    llm.flash.on_event(close)
    other = llama_cpp.Llama(str(model_file("qwen3moe")), n_ctx=128, verbose=False, flash_offload={"what": "experts"})
    assert [event.kind for event in seen][:1] == ["shrink"]
    other.eval([1, 2, 3])
    other.close()


def test_a_load_that_fails_does_not_stop_others(model_file: Any, tmp_path: Path) -> None:
    flash = {"what": "experts"}
    llm = llama_cpp.Llama(str(model_file("qwen3moe")), n_ctx=128, verbose=False, flash_offload=flash)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(model_file("qwen3moe").read_bytes()[:-100000])
    with pytest.raises(Exception) as kept:
        llama_cpp.Llama(str(broken), n_ctx=128, verbose=False, flash_offload=flash)
    assert kept.value is not None and not Controller.of_process()._loading
    failures: list[BaseException] = []

    def load() -> None:
        try:
            llama_cpp.Llama(str(model_file("qwen3moe")), n_ctx=128, verbose=False, flash_offload=flash).close()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert not failures
    llm.close()


def test_a_budget_that_is_set_while_the_model_runs(moe: Path) -> None:
    llm = llama_cpp.Llama(str(moe), n_ctx=512, n_batch=64, verbose=False, flash_offload={"what": "experts"})
    for i in range(20):
        llm.eval([i])
    session = llm.flash
    before, held = session.stats(), process_memory().anonymous
    target = session.memory.fixed + session.share.least + 100 * MiB
    session.set_budget(target)
    after = session.stats()
    assert after.budget.total == target and after.memory.total <= target
    assert after.memory.flash < before.memory.flash and process_memory().anonymous < held - 50 * MiB
    with pytest.raises(FlashBudgetError) as refused:
        session.set_budget("60MiB")
    assert refused.value.smallest < target
    assert session.stats().budget.total == target
    session.set_budget(int(refused.value.smallest * 1.03))
    llm.eval([1, 2])
    session.set_budget("auto")
    assert session.stats().memory.flash >= before.memory.flash - 8 * MiB
    for bad in ("-1", "5 parsecs", 0, float("nan"), ""):
        with pytest.raises(ValueError, match="number of bytes"):
            session.set_budget(bad)
    llm.close()
    with pytest.raises(FlashError, match="no flash memory"):
        session.set_budget("1GiB")


def test_a_child_of_a_fork_leaves_the_parent_alone(model_file: Any) -> None:
    llm = llama_cpp.Llama(str(model_file("qwen3moe")), n_ctx=128, verbose=False, flash_offload={"what": "experts"})
    for _ in range(10):
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                llm.close()
            os._exit(0)
        end = time.monotonic() + PATIENCE
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            assert time.monotonic() < end, "the child hangs"
            time.sleep(0.01)
    llm.eval([1, 2, 3])
    llm.close()


def test_files_do_not_stay_open(model_file: Any) -> None:
    def n_open() -> int:
        return len(os.listdir("/proc/self/fd"))

    gc.collect()  # what tests before have left is closed at any time
    counts = []
    for _ in range(4):
        llm = llama_cpp.Llama(str(model_file("qwen3moe")), n_ctx=128, verbose=False, flash_offload={"what": "experts"})
        time.sleep(0.3)
        llm.close()
        end = time.monotonic() + PATIENCE
        while Controller.of_process()._thread is not None and time.monotonic() < end:
            time.sleep(0.01)
        counts.append(n_open())
    assert counts[-1] <= counts[1]

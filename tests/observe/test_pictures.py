"""Pictures hold the numbers that the statistics do, are readable, and cost nothing when nobody draws."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ModelFile
from engines import Model, _open, open_flash, tokens
from matplotlib.backends.backend_agg import FigureCanvasAgg
from neurons import bundled, open_neurons, write_model

from llama_flash import FlashError, FlashOffload
from llama_flash.device.identity import Device
from llama_flash.device.profile import CHUNKS, DEPTHS, DeviceProfile, ReadRate
from llama_flash.native import bindings
from llama_flash.observe.history import LIMIT, Call, History
from llama_flash.observe.pictures import PICTURES, draw, draw_profile
from llama_flash.observe.residency import NEVER
from llama_flash.observe.residency_map import describe_maps
from llama_flash.observe.snapshot import Snapshot
from llama_flash.observe.stats import Counters, FlashStats

KINDS = ("experts", "panels", "neurons")

PROFILE = DeviceProfile(
    Device("8:0", "nvme0n1", "Some Vendor's Long Model Name 980 PRO 2TB", "S1", "ext4"),
    "2026-01-01T00:00:00+00:00",
    "cached",
    "io_uring",
    True,
    1 << 30,
    4e10,
    tuple(ReadRate(c, d, 1e5 * d**0.5 * c**0.6, 1e-4, 2e-4, 100) for c in CHUNKS for d in DEPTHS),
)


def opened(kind: str, model_file: ModelFile, model_folder: Path) -> Model:
    if kind == "neurons":
        return open_neurons(bundled(write_model(model_folder, "arcee", "F32")), predictor="exact", share=0.4)
    return open_flash(model_file("qwen3moe" if kind == "experts" else "llama", "Q4_0"), share=0.4)


@pytest.fixture(scope="module")
def seen(model_file: ModelFile, model_folder: Path) -> dict[str, tuple[Snapshot, FlashStats]]:
    """By kind of record: two prompts, each with generated tokens after it."""
    found = {}
    for kind in KINDS:
        with opened(kind, model_file, model_folder) as llm:
            for seed in (1, 2):
                llm.eval(tokens(40, seed=seed))
                for token in tokens(30, seed=seed + 10):
                    llm.eval([token])
            found[kind] = replace(llm.flash.snapshot(), profile=PROFILE), llm.flash.stats()
    return found


# what there is to draw


@pytest.mark.parametrize("kind", KINDS)
def test_calls_add_up_to_the_statistics(kind: str, seen: dict[str, tuple[Snapshot, FlashStats]]) -> None:
    snapshot, stats = seen[kind]
    assert [call.counters.tokens for call in snapshot.calls] == ([40] + 30 * [1]) * 2
    for part, is_generation in ((stats.prompt, False), (stats.decode, True)):
        total = sum((c.counters for c in snapshot.calls if c.is_generation == is_generation), Counters())
        assert total.as_dict() == pytest.approx(part.as_dict())
    assert snapshot.calls[-1].counters == stats.last
    for before, call in zip(snapshot.calls, snapshot.calls[1:], strict=False):
        assert before.ended <= call.began < call.ended
        assert call.counters.op_seconds <= call.seconds


@pytest.mark.parametrize("kind", KINDS)
def test_a_snapshot_is_the_same_after_a_file(
    kind: str, seen: dict[str, tuple[Snapshot, FlashStats]], tmp_path: Path
) -> None:
    snapshot, _ = seen[kind]
    snapshot.save(tmp_path / "snapshot")
    again = Snapshot.load(tmp_path / "snapshot")
    assert replace(again, residency=None, reuse=snapshot.reuse) == replace(snapshot, residency=None)
    assert (again.reuse == snapshot.reuse).all()
    assert again.residency is not None and snapshot.residency is not None
    assert again.residency.tensors == snapshot.residency.tensors
    assert (again.residency.place == snapshot.residency.place).all()
    assert (again.residency.age == snapshot.residency.age).all()


def test_the_history_is_bounded() -> None:
    history, raw = History(), bindings.llama_flash_stats()
    history.reset(raw)

    def more() -> None:
        for _ in range(LIMIT + 10):
            raw.bytes_read += 7
            history.begin()
            history.end(1, raw)

    tracemalloc.start()
    more()
    full, _ = tracemalloc.get_traced_memory()
    more()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert full < 600 * LIMIT
    assert after - full < 4096
    calls = history.calls()
    assert len(calls) == LIMIT
    assert {call.counters.bytes_read for call in calls} == {7}


def test_a_call_whose_begin_nobody_told_took_at_least_its_operations() -> None:
    now = 100.0
    history, raw = History(clock=lambda: now), bindings.llama_flash_stats()
    history.reset(raw)
    now, raw.op_ns = 110.0, 3_000_000_000
    history.end(50, raw)
    now, raw.op_ns = 111.0, 9_000_000_000  # of threads beside each other, say
    history.end(1, raw)
    assert [call.seconds for call in history.calls()] == pytest.approx([3.0, 1.0])


def test_matplotlib_is_not_imported_unless_something_is_drawn(model_file: ModelFile, tmp_path: Path) -> None:
    script = f"""
import sys, llama_cpp, llama_flash, llama_flash.cli
llm = llama_cpp.Llama({str(model_file("qwen3moe"))!r}, n_ctx=64, verbose=False, flash_offload={{"what": "experts"}})
llm.eval([1, 2, 3])
llm.eval([4])
snapshot = llm.flash.snapshot()
assert "matplotlib" not in sys.modules, "imported"
llm.flash.plot(path={str(tmp_path / "all.png")!r})
assert "matplotlib.pyplot" not in sys.modules, "a script needs no window"
sys.modules["matplotlib"] = None
try:
    llm.flash.plot()
except llama_flash.FlashError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "pictures need matplotlib: pip install 'matplotlib>=3.8' (the extra `plot`)\n"
    assert (tmp_path / "all.png").stat().st_size > 10_000


# what is drawn


def axes_of(figure: Any, title: str) -> Any:
    (axes,) = (a for a in figure.axes if a.get_title(loc="left").startswith(title))
    return axes


def steps(axes: Any) -> dict[str, Any]:
    """By label's first word: data of the step curves."""
    return {patch.get_label().split()[0]: patch.get_data() for patch in axes.patches}


def lines(axes: Any) -> dict[str, Any]:
    """By label: x and y."""
    return {line.get_label(): line.get_data() for line in axes.lines}


@pytest.mark.parametrize("kind", KINDS)
def test_the_time_of_a_token_is_split_as_the_statistics_say(
    kind: str, seen: dict[str, tuple[Snapshot, FlashStats]]
) -> None:
    snapshot, stats = seen[kind]
    axes = axes_of(draw(snapshot, "latency"), "Time of a token")
    drawn = steps(axes)
    heights = {name: (data.values - data.baseline) / 1e3 for name, data in drawn.items()}
    seconds = [call.seconds for call in snapshot.calls if call.is_generation]
    assert heights["waiting"].sum() == pytest.approx(stats.decode.wait_seconds)
    assert heights["memory"].sum() == pytest.approx(stats.decode.manage_seconds + stats.decode.repack_seconds)
    assert drawn["memory"].values / 1e3 == pytest.approx(seconds)
    assert (heights["computing"] >= 0).all() and heights["computing"].sum() > 0
    assert axes.get_ylabel() == "ms per token"


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_and_hits_over_time_are_those_of_the_calls(
    kind: str, seen: dict[str, tuple[Snapshot, FlashStats]]
) -> None:
    snapshot, stats = seen[kind]
    decoded = [call.counters for call in snapshot.calls if call.is_generation]
    figure = draw(snapshot, ["hits", "bytes"])
    axes = axes_of(figure, "Read from flash")
    unit = {"KiB": 1 << 10, "MiB": 1 << 20}[axes.get_ylabel().split()[0]]
    assert steps(axes)["read"].values * unit == pytest.approx([c.bytes_read for c in decoded])
    assert steps(axes)["read"].values.sum() * unit == pytest.approx(stats.decode.bytes_read)
    assert steps(axes)["read"].edges == pytest.approx(np.arange(61) + 0.5)
    (mean,) = (y for label, (_, y) in lines(axes).items() if label.startswith("mean"))
    assert mean[0] * unit == pytest.approx(stats.decode.bytes_per_token)

    axes = axes_of(figure, "Hit rate")
    if kind != "panels":
        assert lines(axes)["each token"][1] == pytest.approx([100 * c.hit_rate for c in decoded])
        assert f"{100 * stats.decode.hit_rate:.0f} % of the {kind}" in axes.get_title(loc="left")
        smooth = lines(axes)[f"{kind}, mean of 16"][1]
        last = sum(decoded[-16:], Counters())
        assert len(smooth) == 60 and smooth[-1] == pytest.approx(100 * last.hit_rate)
    else:
        (share,) = {float(value) for value in steps(axes)["panels,"].values}
        found = stats.decode.panel_hits / (stats.decode.panel_hits + stats.decode.panel_reads)
        assert share == pytest.approx(100 * found)
        assert 0 < share < 100
    assert [x[0] for x, _ in (line.get_data() for line in axes.lines if line.get_label() == "_")] == [30.5]


def calls(n: int, seconds: float = 0.01) -> tuple[Call, ...]:
    rng = np.random.default_rng(0)
    return tuple(
        Call(i, i + seconds, Counters(1, 1, int(rng.integers(1, 9)) << 20, hits=int(rng.integers(9)), misses=3))
        for i in range(n)
    )


def test_many_tokens_are_drawn_as_means_that_lose_nothing(seen: dict[str, tuple[Snapshot, FlashStats]]) -> None:
    many = calls(1001)
    snapshot = replace(seen["experts"][0], calls=many, decoded_before=5000)
    figure = draw(snapshot, ["bytes", "hits"])
    axes = axes_of(figure, "Read from flash")
    data = steps(axes)["read"]
    counts = np.diff(data.edges)
    assert len(counts) < 200 and counts.sum() == 1001 and set(counts[:-1]) == {7}
    assert (data.values * counts).sum() == pytest.approx(sum(c.counters.bytes_read for c in many) / (1 << 20))
    assert (data.edges[0], data.edges[-1]) == (5000.5, 6001.5)
    assert "each step: mean of 7" in axes.get_xlabel()


@pytest.mark.parametrize("kind", ["experts", "neurons"])
def test_reuse_is_what_was_newly_active(kind: str, seen: dict[str, tuple[Snapshot, FlashStats]]) -> None:
    snapshot, stats = seen[kind]
    axes = axes_of(draw(snapshot, "reuse"), "Reuse")
    windows, found = lines(axes)["used by one of the k tokens before"]
    if kind == "neurons":
        newly = stats.total.neurons_newly_active / stats.total.neurons_active
        assert found[list(windows).index(5)] == pytest.approx(100 * (1 - newly))
    assert found[-1] == pytest.approx(100 * (1 - snapshot.reuse[0] / snapshot.reuse.sum()))
    assert (np.diff(found) >= 0).all()
    name = f"share of all {kind} that k tokens use"
    used, share = lines(axes)[name]
    assert snapshot.residency is not None
    ages = np.concatenate([snapshot.residency.age[snapshot.residency.of(t)] for t in snapshot.residency.tensors])
    # as many tokens as came one by one since the last prompt
    assert list(used) == list(range(1, 1 + min(30, int(windows[-1]))))
    assert share == pytest.approx([100 * (ages < k).mean() for k in used])
    hits = [y[0] for label, (_, y) in lines(axes).items() if label.startswith("measured hit rate")]
    assert hits == pytest.approx([100 * stats.decode.hit_rate])  # type: ignore[operator]


@pytest.mark.parametrize("kind", KINDS)
def test_the_map_shows_each_record_once(kind: str, seen: dict[str, tuple[Snapshot, FlashStats]]) -> None:
    snapshot, _ = seen[kind]
    found = snapshot.residency
    assert found is not None
    (m,) = describe_maps(snapshot).maps
    assert (m.kind, m.n_records, m.n_there) == (kind, len(found.place), int(found.in_dram.sum()))
    assert m.rows == ("0", "1", "2")
    axes = axes_of(draw(snapshot, "residency"), "In memory")
    assert f"{m.n_there} of {m.n_records} {kind}" in axes.get_title(loc="left")
    cells = axes.images[0].get_array()
    assert cells.count() == m.n_records  # without those that there are not
    if kind == "panels":
        assert [int((cells == value).sum()) for value in (0, 2)] == [
            int((found.place == 0).sum()),
            int((found.place >= 3).sum()),
        ]
        return
    assert int((cells >= 0).sum()) == m.n_there > 0
    ages = found.age[found.in_dram & (found.age != NEVER)]
    drawn = np.sort(cells.compressed()[(cells.compressed() >= 0)])[: len(ages)]
    assert 10**drawn - 1 == pytest.approx(np.sort(ages), abs=1e-6)
    if kind == "experts":
        assert [name for name, _, _ in m.parts] == ["ffn_gate", "ffn_up", "ffn_down"]
        tensor = next(t for t in found.tensors if t.name == "blk.1.ffn_up_exps.weight")
        there = found.in_dram[found.of(tensor)]
        assert ((cells[1, 16:32] >= 0) == there).all()


def test_what_was_read_ahead_is_told_from_what_was_used(seen: dict[str, tuple[Snapshot, FlashStats]]) -> None:
    snapshot, _ = seen["experts"]
    assert snapshot.residency is not None
    fresh = replace(snapshot.residency, age=np.full_like(snapshot.residency.age, NEVER))
    axes = axes_of(draw(replace(snapshot, residency=fresh), "residency"), "In memory")
    assert "read ahead, not used yet" in [text.get_text() for text in axes.get_legend().get_texts()]
    image = axes.images[0]
    colours = {tuple(image.to_rgba(value)) for value in image.get_array().compressed()}
    assert len(colours) == 2


def test_a_device_is_drawn_with_all_its_rates(tmp_path: Path) -> None:
    (axes,) = draw_profile(PROFILE, tmp_path / "device.png").axes
    drawn = {
        line.get_label().removesuffix(" in flight"): dict(zip(*line.get_data(), strict=True)) for line in axes.lines
    }
    assert drawn == {
        str(depth): {r.chunk: pytest.approx(r.bytes_per_second / 1e9) for r in PROFILE.reads if r.depth == depth}
        for depth in DEPTHS
    }
    assert (tmp_path / "device.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


# how it looks


def overlapping(figure: Any) -> Iterator[str]:
    """Texts that lie on each other or beyond the edge."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    boxes = []
    for axes in figure.axes:
        texts = [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
            texts += [label for at, label in ticks if low <= at <= high]  # others are not drawn
        if legend := axes.get_legend():
            texts += legend.get_texts()
        boxes += [(t.get_text(), t.get_window_extent(renderer)) for t in texts if t.get_visible() and t.get_text()]
    boxes.append(("heading", figure._suptitle.get_window_extent(renderer)))
    width, height = canvas.get_width_height()
    for i, (text, box) in enumerate(boxes):
        if box.x0 < -0.5 or box.y0 < -0.5 or box.x1 > width + 0.5 or box.y1 > height + 0.5:
            yield f"{text!r} is cut off"
        for other, beside in boxes[i + 1 :]:
            if (
                min(box.x1, beside.x1) - max(box.x0, beside.x0) > 1
                and min(box.y1, beside.y1) - max(box.y0, beside.y0) > 1
            ):
                yield f"{text!r} is on {other!r}"


@pytest.mark.parametrize("kind", [KINDS[0], *(pytest.param(kind, marks=pytest.mark.full) for kind in KINDS[1:])])
def test_no_text_hides_another(kind: str, seen: dict[str, tuple[Snapshot, FlashStats]]) -> None:
    snapshot = replace(seen[kind][0], model="qwen3-30b-a3b-instruct-2507-q4_k_m-00001-of-00003.gguf")
    slow = replace(snapshot, calls=(*snapshot.calls, *calls(700, seconds=12.3)))
    for shown in (snapshot, slow):
        assert list(overlapping(draw(shown))) == []
    for name in PICTURES:
        if name != "drafts" and (name != "reuse" or kind != "panels"):  # of which there is nothing to be seen
            assert list(overlapping(draw(snapshot, name))) == []
    drafted = replace(snapshot, drafts=((5, 3), (4, 4), (15, 2)))
    assert list(overlapping(draw(drafted, "drafts"))) == []


@pytest.mark.full
def test_all_pictures_are_in_one_figure(seen: dict[str, tuple[Snapshot, FlashStats]], tmp_path: Path) -> None:
    snapshot, _ = seen["experts"]
    for suffix, magic in ((".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")):
        path = tmp_path / f"all{suffix}"
        figure = draw(snapshot, path=path)
        assert path.read_bytes().startswith(magic)
    titles = [axes.get_title(loc="left").split(":")[0].split()[0] for axes in figure.axes if axes.get_title(loc="left")]
    assert titles == ["Time", "Hit", "Read", "Reuse", "Device", "In"]


# what cannot be drawn


def test_what_there_is_nothing_to_show_for_is_said(model_file: ModelFile, tmp_path: Path) -> None:
    with open_flash(model_file("qwen3moe", "Q4_0")) as llm:
        with pytest.raises(FlashError, match="no picture of latency: no token has been generated"):
            llm.flash.plot("latency")
        with pytest.raises(FlashError, match="no profile of the model's device is kept"):
            llm.flash.plot("device")
        with pytest.raises(ValueError, match="no picture is called 'heat'; there are latency, hits"):
            llm.flash.plot(["latency", "heat"])
        with pytest.raises(ValueError, match=r"\.png, \.svg, \.pdf"):
            llm.flash.plot(path=tmp_path / "picture.txt")
        with pytest.raises(FileNotFoundError, match="no such directory"):
            llm.flash.plot(path=tmp_path / "no" / "picture.png")
        assert len(llm.flash.plot().axes) == 2  # a map, with its colours
        llm.eval([1, 2, 3])
        llm.eval([4])
    with pytest.raises(FlashError, match="no picture of residency: the model is closed"):
        llm.flash.plot("residency")
    assert len(llm.flash.plot().axes) == 3  # what calls have done stays


def test_a_model_that_is_all_in_memory_has_a_latency(model_file: ModelFile) -> None:
    with _open(model_file("llama"), flash_offload=FlashOffload()) as llm:
        llm.eval([1, 2, 3])
        for token in range(5):
            llm.eval([token])
        assert llm.flash.stats().mode == "resident"
        (axes,) = llm.flash.plot().axes
        drawn = steps(axes)
        assert (drawn["computing"].values == drawn["memory"].values).all()
        assert len(drawn["computing"].values) == 5
        with pytest.raises(FlashError, match="no picture of residency: all weights are in memory"):
            llm.flash.plot("residency")
        with pytest.raises(FlashError, match="no picture of hits: nothing is read from flash"):
            llm.flash.plot("hits")


# the command


def flash(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llama_flash", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, env={**os.environ, **environment})


@pytest.mark.parametrize("cap", [(), ("--cap", "50%", "--json")])
def test_run_draws(cap: tuple[str, ...], model_file: ModelFile, tmp_path: Path) -> None:
    result = flash("run", model_file("qwen3moe"), "-p", "hello", "-n", 8, "--plot", tmp_path / "run.png", *cap)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run.png").read_bytes()[:4] == b"\x89PNG"
    assert f"picture in {tmp_path / 'run.png'}" in result.stderr
    if cap:
        report = json.loads(result.stdout)
        assert report["flash"]["mode"] == "flash"
        assert report["cap"]["oom_kills"] == 0


@pytest.mark.parametrize("command", ["run", "profile"])
def test_without_matplotlib_a_command_says_so_before_it_works(
    command: str, model_file: ModelFile, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['matplotlib'] = None\n")
    result = flash(command, model_file("qwen3moe"), "--plot", tmp_path / "x.png", PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert result.stderr == "llama-flash: pictures need matplotlib: pip install 'matplotlib>=3.8' (the extra `plot`)\n"
    assert result.stdout == ""


def test_drafts_are_drawn_as_they_were_checked(tmp_path: Path) -> None:
    nothing = np.zeros(0, np.uint64)
    drafts = ((5, 3), (4, 4), (15, 2))
    snapshot = Snapshot("m", "flash", "none", 1, 1, (), 0, None, False, nothing, None, None, drafts)
    snapshot.save(tmp_path / "snapshot")
    assert Snapshot.load(tmp_path / "snapshot").drafts == drafts
    (axes,) = draw(snapshot, "drafts").axes
    assert "38% accepted, 4.00 tokens" in axes.get_title(loc="left")
    with pytest.raises(FlashError, match="no draft has been checked"):
        draw(replace(snapshot, drafts=()), "drafts")

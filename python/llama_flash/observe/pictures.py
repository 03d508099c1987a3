"""Pictures of what flash offload does, by matplotlib (the extra `plot`), which nothing else imports.

Each function draws one of them from a snapshot; docs/how-to/pictures.md says how to read them.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..device.profile import DeviceProfile
from ..errors import FlashError
from ..sizes import format_size
from .history import Call
from .residency_map import describe_maps, draw_maps
from .snapshot import Snapshot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PICTURES", "check_target", "draw", "draw_profile"]

Floats = npt.NDArray[np.float64]

_SUFFIXES = (".png", ".svg", ".pdf")
_BINS = 160  # of a curve over time: so many can be told apart
_PROMPTS = 24  # that are shown; more would hide the rest
_SMOOTH = 16  # tokens over which a rate is averaged
_SAID_WINDOW = 5  # tokens: the window of the paper's figures
_DPI = 120
_WIDTH, _HEIGHT = 6.4, 3.5  # inches, of one picture

# Okabe and Ito's colours, which can be told apart with any kind of colour vision, and by their lightness
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#E69F00", "#009E73", "#6b6b6b"

_STYLE = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8a8a",
    "axes.facecolor": "white",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "white",
    "svg.hashsalt": "llama-flash",  # the same picture is the same file
}


def draw(snapshot: Snapshot, what: str | Sequence[str] = "all", path: str | os.PathLike[str] | None = None) -> Figure:
    """One figure of the pictures asked for. Arguments and errors are FlashSession.plot's."""
    if path is not None:
        check_target(path)
    names = _chosen(snapshot, what)
    matplotlib = _matplotlib()
    with matplotlib.rc_context(_STYLE):
        figure: Figure = _figure_of(snapshot, names)
        if path is not None:
            figure.savefig(path, dpi=_DPI)
    return figure


def _figure_of(snapshot: Snapshot, names: list[str]) -> Any:
    """Two pictures in a row; one that is alone has the row to itself, and so has the map, below the others."""
    small = [name for name in names if name != "residency"]
    with_map = "residency" in names
    columns = 2 if len(small) > 1 or (small and with_map) else 1
    heights = [_HEIGHT] * -(-len(small) // columns) + ([describe_maps(snapshot).inches] if with_map else [])
    width = _WIDTH * (columns if small else 1.5)
    figure = _new_figure((width, sum(heights) + 0.5))
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08, hspace=0.02, wspace=0.02)
    rows = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    for i, name in enumerate(small):
        row, column = divmod(i, columns)
        alone = i == len(small) - 1 and column == 0
        _SMALL[name][0](figure.add_subplot(rows[row, :] if alone else rows[row, column]), snapshot)
    if with_map:
        draw_maps(figure, rows[-1, :], snapshot)
    heading = textwrap.fill(re.sub(r"(\d) ", "\\1\u00a0", _heading(snapshot)), int(12.5 * width))
    figure.suptitle(heading, x=0.01, ha="left", fontsize=10, color=_GREY)
    return figure


def draw_profile(profile: DeviceProfile, path: str | os.PathLike[str] | None = None) -> Figure:
    """A device's throughput by size of read and reads in flight. Errors are FlashSession.plot's."""
    if path is not None:
        check_target(path)
    matplotlib = _matplotlib()
    with matplotlib.rc_context(_STYLE):
        figure: Figure = _new_figure((1.15 * _WIDTH, 1.15 * _HEIGHT))
        _profile(figure.add_subplot(), profile)
        if path is not None:
            figure.savefig(path, dpi=_DPI)
    return figure


def check_target(path: str | os.PathLike[str]) -> None:
    """Raises, before work is done for it, what drawing to `path` would raise: FlashError, ValueError or OSError."""
    target = Path(path)
    if target.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"{target}: pictures are written as {', '.join(_SUFFIXES)}")
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a directory; a picture is a file")
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"no such directory: {target.absolute().parent}")
    if not os.access(target if target.exists() else target.absolute().parent, os.W_OK):
        raise PermissionError(f"{target} cannot be written")
    _require()


def _require() -> None:
    if find_spec("matplotlib") is None:
        raise FlashError("pictures need matplotlib: pip install 'matplotlib>=3.8' (the extra `plot`)")


def _matplotlib() -> Any:
    _require()
    return importlib.import_module("matplotlib")


def _new_figure(size: tuple[float, float]) -> Any:
    if "IPython" in sys.modules:
        # pyplot teaches a notebook to show figures; closed, it is shown where it is returned, and not once more
        pyplot = importlib.import_module("matplotlib.pyplot")
        figure = pyplot.figure(figsize=size, layout="constrained")
        pyplot.close(figure)
        return figure
    # no window, whatever the backend
    return importlib.import_module("matplotlib.figure").Figure(figsize=size, layout="constrained")


def _heading(snapshot: Snapshot) -> str:
    how = "" if snapshot.predictor == "none" else f", active neurons: {snapshot.predictor}"
    where = {
        "flash": f"{format_size(snapshot.flash_memory)} for weights from flash, "
        f"budget {format_size(snapshot.budget)}{how}",
        "resident": "all in memory",
        "nothing": "nothing on flash",
    }[snapshot.mode]
    return f"{snapshot.model}: {where}"


# what there is


def _chosen(snapshot: Snapshot, what: str | Sequence[str]) -> list[str]:
    asked = [what] if isinstance(what, str) else list(what)
    for name in asked:
        if name not in PICTURES and name != "all":
            raise ValueError(f"no picture is called {name!r}; there are {', '.join(PICTURES)}, and 'all'")
    missing = {name: _missing(name, snapshot) for name in PICTURES}
    if "all" in asked or not asked:
        asked = [name for name in PICTURES if not missing[name]]
        if not asked:
            raise FlashError(f"nothing to show yet: {missing['latency']}")
    for name in asked:
        if missing[name]:
            raise FlashError(f"no picture of {name}: {missing[name]}")
    return [name for name in PICTURES if name in asked]


def _missing(name: str, snapshot: Snapshot) -> str:
    """Why there is nothing to draw; "" if there is."""
    if name == "residency":
        if snapshot.mode != "flash":
            return "all weights are in memory" if snapshot.mode == "resident" else "nothing is on flash"
        return "" if snapshot.residency is not None else "the model is closed"
    return _SMALL[name][1](snapshot)


def _decoded(snapshot: Snapshot) -> list[Call]:
    return [call for call in snapshot.calls if call.is_generation]


def _no_tokens(snapshot: Snapshot) -> str:
    return "" if _decoded(snapshot) else "no token has been generated"


def _no_lookups(snapshot: Snapshot) -> str:
    if snapshot.mode != "flash":
        return "nothing is read from flash"
    return _no_tokens(snapshot)


def _no_reuse(snapshot: Snapshot) -> str:
    if snapshot.reuse.any():
        return ""
    if snapshot.mode == "flash" and len(snapshot.reuse) and (snapshot.picks_neurons or _has_experts(snapshot)):
        return "no token has been generated"
    return (
        "the model is closed"
        if snapshot.mode == "flash" and not len(snapshot.reuse)
        else "no weight is chosen by token"
    )


def _no_profile(snapshot: Snapshot) -> str:
    return "" if snapshot.profile else "no profile of the model's device is kept: `llama-flash profile` makes one"


def _no_drafts(snapshot: Snapshot) -> str:
    return "" if snapshot.drafts else "no draft has been checked"


def _has_experts(snapshot: Snapshot) -> bool:
    return snapshot.residency is not None and any(t.kind == "experts" for t in snapshot.residency.tensors)


# over time


class _Time:
    """Generated tokens in bins of the same size: `edges` are token numbers, the first token's is 1."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.calls = _decoded(snapshot)
        n = len(self.calls)
        self.size = -(-n // _BINS)
        self.starts = np.arange(0, n, self.size)
        self.counts = np.diff([*self.starts, n])
        self.edges = snapshot.decoded_before + 0.5 + np.array([*self.starts, n])
        self.centres = (self.edges[:-1] + self.edges[1:]) / 2
        # a prompt lies before the generated token that follows it
        tokens, self.prompts = snapshot.decoded_before, []
        for call in snapshot.calls:
            if call.is_generation:
                tokens += 1
            elif tokens > snapshot.decoded_before:
                self.prompts.append(tokens + 0.5)

    def values(self, of: Callable[[Call], float]) -> Floats:
        return np.array([of(call) for call in self.calls], np.float64)

    def sums(self, of: Callable[[Call], float]) -> Floats:
        return np.add.reduceat(self.values(of), self.starts)

    def means(self, of: Callable[[Call], float]) -> Floats:
        return self.sums(of) / self.counts

    def finish(self, axes: Any) -> None:
        axes.set_xlim(self.edges[0], self.edges[-1])
        axes.xaxis.get_major_locator().set_params(integer=True)
        said = [f"each step: mean of {self.size}"] if self.size > 1 else []
        prompts = [at for at in dict.fromkeys(self.prompts) if at < self.edges[-1]]
        if 0 < len(prompts) <= _PROMPTS:
            said.append("dotted: a prompt before it")
            for at in prompts:
                axes.axvline(at, color="black", linewidth=1.0, linestyle=(0, (1, 2)), label="_")
        axes.set_xlabel("generated token" + (f" ({'; '.join(said)})" if said else ""))


def _latency(axes: Any, snapshot: Snapshot) -> None:
    time = _Time(snapshot)
    seconds = time.means(lambda call: call.seconds)
    wait = time.means(lambda call: call.counters.wait_seconds)
    manage = time.means(lambda call: call.counters.manage_seconds + call.counters.repack_seconds)
    parts = (
        ("computing", _BLUE, np.maximum(0, seconds - wait - manage)),
        ("waiting for reads", _ORANGE, wait),
        ("memory management", _GREEN, manage),
    )
    mean = float(np.average(seconds, weights=time.counts))
    unit, scale = ("s", 1.0) if mean >= 1 else ("ms", 1e3)
    base = np.zeros(len(seconds))
    for name, colour, values in parts:
        share = np.average(values, weights=time.counts) / mean if mean else 0.0
        top = base + scale * values
        axes.stairs(top, time.edges, baseline=base, fill=True, color=colour, label=f"{name} {100 * share:.0f} %")
        base = top
    _bounded(axes, base, unit)
    axes.set_ylabel(f"{unit} per token")
    rate = f", {1 / mean:.{1 if mean > 0.1 else 0}f} tokens/s" if mean else ""
    time.finish(axes)
    _title(axes, f"Time of a token: {scale * mean:.3g} {unit} on average{rate}")


def _hits(axes: Any, snapshot: Snapshot) -> None:
    time = _Time(snapshot)
    totals = [call.counters for call in time.calls]
    hits, misses = sum(c.hits for c in totals), sum(c.misses for c in totals)
    pinned, streamed = sum(c.panel_hits for c in totals), sum(c.panel_reads for c in totals)
    said = []
    if hits + misses:
        found, asked = (
            time.values(f) for f in (lambda c: c.counters.hits, lambda c: c.counters.hits + c.counters.misses)
        )
        each = 100 * np.add.reduceat(found, time.starts) / np.maximum(1, np.add.reduceat(asked, time.starts))
        kind = "neurons" if snapshot.predictor != "none" else "experts"
        axes.plot(
            time.centres,
            each,
            color=_BLUE,
            alpha=0.35,
            linewidth=0.9,
            label="each token" if time.size == 1 else "each step",
        )
        smooth = 100 * _running(found, _SMOOTH) / np.maximum(1, _running(asked, _SMOOTH))
        at = time.edges[0] + 0.5 + np.arange(len(found))
        axes.plot(at, smooth, color=_BLUE, linewidth=2.0, label=f"{kind}, mean of {_SMOOTH}")
        said.append(f"{100 * hits / (hits + misses):.0f} % of the {kind}")
    if pinned + streamed:
        counts = (time.sums(lambda c: c.counters.panel_hits), time.sums(lambda c: c.counters.panel_reads))
        name = "panels and runs of neurons" if snapshot.predictor == "off" else "panels"
        axes.stairs(
            100 * counts[0] / np.maximum(1, counts[0] + counts[1]), time.edges, baseline=None, color=_ORANGE,
            linewidth=2.0, linestyle="--", label=f"{name}, pinned",
        )  # fmt: skip
        said.append(f"{100 * pinned / (pinned + streamed):.0f} % of the {name}")
    axes.set_ylim(0, 103)
    axes.set_ylabel("% found in memory")
    time.finish(axes)
    _title(axes, f"Hit rate: {', '.join(said)}" if said else "Hit rate: nothing was asked for")


def _bytes(axes: Any, snapshot: Snapshot) -> None:
    time = _Time(snapshot)
    read = time.means(lambda call: call.counters.bytes_read)
    mean = float(np.average(read, weights=time.counts))
    unit, scale = next((u, s) for u, s in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)) if mean >= s or u == "KiB")
    axes.stairs(read / scale, time.edges, fill=True, color=_BLUE, label="read")
    axes.axhline(mean / scale, color=_ORANGE, linewidth=1.6, linestyle="--", label=f"mean {mean / scale:.3g} {unit}")
    _bounded(axes, read / scale, unit)
    axes.set_ylabel(f"{unit} per token")
    time.finish(axes)
    _title(axes, f"Read from flash: {mean / scale:.3g} {unit} per token")


def _drafts(axes: Any, snapshot: Snapshot) -> None:
    drafted, accepted = np.array(snapshot.drafts, np.float64).T
    size = -(-len(drafted) // _BINS)
    starts = np.arange(0, len(drafted), size)
    counts = np.diff([*starts, len(drafted)])
    edges = 0.5 + np.array([*starts, len(drafted)])
    for values, color, name in ((drafted, _GREY, "drafted"), (accepted, _BLUE, "accepted")):
        axes.stairs(np.add.reduceat(values, starts) / counts, edges, fill=True, color=color, label=name)
    axes.set_ylim(0, 1.06 * drafted.max())
    axes.set_ylabel("tokens of a draft")
    axes.set_xlabel("pass that checked one" + (f" (each step: mean of {size})" if size > 1 else ""))
    _title(
        axes, f"Drafts: {accepted.sum() / drafted.sum():.0%} accepted, {1 + accepted.mean():.2f} tokens per such pass"
    )


def _bounded(axes: Any, values: Floats, unit: str) -> None:
    """A y axis from 0; a few values far beyond the others are cut off, and that is said."""
    usual, top = float(np.percentile(values, 97)), float(values.max(initial=0.0))
    if top <= 2.5 * usual or usual == 0:
        axes.set_ylim(0, 1.06 * top or 1.0)
        return
    limit = 1.5 * usual
    n = int((values > limit).sum())
    axes.set_ylim(0, limit)
    axes.annotate(
        f"{n} higher, up to {top:.3g} {unit}", (1, 1), xycoords="axes fraction", xytext=(-3, -3),
        textcoords="offset points", ha="right", va="top", fontsize=8, color="black",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5},
    )  # fmt: skip


def _running(values: Floats, window: int) -> Floats:
    """Sums of each value and up to `window` - 1 before it."""
    total = np.concatenate([np.zeros(window), np.cumsum(values)])
    sums: Floats = total[window:] - total[:-window]
    return sums


# by window


def _reuse(axes: Any, snapshot: Snapshot) -> None:
    uses = snapshot.reuse.astype(np.float64)
    far = int(np.flatnonzero(uses[1:]).max(initial=0)) + 1  # the longest distance there was
    windows = np.arange(1, far + 1)
    found = 100 * np.cumsum(uses[1 : far + 1]) / uses.sum()
    kind = "active neurons" if snapshot.picks_neurons else "experts"
    axes.plot(windows, found, color=_BLUE, linewidth=2.0, label="used by one of the k tokens before")
    memory = _working_set(snapshot, far)
    if len(memory) > 1:
        axes.plot(
            np.arange(1, len(memory) + 1), memory, color=_ORANGE, linewidth=2.0, linestyle="--",
            label=f"share of all {kind.split()[-1]} that k tokens use",
        )  # fmt: skip
    totals = [call.counters for call in _decoded(snapshot)]
    hits, misses = sum(c.hits for c in totals), sum(c.misses for c in totals)
    if hits + misses:
        rate = 100 * hits / (hits + misses)
        axes.axhline(
            rate, color=_GREEN, linewidth=1.4, linestyle=(0, (1, 1.5)), label=f"measured hit rate, {rate:.0f} %"
        )
    if snapshot.picks_neurons and snapshot.window is not None and 1 <= snapshot.window <= far:
        axes.axvline(
            snapshot.window, color=_GREY, linewidth=1.4, linestyle="-.", label=f"room for {snapshot.window:.0f} tokens"
        )
    axes.set_xscale("log", base=2)
    axes.set_xlim(0.92, max(2, far) * 1.08)
    ticks = [2**i for i in range(9) if 2**i <= max(2, far)]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, 103)
    axes.set_xlabel("window k, tokens")
    axes.set_ylabel(f"% of a token's {kind}")
    at = min(far, _SAID_WINDOW)
    _title(axes, f"Reuse: {found[at - 1]:.0f} % used again within {at} tokens", columns=2)


def _working_set(snapshot: Snapshot, most: int) -> Floats:
    """% of all experts or neurons that the last 1, 2, ... tokens have used, as far back as they came one by one."""
    single = 0
    for call in reversed(snapshot.calls):
        if not call.is_generation:
            break
        single += 1
    if snapshot.residency is None:
        return np.zeros(0)
    chosen = [t for t in snapshot.residency.tensors if t.kind != "panels"]
    ages = np.concatenate([snapshot.residency.age[snapshot.residency.of(t)] for t in chosen])
    used = np.bincount(ages[ages < most], minlength=most)
    shares: Floats = 100 * np.cumsum(used)[: min(single, most)] / len(ages)
    return shares


# the device


def _device(axes: Any, snapshot: Snapshot) -> None:
    assert snapshot.profile is not None
    _profile(axes, snapshot.profile)


def _profile(axes: Any, profile: DeviceProfile) -> None:
    chunks, depths = (sorted({getattr(read, name) for read in profile.reads}) for name in ("chunk", "depth"))
    scale = importlib.import_module("matplotlib").colormaps["viridis_r"]
    for i, depth in enumerate(depths):
        curve = sorted((read.chunk, read.bytes_per_second / 1e9) for read in profile.reads if read.depth == depth)
        colour = scale(0.15 + 0.85 * i / max(1, len(depths) - 1))
        marker = "osD^vPX*"[i % 8]
        axes.plot(
            *zip(*curve, strict=True), color=colour, marker=marker, markersize=4.5, linewidth=1.8,
            label=f"{depth} in flight",
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(chunks, [_short(chunk) for chunk in chunks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"bytes of a random read\n{textwrap.shorten(str(profile.device), 90)}")
    axes.set_ylabel("GB/s")
    best = max(read.bytes_per_second for read in profile.reads)
    _title(axes, f"Device: up to {best / 1e9:.{1 if best >= 1e9 else 2}f} GB/s by random reads", columns=4)


def _short(n_bytes: int) -> str:
    return f"{n_bytes >> 20} MiB" if n_bytes >= 1 << 20 else f"{n_bytes >> 10} KiB"


def _title(axes: Any, text: str, columns: int = 3) -> None:
    """Above the axes, with the legend between the two, where it hides nothing."""
    handles, _ = axes.get_legend_handles_labels()
    rows = -(-len(handles) // columns)
    legend = axes.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=columns, borderaxespad=0.1, handlelength=1.6,
        columnspacing=1.2, borderpad=0.2,
    )  # fmt: skip
    legend.set_in_layout(False)  # the title's distance makes room for it
    axes.set_title(text, loc="left", pad=6 + 14 * rows)


_Small = tuple[Callable[[Any, Snapshot], None], Callable[[Snapshot], str]]
_SMALL: dict[str, _Small] = {
    "latency": (_latency, _no_tokens),
    "hits": (_hits, _no_lookups),
    "bytes": (_bytes, _no_lookups),
    "reuse": (_reuse, _no_reuse),
    "device": (_device, _no_profile),
    "drafts": (_drafts, _no_drafts),
}
PICTURES = (*_SMALL, "residency")

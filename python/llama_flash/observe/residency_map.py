"""The picture of what is in memory: a row for each layer, a cell for each record, coloured by its last use."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .residency import NEVER, Kind, Place, Residency, Tensor
from .snapshot import Snapshot

__all__ = ["Map", "Maps", "describe_maps", "draw_maps"]

_ABSENT, _AHEAD = "#e9e9e9", "#CC79A7"
_PLACES = ("#e9e9e9", "#E69F00", "#0072B2")  # in the file only, passing, pinned
_EMPTY = -1.0  # value of a cell whose record is in the file only
_PARTS = ("gate_up", "gate", "up", "down")


@dataclass(frozen=True)
class Map:
    """Of the records of one kind.

    cells, [rows, records]: with `by_age`, log10 of how many tokens ago a record was last used (the last token: 1),
    infinity if it is there and was not used yet, -1 if it is in the file only; else 0: in the file only, 1: passing, 2:
    in memory for good. NaN: there is no such record. A row's neurons are sorted: the last used first.
    """

    kind: Kind
    by_age: bool
    rows: tuple[str, ...]
    parts: tuple[tuple[str, int, int], ...]  # name, first column, columns
    cells: npt.NDArray[np.float64]
    n_there: int
    n_records: int

    @property
    def inches(self) -> float:
        return 1.15 + min(3.2, max(1.3, 0.2 * len(self.rows)))


@dataclass(frozen=True)
class Maps:
    maps: tuple[Map, ...]

    @property
    def inches(self) -> float:
        return sum(m.inches for m in self.maps)


def describe_maps(snapshot: Snapshot) -> Maps:
    """What there is to draw, by kind of record."""
    assert snapshot.residency is not None
    found = []
    for kind in ("experts", "neurons", "panels"):
        tensors = [t for t in snapshot.residency.tensors if t.kind == kind]
        if tensors:
            by_age = kind == "experts" or (kind == "neurons" and snapshot.picks_neurons)
            found.append(_map(snapshot.residency, tensors, kind, by_age))
    return Maps(tuple(found))


def _map(residency: Residency, tensors: list[Tensor], kind: Kind, by_age: bool) -> Map:
    layers = sorted({t.layer for t in tensors}, key=lambda layer: (layer < 0, layer))
    parts: dict[str, int] = {}  # name: columns
    if kind == "experts":
        for tensor in sorted(tensors, key=lambda t: _order(_part(t.name))):
            parts[_part(tensor.name)] = max(parts.get(_part(tensor.name), 0), tensor.count)
    else:
        parts[""] = max(sum(t.count for t in tensors if t.layer == layer) for layer in layers)
    firsts = dict(zip(parts, np.cumsum([0, *parts.values()]).tolist(), strict=False))
    cells = np.full((len(layers), sum(parts.values())), np.nan)
    filled: dict[tuple[int, str], int] = {}
    n_there = n_records = 0
    for tensor in tensors:
        name = _part(tensor.name) if kind == "experts" else ""
        row = layers.index(tensor.layer)
        column = firsts[name] + filled.get((row, name), 0)
        filled[row, name] = filled.get((row, name), 0) + tensor.count
        there = residency.in_dram[residency.of(tensor)]
        if by_age:
            age = residency.age[residency.of(tensor)].astype(np.float64)
            values = np.where(age == NEVER, np.inf, np.log10(age + 1))
            cells[row, column : column + tensor.count] = np.where(there, values, _EMPTY)
        else:
            place = residency.place[residency.of(tensor)]
            values = np.where(
                place >= Place.LLAMA_FLASH_IN_SLOT, 2.0, np.where(place > Place.LLAMA_FLASH_IN_FILE, 1.0, 0.0)
            )
            cells[row, column : column + tensor.count] = values
        n_there += int(there.sum())
        n_records += tensor.count
    if kind == "neurons":
        rank = np.where(np.isnan(cells), np.inf, np.where(cells < 0, 1e9, np.minimum(cells, 1e8)))
        cells = np.take_along_axis(cells, np.argsort(rank if by_age else -cells, axis=1, kind="stable"), axis=1)
    rows = tuple(str(layer) if layer >= 0 else "other" for layer in layers)
    return Map(kind, by_age, rows, tuple((n, firsts[n], parts[n]) for n in parts), cells, n_there, n_records)


def _part(name: str) -> str:
    """ffn_gate of blk.0.ffn_gate_exps.weight"""
    return re.sub(r"^blk\.\d+\.|(_exps)?\.weight$", "", name)


def _order(part: str) -> tuple[int, str]:
    return next((i for i, word in enumerate(_PARTS) if word in part), len(_PARTS)), part


def draw_maps(figure: Any, where: Any, snapshot: Snapshot) -> None:
    """Into a cell of the figure's grid."""
    maps = describe_maps(snapshot).maps
    rows = where.subgridspec(len(maps), 1, height_ratios=[m.inches for m in maps])
    for i, m in enumerate(maps):
        _draw(figure, figure.add_subplot(rows[i]), m)


def _draw(figure: Any, axes: Any, m: Map) -> None:
    colors = importlib.import_module("matplotlib.colors")
    patches = importlib.import_module("matplotlib.patches")
    legend = [patches.Patch(facecolor=_ABSENT, edgecolor="#b0b0b0", label="in the file only")]
    if m.by_age:
        scale = colors.LinearSegmentedColormap.from_list(
            "age", importlib.import_module("matplotlib").colormaps["viridis"](np.linspace(0.0, 0.95, 256))
        )
        known = m.cells[np.isfinite(m.cells)]
        oldest = max(1.0, float(known.max(initial=0.0)))
        norm = colors.Normalize(0, oldest)
        if np.isposinf(m.cells).any():
            legend.append(patches.Patch(facecolor=_AHEAD, label="read ahead, not used yet"))
        cells = np.where(np.isposinf(m.cells), 2 * oldest, m.cells)
    else:
        scale, norm, cells = colors.ListedColormap(_PLACES), colors.BoundaryNorm([-0.5, 0.5, 1.5, 2.5], 3), m.cells
        legend += [patches.Patch(facecolor=_PLACES[1], label="passing, or being read")]
        legend += [patches.Patch(facecolor=_PLACES[2], label="pinned")]
    extremes = {"under": _ABSENT, "over": _AHEAD} if m.by_age else {}
    scale = scale.with_extremes(bad=(1.0, 1.0, 1.0, 0.0), **extremes)
    image = axes.imshow(
        np.ma.masked_invalid(cells), cmap=scale, norm=norm, aspect="auto", origin="upper",
        interpolation="nearest",
    )  # fmt: skip
    axes.grid(False)
    _label(axes, m)
    if m.by_age:
        bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=14)
        ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10000, 100000) if np.log10(t) <= norm.vmax]
        bar.set_ticks([np.log10(t) for t in ticks], labels=[str(t) for t in ticks])
        bar.ax.minorticks_off()
        bar.set_label("tokens ago")
        bar.outline.set_visible(False)
    names = len(m.parts) > 1
    axes.legend(
        handles=legend, loc="lower right", bbox_to_anchor=(1.0, 1.07 if names else 1.0), ncols=len(legend),
        borderaxespad=0.2, handlelength=1.2, columnspacing=1.2,
    )  # fmt: skip
    axes.set_title(
        f"In memory: {m.n_there} of {m.n_records} {m.kind} ({100 * m.n_there / m.n_records:.0f} %)"
        + (", by last use" if m.by_age else ""),
        loc="left", pad=20 if names else 8,
    )  # fmt: skip


def _label(axes: Any, m: Map) -> None:
    step = -(-len(m.rows) // 16)
    shown = [i for i, row in enumerate(m.rows) if i % step == 0 or row == "other"]
    axes.set_yticks(shown, [m.rows[i] for i in shown])
    axes.set_ylabel("layer")
    if m.kind == "experts":
        axes.set_xticks([])
        axes.set_xlabel(f"experts of a layer, {m.parts[0][2]} in each of {len(m.parts)} parts")
        for name, first, columns in m.parts:
            if first:
                axes.axvline(first - 0.5, color="white", linewidth=3)
            axes.annotate(
                name, (first + columns / 2 - 0.5, 1), xycoords=("data", "axes fraction"), xytext=(0, 3),
                textcoords="offset points", ha="center", va="bottom", fontsize=8.5,
            )  # fmt: skip
    else:
        order = "in file order" if m.kind == "panels" else "the last used first" if m.by_age else "pinned first"
        axes.set_xlabel(f"{m.kind} of a layer, {order}")
        axes.xaxis.get_major_locator().set_params(integer=True)
    if len(m.rows) <= 64:
        axes.set_yticks(np.arange(0.5, len(m.rows) - 1), minor=True)
        axes.grid(True, axis="y", which="minor", color="white", linewidth=1.2 if len(m.rows) <= 24 else 0.6)
    if m.cells.shape[1] <= 128:
        axes.set_xticks(np.arange(0.5, m.cells.shape[1] - 1), minor=True)
        axes.grid(True, axis="x", which="minor", color="white", linewidth=1.2 if m.cells.shape[1] <= 24 else 0.5)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(which="both", length=0)

"""Draws the figures as PNG, with matplotlib (the `reproduce` extra)."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gguf_tools.synthetic.activity import LayerActivity
from reproducelib import paper
from reproducelib.rates import Rates

_STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "axes.edgecolor": "#8a8a8a",
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "font.size": 10,
    "lines.linewidth": 1.8,
    "savefig.dpi": 150,
    "savefig.bbox": "tight",
}
_PAPER_COLOUR = "#c2410c"


def draw_rates(rates: Rates, path: Path, title: str) -> None:
    """Figure 2."""
    pyplot = _pyplot()
    chunks, depths = (sorted({key[i] for key in rates}) for i in (0, 1))
    figure, axes = pyplot.subplots(figsize=(7.2, 4.4))
    colours = _shades(len(depths))
    for depth, colour in zip(depths, colours, strict=True):
        values = [rates[chunk, depth] / 1e9 for chunk in chunks]
        axes.plot(chunks, values, color=colour, marker="o", markersize=4, label=str(depth))
    axes.set_xscale("log", base=2)
    axes.set_xticks(chunks, [_size(chunk) for chunk in chunks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("bytes per random read")
    axes.set_ylabel("GB/s")
    axes.legend(title="reads in flight", frameon=False, ncols=2, loc="upper left")
    axes.set_title(title)
    figure.savefig(path)
    pyplot.close(figure)


def draw_windows(layers: Sequence[LayerActivity], path: Path, title: str) -> None:
    """Figure 4: left what k tokens in a row use, right what a token adds to the k before it."""
    pyplot = _pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10.4, 4.4), layout="constrained")
    colours = _shades(len(layers))
    labelled = {0, len(layers) - 1}
    used = [layer.aggregated_predicted or layer.aggregated for layer in layers]
    newly = [layer.newly_predicted or layer.newly_active for layer in layers]
    for axes, curves, first in ((left, used, 1), (right, newly, 0)):
        ks = list(range(first, first + len(curves[0])))
        for il, (curve, colour) in enumerate(zip(curves, colours, strict=True)):
            label = f"layer {il + 1}" if il in labelled else None
            axes.plot(ks, [100 * share for share in curve], color=colour, linewidth=1.2, label=label)
        mean = [100 * sum(values) / len(values) for values in zip(*curves, strict=True)]
        axes.plot(ks, mean, color="black", linewidth=2.4, label="mean of the layers")
        axes.set_xticks(ks)
        axes.set_ylim(bottom=0)
    marker = {"color": _PAPER_COLOUR, "marker": "D", "linestyle": "none", "zorder": 5, "label": "paper, OPT 6.7B"}
    left.plot([1, paper.CACHED_TOKENS], [100 * paper.PREDICTED, 100 * paper.CACHED], **marker)
    right.plot([paper.CACHED_TOKENS], [100 * paper.NEWLY_LOADED], **marker)
    left.set_xlabel("k, tokens in a row")
    right.set_xlabel("k, previous tokens kept")
    left.set_ylabel("% of a layer's neurons")
    left.set_title("used by any of k tokens: s_agg(k)")
    right.set_title("new to a token: s_agg(k+1) - s_agg(k)")
    left.legend(frameon=False, loc="upper left")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    figure.savefig(path)
    pyplot.close(figure)


def _pyplot() -> Any:
    """matplotlib's pyplot, set up to write files."""
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    matplotlib.rcParams.update(_STYLE)
    return importlib.import_module("matplotlib.pyplot")


def _shades(n: int) -> list[Any]:
    """An ordered scale that is never too light."""
    matplotlib: Any = importlib.import_module("matplotlib")
    scale = matplotlib.colormaps["viridis_r"]
    return [scale(0.12 + 0.88 * i / max(n - 1, 1)) for i in range(n)]


def _size(n_bytes: int) -> str:
    return f"{n_bytes >> 20} MiB" if n_bytes >= 1 << 20 else f"{n_bytes >> 10} KiB"

"""The commands `python -m gguf_tools calibrate` and `reorder`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from gguf_tools.calibrate import TOKENS, CalibrationReport
from gguf_tools.calibrate import calibrate as fit_predictors
from gguf_tools.errors import GgufToolsError
from gguf_tools.fitting import RECALL, Settings
from gguf_tools.measure import WINDOW, LayerReport
from gguf_tools.options import AsJson, Force, Output, Threads, kind_of, print_json, written
from gguf_tools.order import Reads
from gguf_tools.reorder import LayerReads
from gguf_tools.reorder import reorder as write_ordered

_WINDOWS = (0, 1, 2, 4, 8, 16)  # of the curves in the table; all are in the JSON

Text = Annotated[Path | None, typer.Option(help="Text to run the model on: the kind of text that it is used for.")]
Tokens = Annotated[int, typer.Option(min=1, help="Tokens to run it on, from all over the text.")]

EPILOG = (
    "Examples:  [bold]llama-flash calibrate flash.gguf --text wiki.txt[/]   |   "
    "[bold]llama-flash calibrate model.gguf --text wiki.txt --report --json[/]"
)
REORDER_EPILOG = (
    "Examples:  [bold]llama-flash reorder flash.gguf ordered.gguf --text wiki.txt[/]   |   "
    "[bold]llama-flash reorder flash.gguf ordered.gguf --activations work[/]"
)


def calibrate(
    model: Annotated[Path, typer.Argument(help="A flash file; with --report, an ordinary GGUF too.", metavar="MODEL")],
    out: Annotated[Path | None, typer.Argument(help="The file to write. Default: MODEL.", metavar="[OUT]")] = None,
    text: Text = None,
    tokens: Tokens = TOKENS,
    recall: Annotated[
        float, typer.Option(help="Share of a token's activation mass that its predicted neurons are to hold.")
    ] = RECALL,
    max_rank: Annotated[
        int | None, typer.Option(help="Default: half of the embedding length, at most 1024.", metavar="R")
    ] = None,
    type_name: Annotated[str, typer.Option("--type", metavar="q8_0|f16", help="Type of the matrices.")] = "q8_0",
    refine: Annotated[bool, typer.Option("--refine/--no-refine", help="Improve the matrices by descent.")] = True,
    work: Annotated[
        Path | None,
        typer.Option(help="Folder for activations and finished layers, kept. Default: beside OUT, removed at the end."),
    ] = None,
    report: Annotated[bool, typer.Option("--report", help="Write nothing.")] = False,
    threads: Threads = 0,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Fit predictors of active neurons to a flash file, and measure its sparsity.

    An interrupted run goes on where it stopped.
    """
    if text is None:
        raise GgufToolsError("--text FILE is needed")
    result = fit_predictors(
        model,
        text,
        out,
        n_tokens=tokens,
        settings=Settings(recall, max_rank, kind_of(type_name), refine),
        work=work,
        write=not report,
        n_threads=threads or None,
        force=force,
        say=_say,
    )
    if as_json:
        print_json(asdict(result))
    else:
        print("\n".join(_calibration_lines(result)))


def reorder(
    model: Annotated[Path, typer.Argument(help="A flash file, or an ordinary GGUF of f16 or f32.", metavar="IN")],
    out: Output,
    text: Text = None,
    activations: Annotated[
        Path | None, typer.Option(help="Instead of a text: what calibrate --work DIR has kept.", metavar="DIR")
    ] = None,
    tokens: Tokens = TOKENS,
    window: Annotated[int, typer.Option(min=0, help="Tokens whose neurons are in memory; 0: none.")] = WINDOW,
    threads: Threads = 0,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Store neurons that are needed together next to each other: the same function, fewer reads."""
    result = write_ordered(
        model,
        out,
        text=text,
        activations=activations,
        n_tokens=tokens,
        window=window,
        n_threads=threads or None,
        force=force,
        say=_say,
    )
    layers = [asdict(layer) for layer in result]
    if as_json:
        print_json({**written(out), "window": window, "layers": layers})
    else:
        print("\n".join(_reads_lines(result)))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _calibration_lines(result: CalibrationReport) -> list[str]:
    head = ["layer", "rank", "active", "predicted", "recall", "by count", "false +", "false -", "size", "of records"]
    rows = [
        [
            str(layer.layer),
            f"{layer.rank}{'*' if layer.refined else ''}" if layer.rank else "-",
            _percent(layer.active_share),
            _percent(layer.predicted_share),
            _percent(layer.mass_recall),
            _percent(layer.count_recall),
            _percent(layer.false_positives),
            _percent(layer.false_negatives),
            f"{layer.predictor_bytes / 1e3:.0f} kB",
            _percent(layer.predictor_bytes / layer.record_bytes),
        ]
        for layer in result.layers
    ]
    return [
        f"{result.model}: {result.activation}, on {result.held_out_tokens} tokens held out "
        f"({result.fitted_tokens} fitted, {result.threshold_tokens} for thresholds); "
        f"{result.predictor_type} predictors for a recall of {result.recall:g}; *: refined",
        *_table([head, *rows]),
        "",
        "neurons used by a token and the k before it:",
        *_window_table(result.layers, predicted=False),
        "",
        "predicted:",
        *_window_table(result.layers, predicted=True),
    ]


def _window_table(layers: Sequence[LayerReport], *, predicted: bool) -> list[str]:
    rows = [["layer", *(f"k={k}" for k in _WINDOWS), f"new at k={WINDOW}"]]
    for layer in layers:
        curve = layer.predicted_window if predicted else layer.active_window
        new = layer.newly_predicted if predicted else layer.newly_active
        rows.append([str(layer.layer), *(_percent(curve[k]) if k < len(curve) else "-" for k in _WINDOWS)])
        rows[-1].append(_percent(new))
    return _table(rows)


def _reads_lines(result: Sequence[LayerReads]) -> list[str]:
    needed = [[layer.all_before, layer.all_after] for layer in result]
    new = [[layer.new_before, layer.new_after] for layer in result]
    layers = [str(layer.layer) for layer in result]
    return [
        "per token, held out; length: needed neurons of a read; merged: over gaps of one neuron",
        *_reads_table("needed", layers, needed),
        "",
        "of those, what the window lacks:",
        *_reads_table("lacking", layers, new),
    ]


def _reads_table(what: str, layers: Sequence[str], rows: Sequence[Sequence[Reads]]) -> list[str]:
    head = ["layer", what, *("reads", "after", "length", "after"), *("merged", "after", "length", "after")]
    lines = [head]
    for layer, (before, after) in zip(layers, rows, strict=True):
        plain = [before.reads, after.reads, before.run_length, after.run_length]
        merged = [before.merged_reads, after.merged_reads, before.merged_run_length, after.merged_run_length]
        lines.append([layer, f"{before.neurons:.1f}", *(f"{figure:.2f}" for figure in (*plain, *merged))])
    return _table(lines)


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns aligned on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]

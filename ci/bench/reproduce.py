"""Measures the figures and tables of "LLM in a flash" on this machine: `make reproduce`. Writes them into a folder.

Figure 2: random reads past the page cache, by size and number in flight. Figure 4: neurons used by k tokens in a row.
Tables 2 and 3: from naive over hybrid (half the model resident, the rest streamed), predictor and window to bundling,
each rung a process of its own under the same memory cap, with the page cache emptied, all decoding the same tokens;
medians. The model is synthetic: layers of OPT 6.7B's shape with the activation statistics that the paper states. By
default 8 of its 32 layers and a quarter of its vocabulary, so that attention, embeddings and feed-forward layers keep
their shares of the whole.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchlib import machine
from benchlib.runs import stop_on_signals
from reproducelib import figures, ladder, rates, report, windows
from reproducelib.models import FILES, WHOLE_LAYERS, WHOLE_VOCAB, ReproducedModel
from reproducelib.rates import Rates
from rich.console import Console
from rich.markup import escape

from gguf_tools import GgufToolsError
from llama_flash import FlashError

_BUILD = Path(__file__).resolve().parents[2] / "build"
_PARTS = ("figure2", "figure4", "ladder")


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    stop_on_signals()
    console = Console(width=None if sys.stdout.isatty() else 200)
    if find_spec("matplotlib") is None:
        console.print("[red]error:[/] matplotlib is missing: pip install 'matplotlib>=3.8' (the extra `reproduce`)")
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    model = ReproducedModel(options.layers, options.vocab, options.models)
    results: dict[str, Any] = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "model": model.title,
        "options": {key: str(value) for key, value in vars(options).items()},
    }
    console.print(model.title)
    try:
        with console.status("") as status:
            _reproduce(model, options, results, console, lambda text: _tell(console, status, text))
    except (FlashError, GgufToolsError, OSError) as error:
        console.print(f"[red]error:[/] {escape(str(error))}", highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("[red]stopped[/]")
        return 130
    finally:
        (options.out / "reproduce.json").write_text(json.dumps(results, indent=2, default=str))
        if not options.keep_models:
            for file in FILES:
                model.remove(file)
    console.print(f"written to {options.out}")
    return 1 if results.get("failed") else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ci/bench/reproduce.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="4 layers, short runs, once each: minutes, no figures to quote"
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="all 32 layers and the whole vocabulary: 13.4 GB, one layout on disk at a time",
    )
    parser.add_argument("--only", default="all", help=f"comma-separated: {', '.join(_PARTS)} (default: all)")
    parser.add_argument("--rungs", help="comma-separated rungs of the ladder, beside no cap and naive")
    parser.add_argument("--layers", type=int, help="layers of the model (default: 8)")
    parser.add_argument("--vocab", type=int, help="tokens of the vocabulary (default: in proportion to the layers)")
    parser.add_argument("--share", type=float, help="memory cap as a share of the model (default: 0.5; quick: 0.65)")
    parser.add_argument(
        "--window", type=int, help="previous tokens whose neurons are kept (default: as many as have room)"
    )
    parser.add_argument("--repeats", type=int, help="runs of each rung, the median counts (default: 3)")
    parser.add_argument("--tokens", type=int, help="tokens decoded per run (default: 128)")
    parser.add_argument("--out", type=Path, default=_BUILD / "reproduce", help="folder for the results")
    parser.add_argument("--models", type=Path, default=_BUILD / "reproduce-models", help="folder for the model files")
    parser.add_argument("--keep-models", action="store_true", help="do not delete the model files at the end")
    options = parser.parse_args(argv)
    if options.quick and options.full:
        parser.error("--quick and --full exclude each other")
    quick = options.quick
    options.layers = options.layers or (WHOLE_LAYERS if options.full else 4 if quick else 8)
    options.vocab = options.vocab or WHOLE_VOCAB * options.layers // WHOLE_LAYERS
    options.share = options.share or (0.65 if quick else 0.5)
    options.repeats = options.repeats or (1 if quick else 3)
    options.tokens = options.tokens or (32 if quick else 128)
    options.only = _PARTS if options.only == "all" else tuple(options.only.split(","))
    options.rungs = tuple(options.rungs.split(",")) if options.rungs else ()
    names = [rung.name for rung in ladder.rungs(None)]
    if unknown := [name for name in options.rungs if name not in names]:
        parser.error(f"--rungs: no {unknown[0]!r}, known: {', '.join(names)}")
    if unknown := [part for part in options.only if part not in _PARTS]:
        parser.error(f"--only: no {unknown[0]!r}, known: {', '.join(_PARTS)}")
    return options


def _reproduce(
    model: ReproducedModel,
    options: argparse.Namespace,
    results: dict[str, Any],
    console: Console,
    tell: Callable[[str], None],
) -> None:
    out: Path = options.out
    measured: Rates = {}
    if "figure2" in options.only or "ladder" in options.only:
        tell("writing the bundled layout")
        path = model.ensure("bundled")
        results["machine"] = machine.description(path)
        measured = rates.measure_rates(path, 0.25 if options.quick else 1.0, tell)
        results["rates"] = [[chunk, depth, rate] for (chunk, depth), rate in measured.items()]
        rates.write_csv(measured, out / "figure2.csv")
        figures.draw_rates(measured, out / "figure2.png", "Random reads of the model file, O_DIRECT")
    if "figure4" in options.only:
        tell("writing the bundled layout")
        layers = windows.measure_windows(model.ensure("bundled"), 96 if options.quick else 256, tell)
        results["activity"] = [asdict(layer) for layer in layers]
        windows.write_csv(layers, out / "figure4.csv")
        figures.draw_windows(layers, out / "figure4.png", f"Predicted neurons: {model.title}")
    if "ladder" in options.only:
        _climb(model, options, results, measured, console, tell)


def _climb(
    model: ReproducedModel,
    options: argparse.Namespace,
    results: dict[str, Any],
    measured: Rates,
    console: Console,
    tell: Callable[[str], None],
) -> None:
    warm_up = 16 if options.quick else 48
    spec: dict[str, Any] = {
        "n_ctx": -(-(16 + warm_up + options.tokens) // 64) * 64,
        "n_ubatch": 64,
        "warm_up": warm_up,
        "tokens": options.tokens,
        "min_tokens": 4,
        "max_seconds": 15.0 if options.quick else 40.0,
    }
    if options.quick:
        spec["patience"] = 0.0
    stream = model.stream_file(options.out)
    outcomes = ladder.climb(
        model,
        options.share,
        options.repeats,
        options.window,
        stream,
        spec,
        tell,
        together=not options.full and model.has_room_for_all(),
        keep=options.keep_models,
        only=options.rungs,
    )
    results["runs"] = {outcome.rung.name: [run.to_json() for run in outcome.runs] for outcome in outcomes}
    rows = ladder.table(outcomes, model.n_layer * model.model.shape.n_ff, measured)
    ladder.write_csv(rows, options.out / "ladder.csv")
    tables = [report.table_2(rows, model.n_bytes), report.table_3(rows)]
    cap = f"memory cap {model.n_bytes * options.share / 1e9:.2f} GB, {options.share:.0%} of the model"
    (options.out / "tables.md").write_text("\n".join([f"{model.title}; {cap}\n", *map(str, tables)]))
    for table in tables:
        console.print(table.rich())
    results["failed"] = [row.rung.name for row in rows if row.error]
    for row in rows:
        if row.error:
            console.print(f"[red]{row.rung.title}:[/] {row.error}", highlight=False)


def _tell(console: Console, status: Any, text: str) -> None:
    if console.is_terminal:
        status.update(text)
    else:
        console.print(text, highlight=False)


if __name__ == "__main__":
    sys.exit(main())

"""Measures naive, flash offload and resident side by side: `make bench`. Prints tables and writes JSON.

The naive side keeps its weights in the page cache under the same cap, at the machine's readahead and at 128 KiB; the
better one counts. Every run is a process of its own with the page cache emptied, and decodes the same random tokens, or
answers the same real prompts (cases "real").
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from benchlib import (
    against,
    batches,
    drafts,
    latency,
    machine,
    many,
    neighbours,
    prompt_store,
    prompt_writes,
    tables,
    workers,
)
from benchlib.bookkeeping import count_all
from benchlib.cases import CASES, FULL, HUGE, INFLATED, LIMITS, MATRIX, REAL, WHOLE, Case
from benchlib.measure import FLASH, Outcome, measure, settings_of
from benchlib.models import BenchModel, InflatedModel, check_room
from benchlib.runs import stop_on_signals
from realmodel import RealModelError, ensure
from rich.console import Console
from rich.markup import escape

from gguf_tools import GgufToolsError
from gguf_tools.routing import measure as measure_routing
from llama_flash import FlashError, FlashOffload

_MODELS = Path(__file__).resolve().parents[2] / "build" / "bench-models"
_SHIPPED_MOE = Path(__file__).resolve().parents[2] / "python/llama_flash/models/stdlib-moe-q8_0.gguf"


_NAMED = (*CASES, *LIMITS, *REAL, *WHOLE, *FULL, *HUGE, *INFLATED)


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    stop_on_signals()
    console = Console(width=None if sys.stdout.isatty() else 200)
    if options.cases in _ALONE:
        return _ALONE[options.cases](options, console)
    chosen = _chosen(options.cases)
    if _takes_turns(options):
        return _compare(chosen, options, console)
    outcomes: list[Outcome] = []
    results: dict[str, Any] = {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "routing": {}, "read_rates": {}}
    try:
        if _SHIPPED_MOE.exists() and not options.quick:
            results["routing"]["shipped MoE model"] = asdict(measure_routing(_SHIPPED_MOE, text=_some_text()))
        _check_room(chosen, options)
        counts = count_all()
        if isinstance(counts, str):
            console.print(f"instructions are not counted: {counts}")
        else:
            results["bookkeeping"] = {name: count.to_json() for name, count in counts.items()}
            console.print(tables.bookkeeping_table(counts))
        for model in dict.fromkeys(case.model for case in chosen):
            _measure_model(model, [case for case in chosen if case.model == model], options, console, outcomes, results)
    except KeyboardInterrupt:
        console.print("[red]stopped[/]")
        results["stopped"] = True
    except (FlashError, GgufToolsError, OSError, RealModelError) as error:
        console.print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        results["error"] = str(error)
    finally:
        results["outcomes"] = [outcome.to_json() for outcome in outcomes]
        options.out.write_text(json.dumps(results, indent=2, default=str))
    console.print(tables.verdict_table(outcomes))
    tables.print_failures(console, outcomes)
    console.print(f"written to {options.out}")
    return 1 if "stopped" in results or "error" in results else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ci/bench/bench.py", description=__doc__)
    names = ", ".join(case.name for case in _NAMED)
    groups = (
        "naive (flash offload beside naive), limits (beside the physical limit), "
        "real (text and routing of real models), matrix (of caps), all of these; "
        "whole (a model of 13 GB: 27 GB of disk), full (18 GB), inflated (4 and 16 GB), huge (63 GB); "
        "alone: neighbours (a machine that is shared), many (clients at once), batch (of 1,000 prompts), "
        "latency (of a first token), drafts (beside none), workers (beside one machine), "
        "prompt-store, prompt-turns and prompt-writes (prompts seen before)"
    )
    parser.add_argument("--cases", default="naive,limits", help=f"comma-separated: {groups}; {names}")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="with --cases drafts: of its cases")
    parser.add_argument(
        "--naive", action=argparse.BooleanOptionalAction, help="naive runs beside all cases, or none (they are slow)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each setting, the median counts")
    parser.add_argument("--tokens", type=int, help="tokens decoded per run, instead of each case's number")
    parser.add_argument("--out", type=Path, default=Path("bench.json"), help="JSON file (default: bench.json)")
    parser.add_argument("--models", type=Path, default=_MODELS, help="folder for the models")
    parser.add_argument(
        "--against",
        metavar="PYTHON",
        help="of another build's environment: both in turns with flash offload, beside neighbours, or latency",
    )
    parser.add_argument(
        "--other",
        type=_flash_options,
        metavar="JSON",
        help="options of FlashOffload of the side that this one is compared with, in turns: that of --against, or this "
        """build; as '{"lookahead": false}', or {} for none""",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=60.0,
        help="of turns for each case, with --against or --other; for each situation of neighbours or latency, each "
        "model of many or workers",
    )
    parser.add_argument(
        "--device-rate",
        type=float,
        metavar="MB/S",
        help="slow the models' device down to this (not with --against or --other)",
    )
    parser.add_argument("--keep-models", action="store_true", help="do not delete the models at the end")
    parser.add_argument(
        "--quick", action="store_true", help="models of two layers or 1 GB, one run, no targets worth reading"
    )
    options = parser.parse_args(argv)
    if unused := _unused(options):
        turns = "".join(f" --{name}" for name in ("against", "other") if getattr(options, name) is not None)
        parser.error(f"with --cases {options.cases}{turns}, {unused} has no effect")
    return options


def _flash_options(text: str) -> dict[str, Any]:
    """Options of FlashOffload, as JSON."""
    try:
        found = json.loads(text)
        FlashOffload(**found)
    except (ValueError, TypeError, FlashError) as error:
        raise argparse.ArgumentTypeError(f"no options of FlashOffload: {error}") from None
    return dict(found)


def _takes_turns(options: argparse.Namespace) -> bool:
    """Whether the cases are compared with another build, or with this one under other settings."""
    return bool(options.against) or options.other is not None


def _unused(options: argparse.Namespace) -> str:
    """Options that were given and that this kind of measurement does not look at."""
    if options.cases in _ALONE:
        used = {"neighbours": {"against"}, "latency": {"against"}, "drafts": {"only"}}.get(options.cases, set())
    else:
        used = {"against", "other"} if _takes_turns(options) else {"naive", "tokens", "device_rate"}
    special = ("only", "naive", "tokens", "against", "other", "device_rate")
    given = [name for name in special if getattr(options, name) not in (None, []) and name not in used]
    return ", ".join("--" + name.replace("_", "-") for name in given)


def _chosen(names: str) -> list[Case]:
    known = {case.name: [case] for case in _NAMED}
    known |= {
        "naive": list(CASES),
        "limits": list(LIMITS),
        "matrix": list(MATRIX),
        "all": [*CASES, *LIMITS, *REAL, *MATRIX],
    }
    known |= {"real": list(REAL), "whole": list(WHOLE), "full": list(FULL), "huge": list(HUGE)}
    known["inflated"] = list(INFLATED)
    known |= {name: [] for name in _ALONE}
    for name in _ALONE:
        if name in names.split(",") and names != name:
            sys.exit(f"error: {name} is measured alone")
    chosen: list[Case] = []
    for name in names.split(","):
        if name not in known:
            sys.exit(f"error: no case {name!r}, known: {', '.join(known)}")
        chosen += known[name]
    return chosen


def _check_room(chosen: Sequence[Case], options: argparse.Namespace) -> None:
    models = list(dict.fromkeys(case.model for case in chosen))
    check_room(models, options.models, 2 if options.quick else None, keep=options.keep_models)


def _measure_model(
    model: BenchModel,
    cases: Sequence[Case],
    options: argparse.Namespace,
    console: Console,
    outcomes: list[Outcome],
    results: dict[str, Any],
) -> None:
    layers = 2 if options.quick else None
    files = model.ensure(options.models, layers)
    with contextlib.ExitStack() as stack:
        if not options.keep_models:
            stack.callback(files.remove)
        stack.enter_context(machine.throttled(files.flash, options.device_rate and options.device_rate * 1e6))
        rates = machine.raw_read_rates(files.flash)
        results["machine"] = machine.description(files.flash)
        results["read_rates"][model.name] = rates
        console.print(tables.machine_table(results["machine"], rates))
        if model.is_moe and not machine.fits(files.flash.stat().st_size):
            console.print(f"routing of {model.name} is not measured: stock llama.cpp has no room for it")
        elif model.is_moe:
            with console.status(f"{model.name}: measuring how it routes"):
                text = model.text if isinstance(model, InflatedModel) else None
                routing = measure_routing(files.flash, n_tokens=100 if options.quick else 400, text=text)
            results["routing"][model.name] = asdict(routing)
            console.print(f"routing of {model.name}: {routing}")
        overrides: dict[str, Any] = {"tokens": options.tokens} if options.tokens else {}
        if options.quick:
            overrides |= {"warm_up": 8, "max_seconds": 5.0, "patience": 0.0}
        for case in cases:
            if options.quick and case.drafts and not isinstance(model, InflatedModel):
                console.print(f"{case.name}: left out, two layers are less than drafts need at {case.cap_share:.0%}")
                continue
            settings = [FLASH] if case in MATRIX else settings_of(case, files, naive=options.naive)
            repeats = 1 if options.quick or case in MATRIX else options.repeats
            with console.status("") as status:
                outcome = measure(
                    case, files, settings, repeats, lambda text: _report(console, status, text), **overrides
                )
            outcomes.append(outcome)
            console.print(tables.outcome_table(outcome))


def _compare(chosen: Sequence[Case], options: argparse.Namespace, console: Console) -> int:
    """This build beside that of --against, or with the settings of --other."""
    other = against.Other(options.against or sys.executable, options.other or {})
    found: list[against.Comparison] = []

    def run(say: Callable[[str], None]) -> None:
        _check_room(chosen, options)
        for model in dict.fromkeys(case.model for case in chosen):
            files = model.ensure(options.models, 2 if options.quick else None)
            rounds = 1 if options.quick else options.repeats
            try:
                for case in chosen:
                    if case.model == model:
                        found.append(against.compare(case, files, other, options.seconds, rounds, say))
                        console.print(against.table(found[-1:]))
            finally:
                if not options.keep_models:
                    files.remove()

    def results() -> dict[str, Any]:
        return {"other": asdict(other), "against": [each.to_json() for each in found]}

    code = _in_turns(run, options, console, results)
    console.print(against.table(found))
    return code


def _measure_neighbours(options: argparse.Namespace, console: Console) -> int:
    found: list[neighbours.Result] = []

    def run(say: Callable[[str], None]) -> None:
        seconds = 3.0 if options.quick else options.seconds
        for result in neighbours.measure(options.models, seconds, options.against, say, options.keep_models):
            found.append(result)
            console.print(neighbours.table(result))

    return _in_turns(run, options, console, lambda: {"neighbours": [result.to_json() for result in found]})


def _measure_many(options: argparse.Namespace, console: Console) -> int:
    found: list[many.Result] = []

    def run(say: Callable[[str], None]) -> None:
        seconds, layers, most = (3.0, 2, 8) if options.quick else (options.seconds, None, 32)
        for result in many.measure(options.models, seconds, say, keep=options.keep_models, layers=layers, most=most):
            found.append(result)
            console.print(many.table(result))

    return _in_turns(run, options, console, lambda: {"many": [result.to_json() for result in found]})


def _measure_workers(options: argparse.Namespace, console: Console) -> int:
    found: list[workers.Result] = []

    def run(say: Callable[[str], None]) -> None:
        seconds, layers = (3.0, 4) if options.quick else (options.seconds, None)
        for result in workers.measure(options.models, seconds, say, keep=options.keep_models, layers=layers):
            found.append(result)
            console.print(workers.table(result))

    return _in_turns(run, options, console, lambda: {"workers": [result.to_json() for result in found]})


def _measure_prompts(options: argparse.Namespace, console: Console) -> int:
    """Reading their states, or conversations: by the case's name."""
    found = prompt_store.Result()
    repeats = 1 if options.quick else options.repeats

    def run(say: Callable[[str], None]) -> None:
        real = ensure() if options.cases == "prompt-turns" else None
        prompt_store.measure(found, options.models, real, say, repeats)

    code = _in_turns(run, options, console, lambda: {"prompt_store": found.to_json()})
    for table in prompt_store.tables(found):
        console.print(table)
    return code


def _measure_writes(options: argparse.Namespace, console: Console) -> int:
    found = prompt_writes.Result()

    def run(say: Callable[[str], None]) -> None:
        layers, repeats = (2, 1) if options.quick else (None, max(options.repeats, 5))
        prompt_writes.measure(found, options.models, repeats, say, keep=options.keep_models, layers=layers)
        console.print(prompt_writes.table(found))

    return _in_turns(run, options, console, lambda: {"prompt_writes": found.to_json()})


def _measure_batch(options: argparse.Namespace, console: Console) -> int:
    found = batches.Result()

    def run(say: Callable[[str], None]) -> None:
        repeats = 1 if options.quick else options.repeats
        batches.measure(found, options.models, repeats, say, keep=options.keep_models, quick=options.quick)
        console.print(batches.table(found))

    return _in_turns(run, options, console, lambda: {"batch": found.to_json()})


def _measure_drafts(options: argparse.Namespace, console: Console) -> int:
    found: list[drafts.Result] = []

    def run(say: Callable[[str], None]) -> None:
        for result in drafts.measure(options.models, say, options.only, keep=options.keep_models, quick=options.quick):
            found.append(result)
            console.print(drafts.table([result]))

    return _in_turns(run, options, console, lambda: {"drafts": [result.to_json() for result in found]})


def _measure_latency(options: argparse.Namespace, console: Console) -> int:
    found: list[latency.Result] = []

    def run(say: Callable[[str], None]) -> None:
        seconds = 5.0 if options.quick else options.seconds
        for result in latency.measure(options.models, seconds, options.against, say, keep=options.keep_models):
            found.append(result)
            console.print(latency.table(result))

    return _in_turns(run, options, console, lambda: {"latency": [result.to_json() for result in found]})


def _in_turns(
    run: Callable[[Callable[[str], None]], None],
    options: argparse.Namespace,
    console: Console,
    results: Callable[[], dict[str, Any]],
) -> int:
    """Runs it, says what was wrong, and writes what there is by then."""
    error = ""
    try:
        with console.status("") as status:
            run(partial(_report, console, status))
    except KeyboardInterrupt:
        error = "stopped"
    except (FlashError, GgufToolsError, OSError, RealModelError) as problem:
        error = str(problem)
    options.out.write_text(json.dumps({**results(), "error": error}, indent=2))
    if error:
        console.print(f"[red]error:[/] {escape(error)}", highlight=False, soft_wrap=True)
    console.print(f"written to {options.out}")
    return 1 if error else 0


def _report(console: Console, status: Any, text: str) -> None:
    if console.is_terminal:
        status.update(text)
    else:
        console.print(text)


def _some_text() -> str:
    """Text of the kind that the shipped model was trained on."""
    import argparse as module

    return Path(module.__file__).read_text()


# no cases: other kinds of measurement
_ALONE = {
    "neighbours": _measure_neighbours,
    "many": _measure_many,
    "batch": _measure_batch,
    "latency": _measure_latency,
    "drafts": _measure_drafts,
    "workers": _measure_workers,
    "prompt-store": _measure_prompts,
    "prompt-turns": _measure_prompts,
    "prompt-writes": _measure_writes,
}


if __name__ == "__main__":
    sys.exit(main())

"""The command `python -m gguf_tools`, whose commands `llama-flash` has, too.

A command is a function with typer's annotations; `app.command("name")(function)` adds one.
"""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from gguf import GGMLQuantizationType

from gguf_tools import calibrate_cli, convert_cli
from gguf_tools.bundle import BundlePlan
from gguf_tools.bundle import bundle as write_bundle
from gguf_tools.errors import GgufToolsError
from gguf_tools.format import ACTIVATIONS, Activation
from gguf_tools.listing import FlashListing, Listing, describe
from gguf_tools.options import DEFAULT_MEMORY, AsJson, Force, Memory, Output, kind_of, memory_bytes, print_json, written
from gguf_tools.unbundle import unbundle as write_ordinary
from gguf_tools.verify import Verification
from gguf_tools.verify import verify as compare

app = typer.Typer(
    name="gguf_tools",
    help="Tools for GGUF files: neuron bundles for sparse models, and what files hold.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Input = Annotated[Path, typer.Argument(help="A GGUF file, or the first shard of a model.", metavar="IN")]
TypeName = Annotated[
    str | None, typer.Option("--type", help="Type of all parts: f16, q8_0, q4_K, ... Default: as it is.")
]
DownType = Annotated[str | None, typer.Option("--down-type", help="Type of down. Default: the one of the other parts.")]


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Errors that a user can do something about are one line, without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a character shows its number
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a killed command leaves no partial file
    try:
        app(args=argv)
    except (GgufToolsError, OSError) as error:
        print(f"error: {_printable(str(error))}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


app.command("convert", epilog=convert_cli.EPILOG)(convert_cli.command)


@app.command(
    epilog="Examples:  [bold]llama-flash bundle opt-6.7b-f16.gguf opt-flash.gguf --type q8_0[/]   |   "
    "[bold]llama-flash bundle prosparse.gguf flash.gguf --activation fatrelu --threshold 0.01[/]"
)
def bundle(
    model: Input,
    out: Output,
    type_name: TypeName = None,
    down_type: DownType = None,
    layout: Annotated[str, typer.Option(help="bundled, or split: parts apart, for comparisons.")] = "bundled",
    activation: Annotated[
        str | None, typer.Option(help=f"For models relufied by their maker: {', '.join(ACTIVATIONS)}.")
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="Of fatrelu.")] = None,
    memory: Memory = DEFAULT_MEMORY,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Store the feed-forward weights of a ReLU-like model neuron by neuron."""
    plan = write_bundle(
        model,
        out,
        kind=_kind(type_name),
        down_kind=_kind(down_type),
        layout=layout,
        activation=_activation(activation, threshold),
        memory=memory_bytes(memory),
        force=force,
        progress=f"bundling {model.name}",
    )
    if as_json:
        print_json({**written(out), **plan.as_dict()})
    else:
        print("\n".join(_plan_lines(out, plan)))


app.command("calibrate", epilog=calibrate_cli.EPILOG)(calibrate_cli.calibrate)
app.command("reorder", epilog=calibrate_cli.REORDER_EPILOG)(calibrate_cli.reorder)


@app.command(epilog="Examples:  [bold]llama-flash unbundle flash.gguf ordinary.gguf --down-type q8_0[/]")
def unbundle(
    model: Annotated[Path, typer.Argument(help="A flash file.", metavar="IN")],
    out: Output,
    down_type: Annotated[
        str | None, typer.Option(help="Type of down. Default: f32 where it is quantised in the bundles.")
    ] = None,
    memory: Memory = DEFAULT_MEMORY,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Make an ordinary GGUF file of a flash file; predictors are dropped."""
    write_ordinary(
        model,
        out,
        down_kind=_kind(down_type),
        memory=memory_bytes(memory),
        force=force,
        progress=f"unbundling {model.name}",
    )
    if as_json:
        print_json(written(out))
    else:
        print(f"{out}: {_size(out.stat().st_size)}")


@app.command(
    epilog="Examples:  [bold]llama-flash verify model.gguf flash.gguf[/]   |   "
    "[bold]llama-flash verify model-f16.gguf flash-q8_0.gguf --tolerance 0.01[/]"
)
def verify(
    a: Annotated[Path, typer.Argument(help="A GGUF file, bundled or not.", metavar="A")],
    b: Annotated[Path, typer.Argument(help="The file to compare it with.", metavar="B")],
    tolerance: Annotated[float, typer.Option(help="Relative error that a tensor may have, for other types.")] = 0.0,
    memory: Memory = DEFAULT_MEMORY,
    as_json: AsJson = False,
) -> None:
    """Say whether two files hold the same model, neurons in any order (exit status 0), or not (1)."""
    result = compare(a, b, memory=memory_bytes(memory), progress=f"comparing {a.name}")
    same = result.within(tolerance)
    if as_json:
        print_json(asdict(result) | {"same": result.same, "within_tolerance": same})
    else:
        print("\n".join(_verification_lines(result, tolerance)))
    raise typer.Exit(0 if same else 1)


@app.command(
    epilog="Examples:  [bold]llama-flash inspect flash.gguf[/]   |   [bold]llama-flash inspect model.gguf --json[/]"
)
def inspect(model: Input, as_json: AsJson = False) -> None:
    """List types and sizes, bundles and predictors, and check the file.

    The exit status is 1 where a load would refuse it: an adapter is listed, too, but is no model.
    """
    listing = describe(model)
    refused = _refusal(model)
    if as_json:
        print_json(asdict(listing) | {"refused": refused})
    else:
        print("\n".join(_listing_lines(listing)))
    if refused is not None:
        raise GgufToolsError(refused)


def _refusal(model: Path) -> str | None:
    """Why a load would refuse the file; None if it would not."""
    from llama_flash.errors import FlashError, FlashFormatError
    from llama_flash.planning.dry_run import check_model  # loads the engine

    try:
        check_model(model)
    except FlashFormatError as error:
        return str(error)
    except FlashError as error:  # not the file's fault
        print(f"not tried with the engine: {_printable(str(error))}", file=sys.stderr)
    return None


def _kind(name: str | None) -> GGMLQuantizationType | None:
    return None if name is None else kind_of(name)


def _activation(name: str | None, threshold: float | None) -> Activation | None:
    if name is not None and name not in ACTIVATIONS:
        raise GgufToolsError(f"unknown activation {name!r}, known: {', '.join(ACTIVATIONS)}")
    if (name == "fatrelu") != (threshold is not None):
        raise GgufToolsError("--activation fatrelu and --threshold go together")
    return None if name is None else Activation(name, threshold)


def _plan_lines(out: Path, plan: BundlePlan) -> list[str]:
    parts = ", ".join(f"{part.name} {part.kind.name}" for part in plan.layout.parts)
    counts = sorted({(plan.n_expert.get(il, 0), n_ff) for il, n_ff in plan.n_ff.items()})
    neurons = " to ".join(dict.fromkeys(_neurons(*count) for count in (counts[0], counts[-1])))
    return [
        *plan.notes,
        f"{out}: {_size(out.stat().st_size)}; {len(plan.n_ff)} layers of {neurons} neurons, "
        f"records of {plan.layout.record_bytes} bytes ({parts}), {plan.activation}",
    ]


def _verification_lines(result: Verification, tolerance: float) -> list[str]:
    rows = [[t.status, t.name, t.types, t.detail] for t in result.tensors if t.status != "identical"]
    counts = ", ".join(f"{count} {status}" for status, count in result.counts().items())
    if result.same:
        verdict = "the same function"
    else:
        verdict = f"within a relative error of {tolerance:g}" if result.within(tolerance) else "not the same function"
    return [
        *_table(rows),
        *(f"key-value {_printable(line)}" for line in result.values),
        *(_printable(line) for line in result.notes),
        f"{counts}: {verdict}",
    ]


def _listing_lines(listing: Listing) -> list[str]:
    files = listing.files[0] if len(listing.files) == 1 else f"{listing.files[0]} and {len(listing.files) - 1} more"
    lines = [f"{files}: {_printable(listing.architecture) or 'no architecture'}, {_size(listing.file_bytes)}", ""]
    for title, totals in (("role", listing.by_role), ("type", listing.by_type)):
        rows = [[name, str(total.tensors), _size(total.bytes)] for name, total in totals.items()]
        lines += [*_table([[title, "tensors", "size"], *rows], right={1, 2}), ""]
    if listing.flash is None:
        return [*lines, "no bundles"]
    return lines + _flash_lines(listing.flash)


def _flash_lines(flash: FlashListing) -> list[str]:
    parts = [[part.name, part.type, str(part.offset), str(part.bytes)] for part in flash.parts]
    layers = [
        [
            str(layer.layer),
            _neurons(layer.n_expert, layer.n_ff),
            str(layer.record_bytes),
            _size(layer.bundle_bytes),
            *((str(layer.predictor_rank), _size(layer.predictor_bytes)) if layer.predictor_rank else ("-", "-")),
        ]
        for layer in flash.layers
    ]
    unit = "record" if flash.layout == "bundled" else "row"
    recall = (
        [] if flash.recall is None else [f"predictors aim at a recall of {flash.recall:.4g} of the activation mass"]
    )
    return [
        f"activation {Activation(flash.activation, flash.threshold)}, layout {flash.layout}, "
        f"records of {flash.record_bytes} bytes",
        *_table([["part", "type", "offset", "bytes"], *parts], right={2, 3}),
        "",
        *(
            f"a {unit} alone: {one.sectors_per_record:.2f} sectors of {one.sector} bytes, {one.over_read:.0%} over-read"
            for one in flash.reads
        ),
        *recall,
        "",
        *_table([["layer", "neurons", "record", "bundle", "rank", "predictor"], *layers], right=set(range(6))),
    ]


def _neurons(n_expert: int, n_ff: int) -> str:
    return f"{n_expert} x {n_ff}" if n_expert else str(n_ff)


def _table(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Aligned columns; `right` names those that are aligned on the right."""
    cells = [[_printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def _size(n_bytes: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= factor:
            return f"{n_bytes / factor:.2f} {unit}"
    return f"{n_bytes} B"


def _printable(text: str) -> str:
    """A damaged file's names may hold anything."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)

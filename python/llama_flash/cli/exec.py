"""`llama-flash exec`: the engine's own tools with weights on flash."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from . import common as c
from .loading import flash_options

if TYPE_CHECKING:
    from ..session.session import FlashSession

__all__ = ["EPILOG", "exec"]

EPILOG = (
    "Examples:  [bold]llama-flash exec --dram-budget 4GiB -- perplexity -m model.gguf -f text.txt[/]   |   "
    "[bold]llama-flash exec -- cli -m model.gguf -p 'Hello' -st[/]   |   [bold]llama-flash exec -- bench --help[/]"
)


def exec(
    ctx: typer.Context,
    command: Annotated[
        list[str],
        typer.Argument(
            help="perplexity, cli, imatrix, bench or quantize, and its own arguments, after --.",
            metavar="-- TOOL...",
        ),
    ],
    flash: Annotated[
        bool,
        typer.Option("--flash/--no-flash", help="With it, or as stock llama.cpp.", rich_help_panel="Flash offload"),
    ] = True,
    dram_budget: c.DramBudget = "auto",
    reserve: c.Reserve = None,
    what: c.What = "auto",
    predictor: c.Predictor = "auto",
    window: c.Window = None,
    lookahead: c.Lookahead = None,
    follow: c.Follow = True,
    warm_start: c.WarmStart = True,
    io_engine: c.IoEngine = "auto",
) -> None:
    """Run a tool of llama.cpp's (llama-perplexity, -cli, -imatrix, -bench, -quantize) with weights on flash.

    The exit code is the tool's, or 1 where a weight could not be read. quantize only reads and writes files.
    """
    from ..server.tools import run_engine_tool

    name, *arguments = command
    options = flash_options(ctx.params) if flash else False
    raise typer.Exit(run_engine_tool(name, arguments, options, _loaded, _failed))


def _loaded(session: FlashSession) -> None:
    c.stderr.print(session.summary, style="dim", soft_wrap=True)


def _failed(reason: str) -> None:
    c.stderr.print(f"llama-flash: {reason}", style="red", soft_wrap=True)

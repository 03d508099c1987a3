"""`llama-flash top`: what is running."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import AsJson, print_json

__all__ = ["EPILOG", "top"]

EPILOG = "Examples:  [bold]llama-flash top[/]   |   [bold]llama-flash top --json[/]"


def top(
    once: Annotated[bool, typer.Option("--once", help="Print the table once, and exit.")] = False,
    seconds: Annotated[float, typer.Option("-d", "--delay", min=0.1, help="Between two looks.")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Show running processes with weights on flash: speed, hit rate, bytes per token, memory, what limits it."""
    from ..budget import status
    from .top_view import show

    if as_json:
        print_json({"processes": status.read_all()})
    else:
        show(once, seconds)

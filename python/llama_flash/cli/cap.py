"""`llama-flash cap`: a command below a memory cap."""

from __future__ import annotations

from typing import Annotated

import typer

from ..capped import run_capped
from .common import report_cap

__all__ = ["EPILOG", "cap"]

EPILOG = "Examples:  [bold]llama-flash cap 2GiB -- python program.py[/]   |   [bold]llama-flash cap 800MB -- make[/]"


def cap(
    limit: Annotated[str, typer.Argument(help='Bytes or a size: 2147483648, "2GiB", "800MB".', metavar="LIMIT")],
    command: Annotated[list[str], typer.Argument(help="The command, after --.", metavar="-- COMMAND...")],
) -> None:
    """Run a command in a fresh memory cgroup of LIMIT bytes, page cache counted, and report the peak."""
    result = run_capped(limit, command)
    report_cap(result)
    raise typer.Exit(result.exit_code)

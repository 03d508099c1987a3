"""`llama-flash cap`: a command below a memory cap."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from ..budget.capped import run_capped
from .common import AsJson, print_json, report_cap

__all__ = ["EPILOG", "cap"]

EPILOG = "Examples:  [bold]llama-flash cap 2GiB -- python program.py[/]   |   [bold]llama-flash cap 800MB -- make[/]"


def cap(
    limit: Annotated[str, typer.Argument(help='Bytes or a size: 2147483648, "2GiB", "800MB".', metavar="LIMIT")],
    command: Annotated[list[str], typer.Argument(help="The command, after --.", metavar="-- COMMAND...")],
    as_json: AsJson = False,
) -> None:
    """Run a command in a fresh memory cgroup of LIMIT bytes, page cache counted, and report the peak.

    With --json what the command prints is part of the object. The exit code is the command's.
    """
    result = run_capped(limit, command, capture_output=as_json)
    if as_json:
        print_json({**asdict(result), "exit_code": result.exit_code})
    else:
        report_cap(result)
    raise typer.Exit(result.exit_code)

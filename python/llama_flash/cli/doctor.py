"""`llama-flash doctor`: whether this machine can do what flash offload needs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from .checks import Finding, examine
from .common import AsJson, model_path, print_json, stderr, stdout

__all__ = ["EPILOG", "doctor"]

EPILOG = "Examples:  [bold]llama-flash doctor[/]   |   [bold]llama-flash doctor ~/models/qwen3-30b-a3b-q4_0.gguf[/]"

_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def doctor(
    path: Annotated[
        Path | None, typer.Argument(help="A model, or the folder in which models lie.", metavar="MODEL_OR_FOLDER")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check whether this machine can do what flash offload needs.

    Each check tries the thing itself. The exit code is 1 if there is a problem that stops flash offload; a warning
    costs speed or a command. Without an argument the model that comes with the package is read.
    """
    chosen = path or model_path(None)
    findings: list[Finding] = []
    checks = examine(chosen)
    while True:
        with stderr.status("checking"):
            finding = next(checks, None)
        if finding is None:
            break
        findings.append(finding)
        if not as_json:
            stdout.print(_line(finding))
    counts = {level: sum(finding.level == level for finding in findings) for level in _STYLES}
    usable = not counts["problem"]
    if as_json:
        print_json({"path": str(chosen), "usable": usable, "findings": [asdict(finding) for finding in findings]})
    else:
        said = ", ".join(f"{n} {level}" for level, n in counts.items())
        stdout.print(f"{said}: flash offload {'works' if usable else 'does not work'} here ({chosen})", soft_wrap=True)
    raise typer.Exit(0 if usable else 1)


def _line(finding: Finding) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(width=7)
    table.add_column(width=13)
    table.add_column(overflow="fold")
    said = Text(finding.found)
    if finding.mend:
        said.append(f"\n{finding.mend}", style="italic")
    table.add_row(Text(finding.level, style=_STYLES[finding.level]), finding.check, said)
    return table

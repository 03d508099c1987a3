"""`llama-flash profile`: what a device gives."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from ..options import FlashOffload
from .common import AsJson, IoEngine, Plot, print_json, stderr, stdout

__all__ = ["EPILOG", "profile"]

EPILOG = (
    "Examples:  [bold]llama-flash profile ~/models/qwen3-30b-a3b-q4_0.gguf[/]   |   "
    "[bold]llama-flash profile /mnt/ssd --json[/]"
)


def profile(
    path: Annotated[
        Path, typer.Argument(help="A large file on the device, best the model; or a folder.", metavar="FILE_OR_FOLDER")
    ],
    io_engine: IoEngine = "auto",
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Measure a device and DRAM in at most 15 seconds, and keep the figures for plans.

    A file of at least 256 MiB is read itself. Else a temporary file of at most 1 GiB is written; it vanishes with the
    program, however that ends.
    """
    from ..device.kept import remember
    from ..device.profile import measure
    from ..kept_files import cache_folder
    from ..observe.pictures import check_target, draw_profile
    from .plan_view import print_profile

    if plot is not None:
        check_target(plot)
    engine = FlashOffload(io_engine=io_engine).io_engine  # type: ignore[arg-type]
    with Progress(console=stderr, transient=True) as progress:
        task = progress.add_task("measuring", total=1.0)
        measured = measure(
            path, io_engine=engine, report=lambda share, what: progress.update(task, completed=share, description=what)
        )
    kept = remember(measured)
    if plot is not None:
        draw_profile(measured, plot)
    if as_json:
        print_json(measured.as_dict())
        return
    print_profile(stdout, measured)
    stdout.print(f"kept in {kept}" if kept else f"not kept: {cache_folder()} cannot be written", soft_wrap=True)

"""`llama-flash worker`: layers of a model, for a client on another host.

Long: the options of the command are the parameters of its function.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..sizes import format_size
from . import common as c

__all__ = ["EPILOG", "worker"]

EPILOG = (
    "Examples:  [bold]llama-flash worker model.gguf --dram-budget 4GiB[/]   |   "
    "[bold]llama-flash worker model.gguf --listen 127.0.0.1:50053 --token-file ~/.flash-token[/]\n\n"
    "A client names it: [bold]llama-flash run model.gguf --workers 127.0.0.1:50052,127.0.0.1:50053[/]"
)


def worker(
    model: c.Model = None,
    dram_budget: c.DramBudget = "auto",
    reserve: c.Reserve = None,
    listen: Annotated[str, typer.Option("--listen", metavar="HOST:PORT", help="Where clients find it.")] = (
        "127.0.0.1:50052"
    ),
    token_file: Annotated[
        Path | None,
        typer.Option("--token-file", metavar="FILE", help="Its first line is what clients must know, too."),
    ] = None,
    listen_anywhere: Annotated[
        bool,
        typer.Option(
            "--listen-anywhere", help="HOST may be reached by others. Nothing is encrypted: a private network."
        ),
    ] = False,
    read_timeout: Annotated[
        float,
        typer.Option(
            "--read-timeout",
            metavar="SECONDS",
            min=0,
            help="A read that takes longer ends the client's session: its drive does not answer. 0: never.",
        ),
    ] = 30.0,
    lookahead: c.Lookahead = None,
    warm_start: c.WarmStart = True,
    io_engine: c.IoEngine = "auto",
    threads: c.Threads = 0,
) -> None:
    """Hold layers of a model, with flash and a budget of its own, and compute them for one client at a time.

    The client says which layers. It has the same file, and no weight is sent. Ends with Ctrl-C or SIGTERM.
    """
    from ..model.gguf import read_gguf
    from ..options import FlashOffload
    from ..workers.listen import Listener, Settings

    path = c.model_path(model)
    meta = read_gguf(path)
    options = {
        "dram_budget": dram_budget,
        "reserve": reserve,
        "lookahead": "auto" if lookahead is None else lookahead,
        "io_engine": io_engine,
        "warm_start": warm_start,
    }
    FlashOffload(**options)  # type: ignore[arg-type]  # refuses what makes no sense
    settings = Settings(path, listen, token_file, listen_anywhere, tuple(options.items()), threads, read_timeout)
    listener = Listener(settings, lambda text: c.stderr.print(f"llama-flash worker: {text}", soft_wrap=True))
    stopped: list[int] = []

    def stop(number: int, _frame: object) -> None:
        stopped.append(number)
        listener.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    guard = "clients need the token" if token_file else "whoever reaches it may use it"
    c.stderr.print(
        f"llama-flash worker: {path.name} ({format_size(meta.file_bytes)}) at {listener.address}, DRAM budget "
        f"{dram_budget}; {guard}",
        soft_wrap=True,
    )
    listener.run()
    sys.exit(130 if signal.SIGINT in stopped else 143)

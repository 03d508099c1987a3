"""The command `llama-flash`. One module per command; what they share is in common.py."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .. import __version__
from ..errors import FlashError
from . import cap, plan, profile, run, serve, top
from .common import fail

__all__ = ["app", "main"]

app = typer.Typer(
    name="llama-flash",
    help="Run GGUF models that are larger than memory: weights stay on flash, answers stay the same.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command(epilog=run.EPILOG)(run.run)
app.command(epilog=serve.EPILOG)(serve.serve)
app.command(epilog=plan.EPILOG)(plan.plan)
app.command(epilog=profile.EPILOG)(profile.profile)
app.command(epilog=cap.EPILOG)(cap.cap)
app.command(epilog=top.EPILOG)(top.top)


def main() -> None:
    """Entry point. Errors that a user can do something about are one line, without a traceback."""
    try:
        app()
    except (FlashError, OSError, ValueError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


def _version(asked: bool) -> None:
    if asked:
        print(f"llama-flash {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Say it, exit.")] = False,
) -> None:
    pass

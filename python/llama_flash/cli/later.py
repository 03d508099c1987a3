"""Commands that are imported when they are used, so that `llama-flash --help` is there at once."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from ..errors import FlashError

__all__ = ["COMMANDS", "Group", "Later", "own", "tool"]

COMMANDS = "llama_flash.commands"  # in pyproject.toml, too

Load = Callable[[], TyperCommand]


class Later(TyperCommand):
    """Stands for a command: its name and first line of help. Whatever else is asked, the command itself answers."""

    def __init__(self, name: str, help: str, panel: str, load: Load, *, killed_cleanly: bool = False) -> None:
        super().__init__(name, help=help, rich_help_panel=panel)
        self.load = load
        self._killed_cleanly = killed_cleanly

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        if self._killed_cleanly and not extra.get("resilient_parsing"):
            # so that a killed command leaves no partial file
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        return self.load().make_context(info_name, args, parent, **extra)


class Group(TyperGroup):
    """The commands of `later`, in their order, then those that were added to the app."""

    later: dict[str, Later]

    def list_commands(self, ctx: Any) -> list[str]:
        return [*self.later, *(name for name in super().list_commands(ctx) if name not in self.later)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return self.later.get(cmd_name) or super().get_command(ctx, cmd_name)


def own(name: str) -> Load:
    """The function `name` of the module of that name in this package, with its EPILOG."""

    def load() -> TyperCommand:
        module = import_module(f".{name}", __package__)
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
        app.command(name, epilog=module.EPILOG, context_settings={"help_option_names": ["-h", "--help"]})(
            getattr(module, name)
        )
        command = typer.main.get_command(app)
        assert isinstance(command, TyperCommand)
        return command

    return load


def tool(name: str) -> Load:
    """A command of another package's, which offers its application as an entry point of the group COMMANDS."""

    def load() -> TyperCommand:
        for offered in entry_points(group=COMMANDS):
            group = typer.main.get_command(offered.load())
            if isinstance(group, TyperGroup) and isinstance(command := group.commands.get(name), TyperCommand):
                return command
        raise FlashError(f"no package that is installed has the command {name}: install llama-flash's wheel again")

    return load

"""Writes docs/reference/cli.md from the commands themselves: `make reference`. A test compares the two."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer

from llama_flash.cli import EXIT_CODES, app

TARGET = Path(__file__).parents[2] / "docs/reference/cli.md"

_TABLE = "| | default | |\n|---|---|---|"

HEAD = """\
# The command line

<!-- written by ci/tools/generate_cli_reference.py (make reference) -->

`llama-flash COMMAND --help` says the same. The commands for model files are also those of `python -m gguf_tools`.

- **Sizes** are bytes (`2147483648`), `2GiB`, `1.5G` or `800MB`; budgets and caps can also be a share of the model
  file (`50%`). K, M, G, T are powers of 1024, KB, MB, GB, TB powers of 1000.
- **`--json`** prints exactly one JSON object on stdout; what people read while they wait goes to stderr. After an
  error there is none.
- **Progress** is shown on stderr: a bar on a terminal, else a line every ten seconds.
- **Completion**: `llama-flash --install-completion` sets it up for the shell it runs in (bash, zsh, fish, PowerShell).
- **Files** take their names when they are complete. What a command that was killed (`kill -9`) has left half done, the
  next one that writes the same file removes, and says so; a calibration goes on from it.
- **Text** is UTF-8, in arguments, files and pipes. A terminal that cannot show a character shows its number.
- **Environment**: `LLAMA_FLASH_CACHE` is the folder of profiles, warm starts and what plans learn of runs,
  `LLAMA_FLASH_RUNTIME` that of what `top` shows, `LLAMA_FLASH_WARM_START=0` switches warm starts and that learning off.

| exit code | when |
|---|---|
"""


_SHARED_PANELS = ("Flash offload", "Context")

# for tests/project/test_docs.py, which runs the commands of the other pages
NOT_RUN = "<!-- not run: examples of its help, of large files; the tests of the commands run them on small ones -->"


def reference() -> str:
    """The page."""
    group: Any = typer.main.get_command(app)
    context = group.make_context("llama-flash", [], resilient_parsing=True)
    commands = {name: group.get_command(context, name) for name in group.list_commands(context)}
    commands = {name: command.load() if hasattr(command, "load") else command for name, command in commands.items()}
    shared = _shared(commands.values())
    parts = [
        HEAD + "\n".join(f"| {code} | {when} |" for code, when in EXIT_CODES.items()),
        "## Options of a load",
        f"The same for {', '.join(name for name, c in commands.items() if _loads(c, shared))}.",
        "\n".join([_TABLE, *shared.values()]),
    ]
    parts += [_command(name, command, shared) for name, command in commands.items()]
    return "\n\n".join(parts) + "\n"


def _shared(commands: Iterable[Any]) -> dict[str, str]:
    """Rows of the options of a load, by name: those that three commands have, with the same words and default."""
    rows = [
        (_name(option), _row(option))
        for command in commands
        for option in _options(command)
        if option.rich_help_panel in _SHARED_PANELS
    ]
    return {name: row for name, row in rows if rows.count((name, row)) > 2}


def _loads(command: Any, shared: dict[str, str]) -> bool:
    return sum(shared.get(_name(option)) == _row(option) for option in _options(command)) > 2


def _command(name: str, command: Any, shared: dict[str, str]) -> str:
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    words = [str(a.metavar) if a.required else f"[{a.metavar.strip('[]')}]" for a in arguments]
    parts = [f"## {name}", f"```text\nllama-flash {' '.join([name, '[OPTIONS]', *words])}\n```", _flat(command.help)]
    rows = [f"| `{word}` | | {_cell(argument.help)} |" for word, argument in zip(words, arguments, strict=True)]
    own = [option for option in _options(command) if shared.get(_name(option)) != _row(option)]
    parts.append("\n".join([_TABLE, *rows, *map(_row, own)]))
    if rest := [f"`{_name(option)}`" for option in _options(command) if option not in own]:
        parts.append(f"And of the [options of a load](#options-of-a-load): {', '.join(rest)}.")
    if command.epilog:
        examples = re.findall(r"\[bold\](.*?)\[/\]", command.epilog)
        parts.append("\n".join([NOT_RUN, "```sh", *examples, "```"]))
    return "\n\n".join(parts)


def _options(command: Any) -> list[Any]:
    return [param for param in command.params if param.param_type_name == "option" and not param.hidden]


def _name(option: Any) -> str:
    return next(str(name) for name in option.opts if name.startswith("--"))


def _row(option: Any) -> str:
    return f"| {_names(option)} | {_default(option)} | {_cell(option.help)} |"


def _names(option: Any) -> str:
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    return f"{names} {_cell(option.metavar)}".rstrip()


def _default(option: Any) -> str:
    if isinstance(option.show_default, str):
        return option.show_default
    if option.default is None or option.show_default is False or callable(option.default):
        return ""
    if option.is_flag:
        return ("on" if option.default else "off") if option.secondary_opts else ""
    return f"`{option.default}`"


def _flat(text: str) -> str:
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if docs/reference/cli.md is stale; write nothing")
    args = parser.parse_args()
    page = reference()
    if not args.check:
        TARGET.write_text(page, encoding="utf-8")
    elif not TARGET.exists() or TARGET.read_text(encoding="utf-8") != page:
        sys.exit("error: docs/reference/cli.md is stale: run `make reference`")


if __name__ == "__main__":
    main()

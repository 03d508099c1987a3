"""`llama-flash prompts`: what the folder of prompts holds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..prompts.folder import Folder
from ..prompts.listing import Prompt, drop, prompts_of, tokens_of, verify
from ..prompts.store import default_folder
from ..sizes import format_size
from . import common as c

__all__ = ["EPILOG", "prompts"]

EPILOG = (
    "Examples:  [bold]llama-flash prompts list[/]   |   [bold]llama-flash prompts show 3f2a --model model.gguf[/]   "
    "|   [bold]llama-flash prompts drop --all[/]"
)
_ACTIONS = ("list", "show", "drop", "verify")
_SHORT = 12  # characters of a key, for people


def prompts(
    action: Annotated[str, typer.Argument(help="list, show, drop or verify.", metavar="ACTION")] = "list",
    name: Annotated[
        str | None, typer.Argument(help="A prompt as `list` names it, or the beginning of that.", metavar="[NAME]")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--dir", metavar="DIR", help="Default: prompts in the user's cache folder.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option("--model", metavar="MODEL.gguf", help="show: the text, by this model's vocabulary.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="drop: all of them.")] = False,
    as_json: c.AsJson = False,
) -> None:
    """List, show, drop or verify the prompts whose state is kept on flash.

    They hold what people typed: the folder and its files are open to their owner alone. `verify` reads all of them, and
    ends with 1 if one is damaged; a damaged one is never used.
    """
    if action not in _ACTIONS:
        raise ValueError(f"{action!r} is not one of {', '.join(_ACTIONS)}")
    import llama_cpp  # noqa: F401  # registers the plugin, which knows the checksums

    place = folder or default_folder()
    if not place.exists() and folder is None:
        _say_nothing(action, as_json)
        return
    there = Folder(place, make=False)
    if action == "list":
        _list(prompts_of(there), as_json)
    elif action == "verify":
        _verify(there, as_json)
    elif action == "drop" and everything:
        _drop(there, list(prompts_of(there)), as_json)
    else:
        chosen = _named(prompts_of(there), name)
        _drop(there, [chosen], as_json) if action == "drop" else _show(there, chosen, model, as_json)


def _say_nothing(action: str, as_json: bool) -> None:
    if as_json:
        c.print_json({"prompts": []} if action == "list" else {"damaged": [], "freed_bytes": 0})
    else:
        c.stdout.print("no prompts are kept")


def _named(found: list[Prompt], name: str | None) -> Prompt:
    if name is None:
        raise ValueError("which one? `llama-flash prompts list` names them; drop: or --all")
    meant = [prompt for prompt in found if prompt.key.startswith(name)]
    if len(meant) != 1:
        raise ValueError(f"{name!r}: {'no such prompt' if not meant else f'{len(meant)} prompts begin so'}")
    return meant[0]


def _list(found: list[Prompt], as_json: bool) -> None:
    if as_json:
        c.print_json({"prompts": [vars(prompt) for prompt in found]})
        return
    if not found:
        c.stdout.print("no prompts are kept")
        return
    table = Table("prompt", "model", "tokens", "size", "shared with others", "last used")
    for prompt in found:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(prompt.used))
        sizes = format_size(prompt.size), format_size(prompt.shared)
        table.add_row(prompt.key[:_SHORT], prompt.label, str(prompt.tokens), *sizes, used)
    c.stdout.print(table)


def _show(folder: Folder, prompt: Prompt, model: Path | None, as_json: bool) -> None:
    tokens = tokens_of(folder, prompt.key)
    said: dict[str, Any] = {**vars(prompt), "token_ids": tokens}
    if model is not None:
        said["text"] = _text(c.model_path(model), tokens)
    if as_json:
        c.print_json(said)
        return
    c.stderr.print(f"{prompt.key}: {prompt.label}, {prompt.tokens} tokens, {format_size(prompt.size)}", soft_wrap=True)
    print(said.get("text") or " ".join(map(str, tokens)))


def _text(path: Path, tokens: list[int]) -> str:
    import llama_cpp

    llm = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    try:
        if tokens and max(tokens) >= llm.n_vocab():
            raise ValueError(f"{path}: the prompt is of another model: it has no token {max(tokens)}")
        text: str = llm.detokenize(tokens, special=True).decode(errors="replace")
        return text
    finally:
        llm.close()


def _drop(folder: Folder, chosen: list[Prompt], as_json: bool) -> None:
    freed = sum(drop(folder, prompt.key) for prompt in chosen)
    if as_json:
        c.print_json({"dropped": len(chosen), "freed_bytes": freed})
    else:
        c.stdout.print(f"{len(chosen)} dropped, {format_size(freed)} free again")


def _verify(folder: Folder, as_json: bool) -> None:
    damaged = list(verify(folder))
    n_files = sum(1 for _ in folder.entries())
    if as_json:
        c.print_json({"files": n_files, "damaged": [{"file": name, "why": why} for name, why in damaged]})
    else:
        for name, why in damaged:
            c.stdout.print(f"{name}: {why}", soft_wrap=True)
        c.stdout.print(f"{n_files} files, {len(damaged)} damaged")
    if damaged:
        raise typer.Exit(1)

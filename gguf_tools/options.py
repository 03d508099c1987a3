"""Options that the commands share: one name and one meaning each, the same as those of `llama-flash`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from gguf import GGMLQuantizationType

from gguf_tools.errors import GgufToolsError
from gguf_tools.neurons import MEMORY
from gguf_tools.types import kind_named
from llama_flash.sizes import parse_size

Output = Annotated[Path, typer.Argument(help="The file to write.", metavar="OUT")]
Force = Annotated[bool, typer.Option("--force", help="Replace OUT if it is there.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, instead of text.")]
Threads = Annotated[int, typer.Option("-t", "--threads", min=0, help="Of the engine. 0: one per core.")]
Memory = Annotated[str, typer.Option("--memory", metavar="SIZE", help="Memory to work in: a size, or a number of MiB.")]
DEFAULT_MEMORY = f"{MEMORY >> 20}MiB"


def memory_bytes(text: str) -> int:
    """Bytes meant by --memory.

    Raises:
        GgufToolsError: not a size.
    """
    try:
        return int(text) << 20 if text.isascii() and text.isdigit() and int(text) else parse_size(text)
    except ValueError as error:
        raise GgufToolsError(f"--memory: {error}") from None


def kind_of(name: str) -> GGMLQuantizationType:
    """The type of that name.

    Raises:
        GgufToolsError: there is none.
    """
    try:
        return kind_named(name)
    except ValueError as error:
        raise GgufToolsError(str(error)) from None


def print_json(values: Mapping[str, Any]) -> None:
    """One object."""
    print(json.dumps(values, indent=2))


def written(out: Path) -> dict[str, Any]:
    """What is said of every file that was written."""
    return {"file": str(out), "bytes": out.stat().st_size}

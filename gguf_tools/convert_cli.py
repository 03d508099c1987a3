"""The command `python -m gguf_tools convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gguf_tools.convert import FILE_TYPES, convert
from gguf_tools.errors import GgufToolsError
from gguf_tools.neurons import MEMORY
from gguf_tools.types import kind_named

_TYPES = "|".join(kind.name.lower().replace("_k", "_K") for kind in FILE_TYPES)


def command(
    directory: Annotated[
        Path, typer.Argument(help="A folder with config.json, weights and tokenizer.", metavar="HF_DIR")
    ],
    out: Annotated[Path, typer.Argument(help="The file to write.", metavar="OUT")],
    type_name: Annotated[str, typer.Option("--type", metavar=_TYPES, help="Type of the matrices.")] = "f16",
    bundle: Annotated[bool, typer.Option("--bundle/--no-bundle", help="Neuron bundles, or an ordinary GGUF.")] = True,
    memory: Annotated[int, typer.Option("--memory", min=1, metavar="MIB", help="Memory to work in, in MiB.")] = (
        MEMORY >> 20
    ),
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is there.")] = False,
) -> None:
    """Make a GGUF file of a Hugging Face checkpoint."""
    try:
        kind = kind_named(type_name)
    except ValueError as error:
        raise GgufToolsError(str(error)) from None
    progress = f"converting {directory.resolve().name}"
    done = convert(directory, out, kind=kind, bundled=bundle, memory=memory << 20, force=force, progress=progress)
    if ignored := done.source.ignored:
        print(f"tensors left out: {len(ignored)}, such as {ignored[0]}")
    size = out.stat().st_size / 1e6
    if done.bundles is None:
        print(f"{out}: {size:.1f} MB, {len(done.source.tensors)} tensors, activation {done.source.activation_name}")
        return
    for note in done.bundles.notes:
        print(note)
    layout = done.bundles.layout
    print(
        f"{out}: {size:.1f} MB, {len(done.bundles.n_ff)} layers of bundles, records of {layout.record_bytes} bytes, "
        f"{done.bundles.activation}"
    )

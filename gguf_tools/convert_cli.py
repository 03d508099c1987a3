"""The command `python -m gguf_tools convert`, which is also `llama-flash convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gguf_tools.convert import FILE_TYPES, convert
from gguf_tools.options import DEFAULT_MEMORY, AsJson, Force, Memory, Output, kind_of, memory_bytes, print_json, written

EPILOG = (
    "Examples:  [bold]llama-flash convert ~/models/opt-6.7b opt-flash.gguf --type q8_0[/]   |   "
    "[bold]llama-flash convert ~/models/llama-2-7b llama.gguf --no-bundle[/]"
)

_TYPES = "|".join(kind.name.lower().replace("_k", "_K") for kind in FILE_TYPES)


def command(
    directory: Annotated[
        Path, typer.Argument(help="A folder with config.json, weights and tokenizer.", metavar="HF_DIR")
    ],
    out: Output,
    type_name: Annotated[str, typer.Option("--type", metavar=_TYPES, help="Type of the matrices.")] = "f16",
    bundle: Annotated[bool, typer.Option("--bundle/--no-bundle", help="Neuron bundles, or an ordinary GGUF.")] = True,
    memory: Memory = DEFAULT_MEMORY,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Make a GGUF file of a Hugging Face checkpoint."""
    done = convert(
        directory,
        out,
        kind=kind_of(type_name),
        bundled=bundle,
        memory=memory_bytes(memory),
        force=force,
        progress=f"converting {directory.resolve().name}",
    )
    if as_json:
        bundles = None if done.bundles is None else done.bundles.as_dict()
        source = {"tensors": len(done.source.tensors), "left_out": list(done.source.ignored)}
        print_json({**written(out), **source, "activation": done.source.activation_name, "bundles": bundles})
        return
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

"""Makes an ordinary GGUF file of a flash file again: any llama.cpp that knows the architecture can load it."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from gguf import GGMLQuantizationType

from gguf_tools.errors import GgufToolsError
from gguf_tools.format import read_flash
from gguf_tools.neurons import MEMORY, Transposed, all_rows_as, without_bundles
from gguf_tools.source import open_gguf
from gguf_tools.stream import PlannedTensor, copied, write_gguf
from gguf_tools.types import quantisable

_ALIGNMENT = 32  # of ordinary files


def unbundle(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    down_kind: GGMLQuantizationType | None = None,
    memory: int = MEMORY,
    force: bool = False,
    progress: str | None = None,
) -> None:
    """Writes a flash file as an ordinary one: bundles become gate, up and down again, predictors are dropped.

    Rows of gate and up are copied bit by bit. down_kind: type of down; None: F32 where the bundles hold it quantised,
    which loses nothing, else the type it has. The key of the activation stays, unless it is that of experts. memory,
    force, progress: see `bundle`.

    Raises:
        GgufToolsError: not a flash file, damaged, a type that the rows of down cannot have, or it cannot be written.
        OSError: the file cannot be opened.
    """
    path = Path(path)
    source = open_gguf(path)
    if read_flash(source, path) is None:
        raise GgufToolsError("has no bundles", file=path)
    model = without_bundles(source, path)
    planned = []
    for name, tensor in model.tensors.items():
        if not isinstance(tensor, Transposed):
            planned.append(copied(tensor))
            continue
        kind = tensor.kind if down_kind is None else down_kind
        if quantisable(kind, tensor.shape[0]) != kind:
            raise GgufToolsError(f"its rows of {tensor.shape[0]} elements cannot be {kind.name}", tensor=name)
        planned.append(PlannedTensor(name, tensor.shape, kind, partial(all_rows_as, tensor, kind, memory)))
    write_gguf(
        out,
        model.values,
        planned,
        alignment=_ALIGNMENT,
        progress=progress,
        force=force,
        inputs=source.files,
    )

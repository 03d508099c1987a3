"""`llama-flash draft`: a copy of a model at few bits, which drafts for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ..errors import FlashError
from . import common as c

__all__ = ["EPILOG", "draft"]

EPILOG = (
    "Examples:  [bold]llama-flash draft model.gguf model-draft.gguf[/]   then   "
    "[bold]llama-flash run model.gguf --draft model-draft.gguf -p ...[/]"
)

_TYPES = ("q2_k", "q2_0", "q3_k_s", "q4_0")


def draft(
    model: c.Model = None,
    out: Annotated[
        Path | None,
        typer.Argument(metavar="COPY.gguf", help="Default: beside the model, as NAME-draft.gguf.", show_default=False),
    ] = None,
    kind: Annotated[str, typer.Option("--type", help=f"Of its matrices: {', '.join(_TYPES)}.")] = "q2_k",
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    as_json: c.AsJson = False,
) -> None:
    """Make a copy of a model at few bits that drafts for it: where a dense model has no small sibling.

    The copy is in memory whole when it drafts, and takes that from the model's slots: `llama-flash plan --draft` says
    what it costs and brings.
    """
    path = c.model_path(model)
    if kind not in _TYPES:
        raise ValueError(f"--type: {kind!r} is not one of {', '.join(_TYPES)}")
    target = out or path.with_name(f"{path.stem}-draft.gguf")
    if target.exists() and (not force or target.samefile(path)):
        raise ValueError(f"{target} is there already" + ("" if target.samefile(path) else ": --force writes over it"))
    with c.stderr.status(f"writing {target.name}"):
        quantize(path, target, kind)
    copy, model_bytes = target.stat().st_size, path.stat().st_size
    if as_json:
        c.print_json({"path": str(target), "bytes": copy, "model_bytes": model_bytes, "type": kind})
        return
    c.stderr.print(f"{target}: {copy / 1e6:.1f} MB, of {model_bytes / 1e6:.1f}", soft_wrap=True)


def quantize(path: Path, target: Path, kind: str) -> None:
    """Writes the copy by the engine's quantiser. The file has its name when it is complete.

    Raises:
        FlashError: the engine cannot make it.
        OSError: it cannot be written.
    """
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    params.allow_requantize = True
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        code = llama_cpp.llama_model_quantize(os.fsencode(path), os.fsencode(partial), params)
        if code != 0 or not partial.exists():
            raise FlashError(f"{path}: the engine cannot make a copy of it in {kind} (llama_model_quantize: {code})")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)

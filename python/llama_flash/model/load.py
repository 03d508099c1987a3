"""Loading a model and making a context, with the engine's reason in the error where it fails.

The engine returns a null pointer and has logged why; for what its authors took to be impossible it ends the process.
The plugin listens to the log, and makes errors of the asserts (plugin/src/engine_guard.cpp). Here what was heard
becomes one line that says what to do, too.

Imported by llama_cpp itself, so nothing here imports llama_cpp at first.
"""

from __future__ import annotations

import os
import re
from typing import Any

from ..budget.limits import addresses_hint
from ..errors import FlashError, FlashFormatError
from ..native.calls import guarded

__all__ = ["load_model", "new_context"]

_FUNCTION = re.compile(r"^(?:[A-Za-z_][\w:~<>]*: )+(?=\S)")
_STAGES = re.compile(r"error loading model(?: [a-z]+)*: |failed to initialize the context: |cpp: ")
_ASSERT = re.compile(r"(?:\S*/)?([\w.-]+\.(?:c|cpp|h|hpp):\d+): (?:GGML_ASSERT\((.*)\) failed)?")
_SAYS_NOTHING = re.compile(r"failed to (?:load|read) (?:model|header|key-value pairs|tensor info|tensor data|GGUF)\b.*")
_MEMORY = re.compile(r"alloc|out of memory|std::length_error|vector::", re.IGNORECASE)

_DAMAGED = "the file is damaged or not made for this engine: get it anew and compare its checksum, or convert it again"
_MENDS = (  # the first that matches
    (
        re.compile(r"unknown model architecture"),
        "this version of the engine does not have it: update, or use the program that the file is for",
    ),
    (
        re.compile(r"split file"),
        "name the first shard, whose name ends in -00001-of-..., with the others beside it under their own names",
    ),
    (
        re.compile(r"CLIP|mmproj"),
        "it is the part of a model that looks at images: name the model itself",
    ),
    (
        re.compile(r"tensor '.*' not found|wrong number of tensors|tensors expected but"),
        "the file is not whole, or its converter was of another version: get it anew, or convert it again",
    ),
)


class _LoadError(FlashError, ValueError):
    """Not the file's fault. A ValueError as upstream's is."""


def load_model(path: str | os.PathLike[str], params: Any) -> int:
    """llama_model_load_from_file: the address of the model.

    Args:
        params: llama_model_params.

    Raises:
        FlashFormatError: the engine refuses the file, with its reason; also a ValueError.
        FlashError: there is no memory for it; also a ValueError.
    """
    made, reason = guarded("llama_flash_load_model", os.fsencode(path), params)
    if made:
        return made
    raise _error(f"Failed to load model from file: {os.fspath(path)}", reason)


def new_context(path: str | os.PathLike[str], model: int, params: Any) -> int:
    """llama_init_from_model: the address of the context.

    Args:
        path: of the model, for messages.
        params: llama_context_params.

    Raises:
        FlashFormatError: what the file says of the model is impossible; also a ValueError.
        FlashError: the context cannot be made of these parameters, or there is no memory for it; also a ValueError.
    """
    made, reason = guarded("llama_flash_new_context", model, params)
    if made:
        return made
    said = f"Failed to create llama_context: {os.fspath(path)}"
    if _ASSERT.search(reason):
        raise _error(said, reason)
    raise _LoadError(f"{said}: {_clean(reason)}")


def _error(said: str, log: str) -> FlashError:
    reason = _clean(log)
    limit = addresses_hint()
    if _MEMORY.search(reason) and (limit or not _ASSERT.search(log)):
        return _LoadError(f"{said}: {reason}: there is too little memory for it, or the file claims too much{limit}")
    mend = next((mend for pattern, mend in _MENDS if pattern.search(reason)), _DAMAGED)
    return FlashFormatError(f"{said}: {reason}", mend=mend)


def _clean(log: str) -> str:
    """One line of what the engine logged, without the names of its functions and folders."""
    lines: list[str] = []
    for line in log.splitlines():
        said = _STAGES.sub("", _FUNCTION.sub("", line.strip(), count=1))
        said = _ASSERT.sub(_as_words, _FUNCTION.sub("", said, count=1) if ".cpp:" not in said else said)
        if said and said not in lines:
            lines.append(said)
    telling = [line for line in lines if not _SAYS_NOTHING.fullmatch(line)]
    return "; ".join(telling or lines[:1]) or "the engine does not say why"


def _as_words(match: re.Match[str]) -> str:
    if match[2] is None:
        return f"({match[1]}) "
    return f"its head says what cannot be, {match[2]} does not hold ({match[1]})"

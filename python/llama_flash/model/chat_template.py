"""Chat templates that do not parse: the model is loaded all the same, and who asks for the template is told.

Imported by llama_cpp itself, so nothing here imports llama_cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

__all__ = ["broken_template"]


def broken_template(path: str, name: str, error: Exception) -> Callable[..., NoReturn]:
    """A chat handler that raises a ValueError, which names the model and what is wrong with its template."""
    message = (
        f"{path}: the chat template {name.removeprefix('chat_template.')!r} does not parse ({error}): "
        "choose another one with chat_format, or give chat_handler"
    )

    def handler(**_: Any) -> NoReturn:
        raise ValueError(message)

    return handler

"""The error that all of gguf_tools raises for a file, an option or a model that it cannot work with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llama_flash.errors import FlashFormatError


class GgufToolsError(ValueError):
    """Something is wrong with a file, or with what is asked of it.

    Attributes:
        file: the file's path as given, "" if no file is meant.
        tensor: name of the tensor that it is about, "" if none.
        key: the key-value that it is about, "" if none.
    """

    def __init__(self, message: str, *, file: Path | str = "", tensor: str = "", key: str = "") -> None:
        super().__init__(": ".join(part for part in (str(file), tensor or key, message) if part))
        self.file = str(file)
        self.tensor = tensor
        self.key = key


@contextmanager
def errors_of_tools(file: Path | str | None = None) -> Iterator[None]:
    """What llama_flash finds wrong with a file is raised as the tools' own error. file: its name, if not as it was."""
    try:
        yield
    except FlashFormatError as error:
        name = error.file if file is None else file
        said = f"{error.said}; {error.mend}" if error.mend else error.said
        raise GgufToolsError(said, file=name, tensor=error.tensor, key=error.key) from None

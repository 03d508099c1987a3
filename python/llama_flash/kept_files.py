"""What is kept between runs: small files in the user's cache folder, each a help that nothing depends on."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["cache_folder", "write_whole"]


def cache_folder() -> Path:
    """$LLAMA_FLASH_CACHE, else llama-flash in $XDG_CACHE_HOME, else in ~/.cache."""
    if named := os.environ.get("LLAMA_FLASH_CACHE"):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # others are to be ignored, says the XDG specification
        return Path(base, "llama-flash")
    return Path(os.path.expanduser("~"), ".cache", "llama-flash")


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file so that readers see the one before or this one. Raises OSError; nothing is left then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.stem[:40]}-", delete=False) as stream:
        temporary = Path(stream.name)
        try:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

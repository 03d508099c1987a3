"""config.json, read with its types checked: whatever is missing or of another type is an error that names the key."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf_tools.errors import GgufToolsError

_MISSING: Any = object()
_LARGEST = 2**31 - 1  # what the engine reads these numbers into


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises GgufToolsError otherwise, and OSError if it cannot be opened."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(value, ensure_ascii=False).encode()  # halves of surrogate pairs are JSON, but no text
    except (ValueError, RecursionError) as error:
        raise GgufToolsError(f"is not JSON: {error}", file=path) from None
    if not isinstance(value, dict):
        raise GgufToolsError("is not a JSON object", file=path)
    return value


def read_json_if_there(path: Path) -> dict[str, Any]:
    """`read_json`, {} if there is no such file."""
    return read_json(path) if path.is_file() else {}


@dataclass(frozen=True)
class Config:
    """A checkpoint's configuration. Where several keys are given, the first one that is there and not null counts."""

    values: dict[str, Any]
    file: Path

    def error(self, message: str, key: str) -> GgufToolsError:
        return GgufToolsError(message, file=self.file, key=key)

    def whole(self, *keys: str, default: int = _MISSING, least: int = 1) -> int:
        key, value = self._find(keys, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(f"is {value!r:.60}, not a whole number", key)
        if not least <= value <= _LARGEST:
            raise self.error(f"is {value}, not between {least} and {_LARGEST}", key)
        return value

    def number(self, *keys: str, default: float = _MISSING) -> float:
        key, value = self._find(keys, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.error(f"is {value!r:.60}, not a number", key)
        return float(value)

    def flag(self, *keys: str, default: bool = _MISSING) -> bool:
        key, value = self._find(keys, default)
        if not isinstance(value, bool):
            raise self.error(f"is {value!r:.60}, not true or false", key)
        return value

    def text(self, *keys: str, default: str = _MISSING) -> str:
        key, value = self._find(keys, default)
        if not isinstance(value, str):
            raise self.error(f"is {value!r:.60}, not a string", key)
        return value

    def section(self, key: str) -> Config:
        """An object within the configuration; an empty one if it is not there."""
        value = self.values.get(key)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self.error(f"is {value!r:.60}, not an object", key)
        return Config(value, self.file)

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def refuse(self, key: str, usual: Any, message: str) -> None:
        """Raises GgufToolsError if the key is there with another value than the usual one."""
        if self.values.get(key, usual) not in (usual, None):
            raise self.error(f"is {self.values[key]!r:.60}: {message}", key)

    def _find(self, keys: tuple[str, ...], default: Any) -> tuple[str, Any]:
        for key in keys:
            if self.has(key):
                return key, self.values[key]
        if default is _MISSING:
            raise self.error("is missing", keys[0])
        return keys[0], default

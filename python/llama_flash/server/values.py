"""Settings of both servers as they are written: in a file (YAML or JSON), as options of flash."""

from __future__ import annotations

import contextlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..errors import FlashError
from ..options import FlashOffload

__all__ = ["ENV_PREFIX", "flash_values", "read_file"]

ENV_PREFIX = "LLAMA_FLASH_SERVE_"


def flash_values(value: object) -> dict[str, Any] | bool:
    """The setting `flash_offload`: true, false or options of FlashOffload, which may be text where they are none.

    Raises:
        ValueError: what is wrong with it.
    """
    if isinstance(value, bool):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is neither true nor false, nor options by name")
    options = [option.name for option in fields(FlashOffload)]
    if unknown := sorted(map(str, value.keys() - set(options))):
        raise ValueError(f"there is no option {', '.join(unknown)}; there are {', '.join(options)}")
    values = {name: _plain(option) for name, option in value.items()}
    try:
        FlashOffload(**values)
    except TypeError as error:
        raise ValueError(str(error)) from None
    return values


def read_file(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A file of settings: the server's, and those of each of its models, of which there is one at least.

    Raises:
        ValueError: it is no such file.
        FlashError: it is YAML, and PyYAML is missing.
        OSError: it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise type(error)(f"{path}: {error.strerror}") from None
    data = _parsed(path, text)
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected settings by name, and a list of models")
    models = data.pop("models", None)
    if not isinstance(models, list) or not models or not all(isinstance(model, dict) for model in models):
        raise ValueError(f"{path}: expected a list `models`, each with its settings")
    for settings in (data, *models):
        for name in settings:
            if not isinstance(name, str):
                raise ValueError(f"{path}: there is no setting {name!r}")
    for i, model in enumerate(models):
        if "model" not in model:
            raise ValueError(f"{path}: models.{i}.model: the path of the GGUF file is missing")
    return data, models


def _parsed(path: Path, text: str) -> Any:
    if path.suffix not in (".yaml", ".yml"):
        try:
            return json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    try:
        import yaml
    except ImportError:
        raise FlashError(f"{path}: YAML needs PyYAML (python -m pip install PyYAML); JSON does not") from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None


def _plain(value: object) -> Any:
    """Variables of the environment are text, some options are not."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            parsed = json.loads(value)
            return parsed if isinstance(parsed, bool | int | float) else value
    return value

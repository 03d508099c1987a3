"""What is to be served, and how: flags before the settings file before the environment before the defaults.

The settings are upstream's (llama_cpp.server.settings), with `flash_offload` and other defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_cpp.server.settings import ModelSettings, ServerSettings
from pydantic import Field, ValidationError, field_validator
from pydantic_settings import SettingsConfigDict

from ..budget.cores import default_threads
from .values import ENV_PREFIX, flash_values, read_file

__all__ = ["ENV_PREFIX", "ServedModel", "Service", "read_settings"]

_CONFIG = SettingsConfigDict(env_prefix=ENV_PREFIX, env_nested_delimiter="__", protected_namespaces=())


class ServedModel(ModelSettings):  # type: ignore[misc]
    """One model. The defaults are upstream's but for memory and cores."""

    model_config = _CONFIG

    model: str = Field(default="", description="Path of the GGUF file, or of its first shard.")
    flash_offload: dict[str, Any] | bool = Field(default=True, description="True, False or FlashOffload's options.")
    logits_all: bool = Field(default=False, description="Keep the logits of all tokens: for logprobs; takes memory.")
    use_mlock: bool = Field(default=False, description="Has no effect together with flash_offload.")
    n_threads: int = Field(default_factory=default_threads, ge=1)
    n_threads_batch: int = Field(default_factory=default_threads, ge=1)
    verbose: bool = Field(default=False, description="Show the engine's log.")

    @field_validator("flash_offload", mode="before")
    @classmethod
    def _check_options(cls, value: object) -> object:
        return flash_values(value)


class Service(ServerSettings):  # type: ignore[misc]
    """The server. It is reached from this machine alone, and answers are not cut short by the next request."""

    model_config = _CONFIG

    host: str = Field(default="127.0.0.1", description="Address to listen at.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen at; 0: any.")
    interrupt_requests: bool = Field(default=False, description="End a running stream when another request comes.")


def read_settings(
    config_file: Path | None,
    server_flags: Mapping[str, Any],
    model_flags: Mapping[str, Any],
    flash_flags: Mapping[str, Any],
    default_model: Path | None = None,
) -> tuple[Service, list[ServedModel]]:
    """The server's settings and those of its models, the first of which is loaded at once.

    Args:
        config_file: YAML or JSON: the server's settings, and a list `models`.
        server_flags, model_flags: settings given as flags; those of models hold for all of them.
        flash_flags: options of FlashOffload given as flags, which add to those of the file.
        default_model: served if none is named.

    Raises:
        ValueError: what is wrong with which setting.
        FileNotFoundError: no such model, no such file of settings.
    """
    server: dict[str, Any] = {}
    entries: list[dict[str, Any]] = [{}]
    if config_file is not None:
        server, entries = read_file(config_file)
    where = "" if config_file is None else f"{config_file}: "
    service: Service = _checked(where, Service, {**server, **server_flags})
    models = []
    for i, entry in enumerate(entries):
        place = where if config_file is None else f"{where}models.{i}."
        options = {**entry, **model_flags}
        if flash_flags:
            options["flash_offload"] = {**_as_options(entry.get("flash_offload")), **flash_flags}
        model: ServedModel = _checked(place, ServedModel, options)
        if not model.model and default_model is not None:
            model.model = str(default_model)
        _check_file(model)
        if not model.model_alias:
            model.model_alias = Path(model.model).name.removesuffix(".gguf")
        models.append(model)
    names = [model.model_alias for model in models]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{where}several models are called {', '.join(sorted(twice))}: give each a model_alias")
    return service, models


def _as_options(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _check_file(model: ServedModel) -> None:
    if model.hf_model_repo_id is None and not Path(model.model).is_file():
        raise FileNotFoundError(f"no such model: {model.model or '(none named)'}")


def _checked(where: str, kind: type[Any], values: dict[str, Any]) -> Any:
    try:
        return kind(**values)
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors())
        raise ValueError(where + "; ".join(problems)) from None

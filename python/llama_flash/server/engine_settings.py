"""What llama-server is to serve, and how: flags before the settings file before the environment before the defaults.

The names are those of the classic server (settings.py), where they mean something here, and those of flags.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..errors import FlashFormatError
from ..file_kind import kind_of_file
from ..model.shape import KV_TYPES
from ..sizes import parse_size
from .limits import Limits
from .values import ENV_PREFIX, flash_values, read_file

__all__ = ["POOLINGS", "REASONING_FORMATS", "EngineSettings", "read_engine_settings"]

POOLINGS = ("none", "mean", "cls", "last", "rank")
REASONING_FORMATS = ("auto", "none", "deepseek", "deepseek-legacy")

_MIB = 1 << 20


@dataclass(frozen=True)
class EngineSettings:
    """What is served, and how.

    Attributes:
        alias: its name for clients; "": the file's.
        parallel: sequences that are computed at the same time, at most; None: as many as cost little.
        n_ctx: tokens of each sequence; None: 2048, or fewer if the model was trained so.
        n_batch, n_ubatch: tokens of a pass, and of those the ones that are computed at once: what neighbours wait for
            while a prompt is computed.
        threads, threads_batch: None: as many as may run.
        type_k, type_v: of the KV cache, by name.
        embeddings: vectors in place of answers. One at a time: the engine divides a pass with several sequences of
            unequal length, and would pool the parts of one by themselves.
        pooling: of embeddings; None: as the model says.
        lora: adapter and its scale.
        chat_template: in place of the model's own.
        chat_template_kwargs: for the template.
        prompt_cache: where the state of prompts is kept on flash: a folder, or true; it goes into flash_offload.
        prompt_cache_size: bytes that these files may take; the same.
        prompt_cache_ram: bytes for prompts that were computed before and have left the KV cache.
        seed: of requests that name none; None: a random one for each.
        page: the one for chats, at `/`.
        threads_http: requests that are received at the same time; None: a few more than `parallel`.
        flash_offload: as `Llama` takes it.
        limits: of what clients may ask for.
    """

    model: Path
    alias: str = ""
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    parallel: int | None = None
    n_ctx: int | None = None
    n_batch: int = 512
    n_ubatch: int = 512
    threads: int | None = None
    threads_batch: int | None = None
    type_k: str = "f16"
    type_v: str = "f16"
    embeddings: bool = False
    pooling: str | None = None
    lora: tuple[Path, float] | None = None
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    reasoning_format: str = "auto"
    prompt_cache: bool | str = False
    prompt_cache_size: str | int | None = None
    prompt_cache_ram: int = 0
    seed: int | None = None
    page: bool = True
    threads_http: int | None = None
    flash_offload: Mapping[str, Any] | bool = True
    verbose: bool = False
    limits: Limits = field(default_factory=Limits)

    @property
    def keeps_prompts(self) -> bool:
        """Whether the state of prompts is kept on flash."""
        flash = self.flash_offload
        return isinstance(flash, Mapping) and flash.get("prompt_cache", False) is not False


def read_engine_settings(
    config_file: Path | None, flags: Mapping[str, Any], default_model: Path | None = None
) -> EngineSettings:
    """The settings of flags, file and environment together.

    Args:
        config_file: YAML or JSON, as for the classic server, with one model.
        flags: settings given as flags, by name; options of flash add to those of file and environment.
        default_model: served if none is named.

    Raises:
        ValueError: what is wrong with which setting.
        FileNotFoundError: no such model, no such file of settings.
        FlashFormatError: the model is a folder, a pipe.
    """
    found: dict[str, Any] = {}
    for where, values in (*_of_environment(), *_of_file(config_file), ("--", flags)):
        for name, value in values.items():
            into, read = _named(where, name)
            try:
                read_value = read(value)
            except (ValueError, TypeError) as error:
                said = name.replace("_", "-") if where == "--" else name
                raise ValueError(f"{where}{said}: {error}") from None
            before = found.get(into)
            if into == "flash_offload" and isinstance(before, dict) and isinstance(read_value, dict):
                read_value = {**before, **read_value}
            if into:
                found[into] = read_value
    found.setdefault("model", default_model)
    if found["model"] is None:
        raise FileNotFoundError("no such model: (none named)")
    limits = Limits(**{each.name: found.pop(each.name) for each in fields(Limits) if each.name in found})
    return _checked(_with_prompts(EngineSettings(**found, limits=limits)))


def _with_prompts(settings: EngineSettings) -> EngineSettings:
    """What is said of prompts on flash is an option of flash."""
    said = {"prompt_cache": settings.prompt_cache or None, "prompt_cache_size": settings.prompt_cache_size}
    said = {name: value for name, value in said.items() if value is not None}
    if not said:
        return settings
    if settings.flash_offload is False:
        raise ValueError("prompt_cache: is a part of flash_offload, which is false")
    options = {} if settings.flash_offload is True else dict(settings.flash_offload)
    return replace(settings, flash_offload={**options, **said})


def _checked(settings: EngineSettings) -> EngineSettings:
    if not settings.model.exists():
        raise FileNotFoundError(f"no such model: {settings.model}")
    if kind := kind_of_file(settings.model):
        raise FlashFormatError(f"{settings.model}: {kind}, not a GGUF file")
    if settings.api_key == "":
        raise ValueError("--api-key: an empty key would let everybody in")
    if settings.embeddings and (settings.parallel or 1) > 1:
        raise ValueError("--parallel: embeddings are made one at a time")
    if settings.pooling and not settings.embeddings:
        raise ValueError("--pooling: is of embeddings: add --embeddings")
    return settings


# where settings come from: (how messages begin, the values)


def _of_file(path: Path | None) -> Iterator[tuple[str, dict[str, Any]]]:
    if path is None:
        return
    server, models = read_file(path)
    if len(models) > 1:
        raise ValueError(
            f"{path}: {len(models)} models; one is served at a time: leave one of them in the file and start a server "
            "for each, or let `llama-flash serve --classic` change between them"
        )
    yield f"{path}: ", server
    yield f"{path}: models.0.", models[0]


def _of_environment() -> Iterator[tuple[str, dict[str, Any]]]:
    """A variable each; two underscores lead to an option: LLAMA_FLASH_SERVE_FLASH_OFFLOAD__WINDOW."""
    for variable, text in sorted(os.environ.items()):
        if variable.upper().startswith(ENV_PREFIX):
            name, _, option = variable[len(ENV_PREFIX) :].lower().partition("__")
            yield f"{variable}: ", {name: {option: text} if option else text}


# how settings are read


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value


def _flag(value: Any) -> bool:
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if isinstance(value, str) and value.lower() in known:
        return known[value.lower()]
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is neither true nor false")
    return value


def _whole(least: int, most: int = 1 << 31) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if isinstance(value, str) and value.strip().lstrip("-").isdecimal():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f"{value!r} is not a whole number from {least} to {most}")
        return value

    return read


def _one_of(*words: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value not in words:
            raise ValueError(f"{value!r} is not one of {', '.join(words)}")
        return str(value)

    return read


def _kv_type(value: Any) -> str:
    """By name, or by number as the classic server takes it."""
    by_number = {number: name for name, number in KV_TYPES.items()}
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    return _one_of(*KV_TYPES)(value if isinstance(value, bool) else by_number.get(value, value))


def _v_type(value: Any) -> str:
    name = _kv_type(value)
    if name not in ("f32", "f16", "bf16"):
        raise ValueError(f"a V cache of {name} needs the flash kernel of attention, which is off here: f32, f16, bf16")
    return name


def _object(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        value = json.loads(value)
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is no object")
    return value


def _flash(value: Any) -> dict[str, Any] | bool:
    if isinstance(value, str):
        value = json.loads(value) if value.strip().startswith("{") else _flag(value)
    return flash_values(value)


def _lora(value: Any) -> tuple[Path, float]:
    """FILE or FILE:SCALE."""
    text = _text(value)
    name, _, number = text.rpartition(":")
    path, scale = Path(text), 1.0
    if name and not path.exists():
        try:
            path, scale = Path(name), float(number)
        except ValueError:
            path = Path(text)
    if not path.is_file():
        raise ValueError(f"no such adapter: {path}")
    if scale != 1.0 and ":" in str(path):
        raise ValueError(f"{path}: with a scale, the path can have no colon")
    return path, scale


def _template_file(value: Any) -> str:
    try:
        return Path(_text(value)).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{value}: {error.strerror}") from None


def _store(value: Any) -> bool | str:
    """A folder, true or false."""
    if not isinstance(value, str) or value.lower() in ("true", "false", "1", "0", "yes", "no"):
        return _flag(value)
    with contextlib.suppress(ValueError):
        parse_size(value)
        raise TypeError(f"{value!r} is a size: prompts kept in memory are prompt_cache_ram")
    return value


def _cache(value: Any) -> int:
    """Bytes; llama-server takes whole MiB."""
    n_bytes = 0 if value in (0, "0") else parse_size(value)
    return -(-n_bytes // _MIB) * _MIB


def _is(only: Any) -> Callable[[Any], Any]:
    """For what cannot be chosen here: the file of a classic server may say what is so anyway."""

    def read(value: Any) -> Any:
        if (_flag(value) if isinstance(only, bool) else value) != only:
            said = json.dumps(only)
            raise ValueError(f"{value!r} cannot be had here, it is {said}; `llama-flash serve --classic` has it")
        return only

    return read


_Reader = Callable[[Any], Any]
_SETTINGS: dict[str, tuple[str, _Reader]] = {  # by name: the attribute ("": none), how it is read
    "model": ("model", lambda value: Path(_text(value))),
    "model_alias": ("alias", _text),
    "host": ("host", _text),
    "port": ("port", _whole(0, 65535)),
    "api_key": ("api_key", _text),
    "parallel": ("parallel", _whole(1, 256)),
    "n_ctx": ("n_ctx", _whole(1)),
    "n_batch": ("n_batch", _whole(32)),
    "n_ubatch": ("n_ubatch", _whole(1)),
    "n_threads": ("threads", _whole(1, 512)),
    "n_threads_batch": ("threads_batch", _whole(1, 512)),
    "type_k": ("type_k", _kv_type),
    "type_v": ("type_v", _v_type),
    "embedding": ("embeddings", _flag),
    "embeddings": ("embeddings", _flag),
    "pooling": ("pooling", _one_of(*POOLINGS)),
    "lora_path": ("lora", _lora),
    "lora": ("lora", _lora),
    "chat_template": ("chat_template", _text),
    "chat_template_file": ("chat_template", _template_file),
    "chat_template_kwargs": ("chat_template_kwargs", _object),
    "reasoning_format": ("reasoning_format", _one_of(*REASONING_FORMATS)),
    "prompt_cache": ("prompt_cache", _store),
    "prompt_cache_size": ("prompt_cache_size", parse_size),
    "prompt_cache_ram": ("prompt_cache_ram", _cache),
    "seed": ("seed", _whole(0, 0xFFFFFFFF)),
    "flash_offload": ("flash_offload", _flash),
    "page": ("page", _flag),
    "verbose": ("verbose", _flag),
    "max_body": ("max_body", parse_size),
    "max_grammar": ("max_grammar", parse_size),
    "max_memory": ("max_memory", parse_size),
    "max_depth": ("max_depth", _whole(1)),
    "max_requests": ("max_requests", _whole(1)),
    "timeout": ("timeout", _whole(1)),
    "flash_attn": ("", _is(False)),
    "interrupt_requests": ("", _is(False)),
    "use_mlock": ("", _is(False)),
    "vocab_only": ("", _is(False)),
    "cache": ("", _is(False)),
}


def _named(where: str, name: str) -> tuple[str, _Reader]:
    if name not in _SETTINGS:
        known = ", ".join(name for name, (into, _) in _SETTINGS.items() if into)
        raise ValueError(
            f"{where}{name}: there is no such setting here; there are {known}. "
            "`llama-flash serve --classic` has those of llama-cpp-python's server"
        )
    return _SETTINGS[name]

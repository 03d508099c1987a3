"""`llama-flash serve`: an OpenAI-compatible server.

Long: the options of the command are the parameters of its function.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Model, model_path, stderr

__all__ = ["EPILOG", "serve"]

EPILOG = (
    "Examples:  [bold]llama-flash serve qwen3-30b-a3b-q4_0.gguf --dram-budget 8GiB[/]   |   "
    "[bold]llama-flash serve --classic --config-file models.yaml --port 8080[/]\n\n"
    "With [bold]--classic[/], what has no flag here (all settings of llama-cpp-python's server) goes into the settings "
    "file, or into variables LLAMA_FLASH_SERVE_*: flags come before the file, the file before the environment."
)

_SERVER, _MODEL, _FLASH, _CLASSIC = "Server", "Model", "Weights on flash", "llama-cpp-python's server"
_PARALLEL = 4
_KEY = "LLAMA_FLASH_SERVE_API_KEY"


def serve(
    model: Model = None,
    host: Annotated[
        str | None, typer.Option("--host", help="Address to listen at. Default: 127.0.0.1.", rich_help_panel=_SERVER)
    ] = None,
    port: Annotated[
        int | None, typer.Option("--port", help="Port, 0: any. Default: 8000.", rich_help_panel=_SERVER)
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", help="Asked of all requests but /health.", rich_help_panel=_SERVER),
    ] = None,
    parallel: Annotated[
        int | None,
        typer.Option(
            "--parallel",
            min=1,
            help=f"Answers computed at the same time, at most. Default: {_PARALLEL}.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    dram_budget: Annotated[
        str | None,
        typer.Option(
            "--dram-budget",
            help="auto, a size, or a share of the model file. Default: auto.",
            rich_help_panel=_FLASH,
        ),
    ] = None,
    predictor: Annotated[
        str | None,
        typer.Option("--predictor", help="Of a bundle file: auto, exact, lowrank or off.", rich_help_panel=_FLASH),
    ] = None,
    window: Annotated[
        int | None, typer.Option("--window", help="Tokens whose neurons stay in memory.", rich_help_panel=_FLASH)
    ] = None,
    model_alias: Annotated[
        str | None,
        typer.Option("--model-alias", help="Its name for clients. Default: the file's.", rich_help_panel=_MODEL),
    ] = None,
    n_ctx: Annotated[
        int | None,
        typer.Option(
            *("-c", "--n-ctx", "--ctx"),
            min=1,
            help="Context of each answer, in tokens. Default: 2048, or less if trained so.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            "-t",
            "--threads",
            min=1,
            help="Default: one per physical core, as affinity and CPU quota allow.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the engine's log and the requests.")] = False,
    classic: Annotated[
        bool,
        typer.Option("--classic", help="Serve with it: one answer at a time.", rich_help_panel=_CLASSIC),
    ] = False,
    config_file: Annotated[
        Path | None,
        typer.Option(
            "--config-file", help="Its settings, YAML or JSON, with a list of models.", rich_help_panel=_CLASSIC
        ),
    ] = None,
    chat_format: Annotated[
        str | None,
        typer.Option("--chat-format", help="Default: as the model file says.", rich_help_panel=_CLASSIC),
    ] = None,
) -> None:
    """Serve a model to OpenAI's clients, several at the same time: llama.cpp's server, with weights on flash.

    Without MODEL.gguf the small mixture of experts that comes with the package is served.
    """
    flash = _given(dram_budget=dram_budget, predictor=predictor, window=window)
    if not classic:
        if config_file is not None or chat_format is not None:
            raise ValueError("--config-file and --chat-format are of the classic server: add --classic")
        _serve_many(
            model_path(model),
            _given(alias=model_alias, host=host, port=port, api_key=api_key, parallel=parallel),
            _given(n_ctx=n_ctx, threads=threads, flash_offload=flash, verbose=verbose or None),
        )
        return
    if parallel is not None:
        raise ValueError("--parallel: the classic server gives one answer at a time")
    if model is not None and config_file is not None:
        raise ValueError("MODEL.gguf and --config-file: the file names the models")
    named = {} if model is None else {"model": str(model_path(model))}
    _serve_classic(
        config_file,
        _given(host=host, port=port, api_key=api_key),
        _given(
            **named,
            model_alias=model_alias,
            chat_format=chat_format,
            n_ctx=n_ctx,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=verbose or None,
        ),
        flash,
    )


def _serve_many(model: Path, server: dict[str, Any], load: dict[str, Any]) -> None:
    from ..server.engine_server import EngineSettings, serve_engine

    server.setdefault("alias", model.name.removesuffix(".gguf"))
    server.setdefault("api_key", os.environ.get(_KEY))
    serve_engine(EngineSettings(model, **{"parallel": _PARALLEL, **server, **load}), _say)


def _serve_classic(
    config_file: Path | None, server: dict[str, Any], model: dict[str, Any], flash: dict[str, Any]
) -> None:
    from ..server import check_installed

    check_installed()
    from ..server.listen import listen
    from ..server.settings import read_settings

    default_model = None if config_file else model_path(None)
    service, models = read_settings(config_file, server, model, flash, default_model=default_model)
    listen(service, models, _say)


def _say(line: str) -> None:
    stderr.print(line, markup=False, soft_wrap=True)


def _given(**flags: Any) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if value is not None}

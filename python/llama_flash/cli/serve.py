"""`llama-flash serve`: an OpenAI-compatible server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Model, Workers, WorkerToken, model_path, stderr

__all__ = ["EPILOG", "serve"]

EPILOG = (
    "Examples:  [bold]llama-flash serve qwen3-30b-a3b-q4_0.gguf --dram-budget 8GiB[/]   |   "
    "[bold]llama-flash serve --config-file model.yaml --port 8080[/]\n\n"
    "What has a flag can be said in the settings file, too, or in variables LLAMA_FLASH_SERVE_*, by the names of "
    "llama-cpp-python's server; flags come before the file, the file before the environment. With [bold]--classic[/] "
    "all settings of that server work, and a file may have several models."
)

_SERVER, _MODEL, _FLASH, _CHAT = "Server", "Model", "Weights on flash", "Chats and embeddings"
_LIMITS, _CLASSIC = "Limits for clients", "llama-cpp-python's server"


def _server(*names: str, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel=_SERVER, **settings)


def _model(*names: str, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel=_MODEL, **settings)


def _flash(*names: str, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel=_FLASH, **settings)


def _chat(*names: str, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel=_CHAT, **settings)


def _limit(*names: str, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel=_LIMITS, **settings)


_FLASH_OPTIONS = (
    *("dram_budget", "reserve", "what", "predictor", "window", "lookahead", "draft", "follow", "warm_start"),
    *("io_engine", "prompt_cache", "prompt_cache_size", "workers", "worker_token_file"),
)
_MANY = (  # that the classic server has not, by flags
    *("parallel", "page", "type_k", "type_v", "lora", "prompt_cache_ram", "embeddings", "pooling"),
    *("chat_template", "chat_template_file", "reasoning_format"),
    *("max_body", "max_grammar", "max_memory", "max_depth", "max_requests", "timeout"),
)


_Host = Annotated[str | None, _server("--host", help="Address to listen at. Default: 127.0.0.1.")]
_Port = Annotated[int | None, _server("--port", help="Port, 0: any. Default: 8000.")]
_ApiKey = Annotated[str | None, _server("--api-key", help="Asked of all requests but /health.")]
_Parallel = Annotated[
    int | None,
    _server("--parallel", min=1, help="Answers computed at the same time, at most. Default: as many as cost little."),
]
_Page = Annotated[bool | None, _server("--page/--no-page", help="A page for chats, at /. Default.")]
_PromptCache = Annotated[
    bool | None,
    _flash(
        "--prompt-cache",
        help="Keep the state of prompts on flash: in the user's cache folder, open to the owner alone.",
        show_default=False,
    ),
]
_PromptCacheDir = Annotated[Path | None, _flash("--prompt-cache-dir", metavar="DIR", help="The same, in this folder.")]
_PromptCacheSize = Annotated[
    str | None,
    _flash("--prompt-cache-size", metavar="SIZE", help="What these files may take on the disk. Default: 8GiB."),
]
_PromptCacheRam = Annotated[
    str | None,
    _server("--prompt-cache-ram", metavar="SIZE", help="Of the budget, for prompts seen before. Default: 0."),
]
_ConfigFile = Annotated[
    Path | None, _server("--config-file", help="Settings, YAML or JSON, with the model in a list of models.")
]
_DramBudget = Annotated[
    str | None, _flash("--dram-budget", help="auto, a size, or a share of the model file. Default: auto.")
]
_Reserve = Annotated[
    str | None, _flash("--reserve", metavar="SIZE", help="Left alone within it. Default: 3 %, at least 32 MiB.")
]
_What = Annotated[
    str | None, _flash("--what", help="Weights that go to flash: auto, experts, ffn or all. Default: auto.")
]
_Predictor = Annotated[str | None, _flash("--predictor", help="Of a bundle file: auto, exact, lowrank or off.")]
_Window = Annotated[int | None, _flash("--window", help="Tokens whose neurons stay in memory.")]
_Lookahead = Annotated[
    bool | None,
    _flash("--lookahead/--no-lookahead", help="Read ahead what the next layer will use. Default: while it pays."),
]
_Draft = Annotated[
    str | None,
    _flash("--draft", help="Guesses at the next tokens: auto, off, ngram, mtp or a GGUF file. Default: off."),
]
_Follow = Annotated[
    bool | None, _flash("--follow/--no-follow", help="Give memory back and take it again as limits move. Default.")
]
_WarmStart = Annotated[
    bool | None, _flash("--warm-start/--no-warm-start", help="Read first what was hot last time. Default.")
]
_IoEngine = Annotated[str | None, _flash("--io-engine", help="auto, io_uring or pread. Default: auto.")]
_ModelAlias = Annotated[str | None, _model("--model-alias", help="Its name for clients. Default: the file's.")]
_NCtx = Annotated[
    int | None,
    _model(
        *("-c", "--n-ctx", "--ctx"),
        min=1,
        help="Context of each answer, in tokens. Default: 2048, or less if trained so.",
    ),
]
_Threads = Annotated[
    int | None,
    _model("-t", "--threads", min=1, help="Default: one per physical core, as affinity and CPU quota allow."),
]
_TypeK = Annotated[str | None, _model("--type-k", help="Of the KV cache: f16, q8_0, ... Default: f16.")]
_TypeV = Annotated[str | None, _model("--type-v", help="The same, for V: f16, bf16 or f32.")]
_Lora = Annotated[str | None, _model("--lora", metavar="FILE[:SCALE]", help="An adapter, GGUF.")]
_ChatTemplate = Annotated[str | None, _chat("--chat-template", help="Jinja, in place of the model's own.")]
_ChatTemplateFile = Annotated[str | None, _chat("--chat-template-file", metavar="FILE", help="The same, in a file.")]
_ReasoningFormat = Annotated[
    str | None,
    _chat("--reasoning-format", help="Where thoughts go: auto, none, deepseek, deepseek-legacy. Default: auto."),
]
_Embeddings = Annotated[bool | None, _chat("--embeddings", help="Embeddings in place of answers.", show_default=False)]
_Pooling = Annotated[
    str | None, _chat("--pooling", help="Of embeddings: none, mean, cls, last, rank. Default: the model's.")
]
_MaxBody = Annotated[
    str | None, _limit("--max-body", help="Size of a request. Default: 1MiB, and 64 bytes for each token of -c.")
]
_MaxGrammar = Annotated[
    str | None,
    _limit("--max-grammar", help="Size of a grammar, given or made from a JSON schema. Default: 256KiB."),
]
_MaxMemory = Annotated[
    str | None,
    _limit(
        "--max-memory",
        help="Memory of all requests together, counted in the budget. Default: 48MiB, or 32 times --max-body.",
    ),
]
_MaxDepth = Annotated[int | None, _limit("--max-depth", min=1, help="Nesting of a request's JSON. Default: 64.")]
_MaxRequests = Annotated[
    int | None,
    _limit("--max-requests", min=1, help="Requests that are answered or wait at the same time. Default: 128."),
]
_Timeout = Annotated[
    int | None,
    _limit(
        "--timeout",
        min=1,
        help="Seconds in which a request has to arrive, and pieces of an answer to be taken. Default: 60.",
    ),
]
_Verbose = Annotated[bool, typer.Option("--verbose", help="Show the engine's log and the requests.")]
_Classic = Annotated[
    bool,
    typer.Option("--classic", help="Serve with it: one answer at a time.", rich_help_panel=_CLASSIC),
]
_ChatFormat = Annotated[
    str | None,
    typer.Option("--chat-format", help="Default: as the model file says.", rich_help_panel=_CLASSIC),
]


def serve(
    ctx: typer.Context,
    model: Model = None,
    host: _Host = None,
    port: _Port = None,
    api_key: _ApiKey = None,
    parallel: _Parallel = None,
    page: _Page = None,
    prompt_cache_ram: _PromptCacheRam = None,
    config_file: _ConfigFile = None,
    dram_budget: _DramBudget = None,
    reserve: _Reserve = None,
    what: _What = None,
    predictor: _Predictor = None,
    window: _Window = None,
    lookahead: _Lookahead = None,
    draft: _Draft = None,
    follow: _Follow = None,
    warm_start: _WarmStart = None,
    io_engine: _IoEngine = None,
    prompt_cache: _PromptCache = None,
    prompt_cache_dir: _PromptCacheDir = None,
    prompt_cache_size: _PromptCacheSize = None,
    workers: Workers = None,
    worker_token_file: WorkerToken = None,
    model_alias: _ModelAlias = None,
    n_ctx: _NCtx = None,
    threads: _Threads = None,
    type_k: _TypeK = None,
    type_v: _TypeV = None,
    lora: _Lora = None,
    chat_template: _ChatTemplate = None,
    chat_template_file: _ChatTemplateFile = None,
    reasoning_format: _ReasoningFormat = None,
    embeddings: _Embeddings = None,
    pooling: _Pooling = None,
    max_body: _MaxBody = None,
    max_grammar: _MaxGrammar = None,
    max_memory: _MaxMemory = None,
    max_depth: _MaxDepth = None,
    max_requests: _MaxRequests = None,
    timeout: _Timeout = None,
    verbose: _Verbose = False,
    classic: _Classic = False,
    chat_format: _ChatFormat = None,
) -> None:
    """Serve a model to OpenAI's clients, several at the same time: llama.cpp's server, with weights on flash.

    Without MODEL.gguf the small mixture of experts that comes with the package is served.
    """
    _start(_given(**ctx.params), classic)


def _start(given: dict[str, Any], classic: bool) -> None:
    """given: what was said, by the names of flags."""

    def some(*names: str, **more: Any) -> dict[str, Any]:
        return {**{name: given[name] for name in names if name in given}, **_given(**more)}

    model, config_file = given.get("model"), given.get("config_file")
    if model is not None and config_file is not None:
        raise ValueError("MODEL.gguf and --config-file: the file names the model")
    flash = some(*_FLASH_OPTIONS)
    if "prompt_cache_dir" in given:
        flash["prompt_cache"] = str(given["prompt_cache_dir"])
    if flash.get("reserve") == "0":
        flash["reserve"] = 0
    if "worker_token_file" in flash:
        flash["worker_token_file"] = str(flash["worker_token_file"])
    path, threads = None if model is None else str(model_path(model)), given.get("threads")
    both = some("model_alias", "n_ctx", model=path, n_threads=threads, n_threads_batch=threads)
    both.update({"verbose": True} if given["verbose"] else {})
    listen = some("host", "port", "api_key")
    if not classic:
        if "chat_format" in given:
            raise ValueError("--chat-format is of the classic server: add --classic, or see --chat-template")
        _serve_many(config_file, {**listen, **both, **some(*_MANY), **({"flash_offload": flash} if flash else {})})
        return
    if only := list(some(*_MANY)):
        flag = f"--{only[0].replace('_', '-')}"
        raise ValueError(f"{flag} and --classic: the classic server gives one answer at a time, and has no such flag")
    _serve_classic(config_file, listen, {**both, **some("chat_format")}, flash)


def _serve_many(config_file: Path | None, flags: dict[str, Any]) -> None:
    from ..server.engine_server import serve_engine
    from ..server.engine_settings import read_engine_settings

    default_model = None if config_file else model_path(None)
    serve_engine(read_engine_settings(config_file, flags, default_model), _say)


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

"""llama-server in this process: what it is told, its start, and its end when a signal comes.

    flags, settings file, environment  ->  engine_settings.py  ->  arguments of llama-server
    signal  ->  main thread  ->  stop;  the server's thread (engine_thread.py)  ->  driver.py  ->  FlashSession

docs/explanation/serving.md says why it is told what it is told. Needs no package but those of llama_flash.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace

from ..budget.cores import default_threads
from ..budget.requests import reserve_of_server
from ..model.adapters import check_adapter
from ..model.gguf import GgufMeta, check_vocabulary, read_gguf
from ..model.shape import KV_TYPES, ContextShape, whole_cells
from ..native import server as native
from ..options import FlashOffload
from ..planning.drafted import MOST_DRAFTED
from ..session.session import FlashSession
from .address import bound, is_loopback
from .driver import EngineDriver
from .engine_settings import EngineSettings
from .engine_thread import EngineThread, Signals
from .pages import FlashPages
from .parallel import choose_parallel
from .prompts import ServerPrompts
from .recovery import Recovery

__all__ = ["arguments_of", "completed", "serve_engine"]


def serve_engine(settings: EngineSettings, say: Callable[[str], None]) -> None:
    """Serves until SIGTERM (then SystemExit is raised) or SIGINT (KeyboardInterrupt). To be called by the main thread.

    Args:
        say: is told what the user should know, a line at a time, from another thread too.

    Raises:
        OSError: the address cannot be listened at.
        FlashError, ValueError: see llama_cpp.Llama.
    """
    meta = read_gguf(settings.model)
    settings = completed(settings, meta)
    limits = settings.limits.of_requests(settings.n_ctx or 0)
    settings = _with_reserve(settings, limits.max_memory)
    with bound(settings.host, settings.port) as listener:
        host, port = listener.getsockname()[:2]
    if not is_loopback(host) and settings.api_key is None:
        say(f"warning: whoever reaches {host} can use this server; set an API key (--api-key)")
    say(f"loading {settings.alias}")
    many, why = _parallel(settings, meta)
    pages = FlashPages(settings.alias, many)

    prompts = ServerPrompts() if settings.keeps_prompts else None

    def loaded(session: FlashSession) -> None:
        pages.loaded(session)
        if prompts is not None:
            prompts.begin(session)
        say(f"{session.summary}; {many} {'answer' if many == 1 else 'answers'} at the same time{why}")

    lora = str(settings.lora[0]) if settings.lora else None

    def make() -> EngineThread:
        driver = EngineDriver(settings.flash_offload, loaded, lora_path=lora, aside=settings.prompt_cache_ram)
        return EngineThread(arguments_of(settings, many, host, port), driver, pages, limits, host, port, prompts)

    flash = FlashOffload.coerce(settings.flash_offload)
    workers, slowest = flash.workers if flash else (), float(settings.limits.timeout)
    recovery = Recovery(make, pages, host, port, settings.api_key, workers, slowest, say)
    with Signals() as signals:
        recovery.run(signals)


def completed(settings: EngineSettings, meta: GgufMeta) -> EngineSettings:
    """With what the model's file says, where nobody else does.

    Raises:
        FlashFormatError, OSError: it has no vocabulary, or the adapter is none for it.
        ValueError: the chat template cannot be used.
    """
    check_vocabulary(meta)
    if settings.lora is not None:
        check_adapter(settings.lora[0], meta)
    if settings.chat_template is not None:
        try:
            native.check_template(settings.chat_template)
        except ValueError as error:
            raise ValueError(f"--chat-template: llama-server cannot use it: {error}") from None
    n_ctx = whole_cells(settings.n_ctx or min(2048, meta.number("context_length", 2048)))
    least = n_ctx if settings.embeddings else 0  # an embedding is made in one pass
    return replace(
        settings,
        alias=settings.alias or settings.model.name.removesuffix(".gguf"),
        n_ctx=n_ctx,
        n_batch=max(settings.n_batch, least),
        n_ubatch=max(settings.n_ubatch, least),
    )


def _with_reserve(settings: EngineSettings, requests: int) -> EngineSettings:
    """What is not for weights, unless somebody said how much: bytes that requests may take, and a little beside."""
    flash = settings.flash_offload
    if flash is False:
        return settings
    options = {} if flash is True else dict(flash)
    return replace(settings, flash_offload={"reserve": reserve_of_server(requests), **options})


def _parallel(settings: EngineSettings, meta: GgufMeta) -> tuple[int, str]:
    """How many answers at the same time, and the reason in brackets."""
    if settings.parallel is not None:
        return settings.parallel, ""
    if settings.embeddings:
        return 1, " (embeddings)"
    assert settings.n_ctx is not None
    n_batch = min(settings.n_batch, settings.n_ctx)
    one = ContextShape(
        n_ctx=settings.n_ctx,
        n_batch=n_batch,
        n_ubatch=min(settings.n_ubatch, n_batch),
        n_outputs=1,
        type_k=KV_TYPES[settings.type_k],
        type_v=KV_TYPES[settings.type_v],
        aside=settings.prompt_cache_ram,
    )
    many, why = choose_parallel(meta, FlashOffload.coerce(settings.flash_offload), one)
    return many, f" (--parallel; {why})"


def arguments_of(settings: EngineSettings, many: int, host: str, port: int) -> list[str]:
    """Of llama-server. What takes memory is named, so that its defaults do not decide."""
    assert settings.n_ctx is not None
    threads = settings.threads or default_threads()
    return [
        *("--model", str(settings.model), "--alias", settings.alias),
        *("--host", host, "--port", str(port), "--timeout", str(settings.limits.timeout)),
        *("--parallel", str(many), "--ctx-size", str(settings.n_ctx * many), "--no-kv-unified"),
        *("--batch-size", str(settings.n_batch), "--ubatch-size", str(settings.n_ubatch), "--flash-attn", "off"),
        *("--cache-type-k", settings.type_k, "--cache-type-v", settings.type_v),
        *("--fit", "off", "--cache-ram", str(settings.prompt_cache_ram >> 20), "--ctx-checkpoints", "0"),
        *("--threads", str(threads), "--threads-batch", str(settings.threads_batch or threads)),
        # /slots would show what others ask, and a page from elsewhere in a browser needs no server on loopback
        *("--no-warmup", "--offline", "--metrics", "--no-slots", "--cors-origins", "localhost"),
        *_page(settings),
        *("--log-verbosity", "3" if settings.verbose else "0"),
        *("--reasoning-format", settings.reasoning_format),
        *_chosen(settings),
    ]


def _page(settings: EngineSettings) -> Iterator[str]:
    """The page offers tools of its own with each request, which is refused where the model's template has none."""
    if not settings.page:
        yield "--no-ui"
        return
    yield "--ui"
    template = settings.chat_template or read_gguf(settings.model).values.get("tokenizer.chat_template")
    if "tools" not in str(template):
        # what the page's setting "custom JSON" is, until somebody says otherwise there: added to each request
        yield from ("--ui-config", json.dumps({"customJson": json.dumps({"tool_choice": "none"})}))


def _chosen(settings: EngineSettings) -> Iterator[str]:
    """Arguments for what is off unless somebody asks for it."""
    if settings.api_key is not None:
        yield from ("--api-key", _quoted(settings.api_key))
    flash = FlashOffload.coerce(settings.flash_offload)
    if flash is not None and flash.draft != "off" and not settings.embeddings:
        # so that logits of drafts have room; the drafts themselves are made by driver.py
        yield from ("--spec-type", "ngram-simple", "--spec-ngram-simple-size-m", str(MOST_DRAFTED))
    if settings.embeddings:
        yield "--embeddings"
    if settings.pooling is not None:
        yield from ("--pooling", settings.pooling)
    if settings.lora is not None:
        path, scale = settings.lora
        scaled = scale != 1.0
        yield from ("--lora-scaled" if scaled else "--lora", _quoted(f"{path}:{scale}" if scaled else str(path)))
    if settings.chat_template is not None:
        yield from ("--chat-template", settings.chat_template)
    if settings.chat_template_kwargs:
        yield from ("--chat-template-kwargs", json.dumps(settings.chat_template_kwargs))
    if settings.seed is not None:
        yield from ("--seed", str(settings.seed))
    if settings.threads_http is not None:
        yield from ("--threads-http", str(settings.threads_http))


def _quoted(value: str) -> str:
    """One value, for llama-server's options that take several with commas between them."""
    return '"' + value.replace('"', '""') + '"'

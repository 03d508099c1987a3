"""llama-server in this process: what it is told, its start, and its end when a signal comes.

    flags  ->  EngineSettings  ->  arguments of llama-server
    signal  ->  main thread  ->  stop;  the server's thread (engine_thread.py)  ->  driver.py  ->  FlashSession

docs/explanation/serving.md says why it is told what it is told. Needs no package but those of llama_flash.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..budget.cores import default_threads
from ..model.gguf import check_vocabulary, read_gguf
from .address import bound, is_loopback
from .driver import EngineDriver
from .engine_thread import EngineThread, Signals

__all__ = ["EngineSettings", "arguments_of", "context_of", "serve_engine"]

_CELLS = 256  # the engine makes the context of a sequence a multiple of it
_BATCH = 512  # tokens of a pass: what neighbours wait for at most while a prompt is computed


@dataclass(frozen=True)
class EngineSettings:
    """What is served, and how.

    Attributes:
        n_ctx: tokens of each sequence; None: 2048, or fewer if the model was trained so.
        parallel: sequences that are computed at the same time, at most.
        threads: None: as many as may run.
        flash_offload: options of FlashOffload.
        seed: of requests that name none; None: a random one for each.
        pooling: not None: for embeddings (mean, cls, last); "": as the model file says. Only with one sequence: the
            engine divides a pass with several of unequal length, and pools the parts of one by themselves.
        threads_http: requests that are received at the same time; None: a few more than `parallel`.
    """

    model: Path
    alias: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    parallel: int = 4
    n_ctx: int | None = None
    threads: int | None = None
    flash_offload: Mapping[str, Any] = field(default_factory=dict)
    verbose: bool = False
    seed: int | None = None
    pooling: str | None = None
    threads_http: int | None = None


def serve_engine(settings: EngineSettings, say: Callable[[str], None]) -> None:
    """Serves until SIGTERM (then SystemExit is raised) or SIGINT (KeyboardInterrupt). To be called by the main thread.

    Args:
        say: is told what the user should know, a line at a time, from another thread too.

    Raises:
        OSError: the address cannot be listened at.
        FlashError, ValueError: see llama_cpp.Llama.
    """
    if settings.api_key == "":
        raise ValueError("--api-key: an empty key would let everybody in")
    n_ctx = context_of(settings)
    with bound(settings.host, settings.port) as listener:
        host, port = listener.getsockname()[:2]
    if not is_loopback(host) and settings.api_key is None:
        say(f"warning: whoever reaches {host} can use this server; set an API key (--api-key)")
    say(f"loading {settings.alias}")
    driver = EngineDriver(dict(settings.flash_offload) or True, lambda session: say(session.summary))
    server = EngineThread(arguments_of(settings, n_ctx, host, port), driver, host, port)
    with Signals() as signals:
        server.start()
        if server.wait_until_it_answers():
            signals.may_wait = True
            address = f"[{host}]" if ":" in host else host
            say(f"serving http://{address}:{port}/v1 (Ctrl-C ends it)")
            server.run_until(signals)
        server.raise_failure()
        signals.raise_last()


def context_of(settings: EngineSettings) -> int:
    """Tokens of each sequence. Raises FlashFormatError, OSError for what is no model."""
    meta = read_gguf(settings.model)
    check_vocabulary(meta)
    n_ctx = settings.n_ctx or min(2048, meta.number("context_length", 2048))
    return -(-n_ctx // _CELLS) * _CELLS


def arguments_of(settings: EngineSettings, n_ctx: int, host: str, port: int) -> list[str]:
    """Of llama-server. What takes memory is named, so that its defaults do not decide."""
    threads = str(settings.threads or default_threads())
    key = [] if settings.api_key is None else ["--api-key", _quoted(settings.api_key)]
    batch = str(_BATCH if settings.pooling is None else max(_BATCH, n_ctx))  # an embedding is made in one pass
    return [
        *("--model", str(settings.model), "--alias", settings.alias),
        *("--host", host, "--port", str(port), *key),
        *("--parallel", str(settings.parallel), "--ctx-size", str(n_ctx * settings.parallel), "--no-kv-unified"),
        *("--batch-size", batch, "--ubatch-size", batch, "--flash-attn", "off"),
        *("--fit", "off", "--cache-ram", "0", "--ctx-checkpoints", "0"),
        *("--threads", threads, "--threads-batch", threads),
        # /slots would show what others ask, and a page in a browser needs no server on loopback
        *("--no-warmup", "--no-ui", "--offline", "--metrics", "--no-slots", "--cors-origins", "localhost"),
        *("--log-verbosity", "3" if settings.verbose else "0"),
        *([] if settings.seed is None else ["--seed", str(settings.seed)]),
        *([] if settings.pooling is None else ["--embeddings"]),
        *(["--pooling", settings.pooling] if settings.pooling else []),
        *([] if settings.threads_http is None else ["--threads-http", str(settings.threads_http)]),
    ]


def _quoted(value: str) -> str:
    """One value, for llama-server's options that take several with commas between them."""
    return '"' + value.replace('"', '""') + '"'

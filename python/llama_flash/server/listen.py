"""Listening: the port first, then the model, then clients until a signal comes."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn

from .address import bound, is_loopback
from .app import create_app
from .clients import Clients
from .settings import ServedModel, Service

__all__ = ["listen"]

_PATIENCE = 5  # seconds at the end for answers under way
_KEEP_ALIVE = 75  # seconds: longer than clients keep a connection, so that they do not use one that is being closed


def listen(service: Service, models: list[ServedModel], say: Callable[[str], None]) -> None:
    """Serves until SIGTERM (then SystemExit is raised) or SIGINT (KeyboardInterrupt).

    Args:
        say: is told what the user should know, a line at a time.

    Raises:
        OSError: the address cannot be listened at.
        FlashError, ValueError: see llama_cpp.Llama.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with bound(service.host, service.port) as listener:
        host, port = listener.getsockname()[:2]
        if not is_loopback(host) and service.api_key is None:
            say(f"warning: whoever reaches {host} can use this server; set an API key (--api-key)")
        say(f"loading {models[0].model_alias}")
        app, loaded = create_app(service, models)
        try:
            llama = loaded()
            if llama.flash is not None and not llama.verbose:
                say(llama.flash.summary)
            listener.listen()  # who comes as soon as it is said waits, and is not refused
            scheme = "https" if service.ssl_certfile else "http"
            say(f"serving {scheme}://{f'[{host}]' if ':' in host else host}:{port}/v1 (Ctrl-C ends it)")
            config = uvicorn.Config(
                app,
                log_level="info" if models[0].verbose else "warning",
                ssl_keyfile=service.ssl_keyfile,
                ssl_certfile=service.ssl_certfile,
                timeout_keep_alive=_KEEP_ALIVE,
            )
            _Server(config, app).run(sockets=[listener])
        finally:
            loaded.free()


class _Server(uvicorn.Server):
    """Gives up, after a while, the answers that are under way when a signal comes; at once when another one comes.

    Nothing is freed below a call that still runs, so uvicorn's own way to hurry (`force_exit`) is not taken. Who does
    not want to wait for that call to end sends a third signal, which ends the process as it is.
    """

    def __init__(self, config: uvicorn.Config, clients: Clients) -> None:
        super().__init__(config)
        self._clients = clients
        self._signals = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals == 1:
            super().handle_exit(sig, frame)
        elif self._signals == 2:
            self._clients.stop()
        else:
            os._exit(128 + sig)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(_PATIENCE, self._clients.stop)
        await super().shutdown(sockets)

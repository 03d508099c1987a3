"""The application: upstream's, with /health and /metrics, and with clients.py around it."""

from __future__ import annotations

import os
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from llama_cpp.server import app as upstream

from ..version import version
from .clients import Clients
from .figures import public
from .metrics import Metrics
from .models import Models
from .settings import ServedModel, Service

__all__ = ["create_app"]


def create_app(service: Service, models: list[ServedModel]) -> tuple[Clients, Models]:
    """The ASGI application and its models, the first of which is loaded now.

    Raises:
        FlashError, ValueError: see llama_cpp.Llama.
    """
    os.environ.pop("CONFIG_FILE", None)  # upstream would prefer it to what it is given
    upstream.LlamaProxy = Models  # the name of which create_app makes what holds the models
    app: FastAPI = upstream.create_app(server_settings=service, model_settings=models)
    proxy: Models = upstream._llama_proxy
    clients = Clients(app)
    metrics = Metrics(proxy, clients)
    authenticated = [Depends(upstream.authenticate)]

    @app.get("/health", summary="Health, and statistics of flash offload", tags=["llama-flash"])
    async def health() -> JSONResponse:
        loaded = proxy.loaded
        content = {
            "status": "ok" if loaded else "no model is loaded: the last load failed",
            "version": version(),
            "model": loaded,
            "requests_in_flight": clients.in_flight,
            "flash": public(proxy.stats(loaded)) if loaded else None,
        }
        return JSONResponse(content, status_code=200 if loaded else 503)

    @app.get("/metrics", summary="For Prometheus", dependencies=authenticated, tags=["llama-flash"])
    async def get_metrics(request: Request) -> Response:
        text, content_type = metrics.render(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": content_type})

    @app.get("/v1/models", summary="Models", dependencies=authenticated, tags=[upstream.openai_v1_tag])
    async def get_models() -> dict[str, Any]:
        return await upstream.get_models(proxy)  # type: ignore[no-any-return]

    # before upstream's own, which waits until no request runs
    app.router.routes.insert(0, app.router.routes.pop())
    return clients, proxy

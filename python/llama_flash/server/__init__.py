"""The two servers of `llama-flash serve`, with weights on flash.

llama.cpp's own, which computes several answers at the same time: engine_server.py tells it what to serve and ends it,
driver.py loads and computes for it. And, with --classic, llama-cpp-python's:

    flags, settings file, environment  ->  settings.py
    client  ->  clients.py (who is still there)  ->  upstream's app  ->  models.py (what is loaded)  ->  llama_cpp.Llama

app.py puts these together and adds /health and /metrics (metrics.py); listen.py runs it. All of that needs the packages
of the extra `server`; llama.cpp's server and this module do not.
"""

from __future__ import annotations

import importlib.util

from ..errors import FlashError

__all__ = ["check_installed"]

_PACKAGES = {  # import name -> what to install
    "fastapi": "fastapi",
    "prometheus_client": "prometheus-client",
    "pydantic_settings": "pydantic-settings",
    "sse_starlette": "sse-starlette",
    "starlette_context": "starlette-context",
    "uvicorn": "uvicorn",
    "yaml": "PyYAML",
}


def check_installed() -> None:
    """Raises FlashError, with what to do, if packages of the extra `server` are missing."""
    missing = [package for module, package in _PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise FlashError(
            f"the server needs packages that are not installed ({', '.join(missing)}): "
            "python -m pip install 'llama_cpp_python[server]'"
        )

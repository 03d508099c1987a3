"""llama-cpp-python's OpenAI-compatible server with weights on flash. `llama-flash serve` runs it.

    flags, settings file, environment  ->  settings.py
    client  ->  clients.py (who is still there)  ->  upstream's app  ->  models.py (what is loaded)  ->  llama_cpp.Llama

app.py puts these together and adds /health and /metrics (metrics.py); listen.py runs it. All of it needs the packages
of the extra `server`; this module does not.
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

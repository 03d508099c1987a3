"""The version of these packages: what pyproject.toml has behind the engine's, as it was installed."""

from __future__ import annotations

from importlib import metadata

__all__ = ["DISTRIBUTION", "version"]

DISTRIBUTION = "llama_cpp_python"


def version() -> str:
    """As "0.1.0"; "unknown" where the packages were not installed, or something else was under their name."""
    try:
        return metadata.version(DISTRIBUTION).partition("+flash.")[2] or "unknown"
    except metadata.PackageNotFoundError:
        return "unknown"

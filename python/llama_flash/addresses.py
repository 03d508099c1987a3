"""Addresses of hosts, as people write them."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["address_of", "addresses_in"]


def address_of(text: object, least_port: int = 1) -> tuple[str, int]:
    """Host and port of "host:port".

    Raises:
        ValueError: it is neither.
    """
    host, _, port = text.rpartition(":") if isinstance(text, str) else ("", "", "")
    if not host or not port.isascii() or not port.isdecimal() or not least_port <= int(port) < 1 << 16:
        raise ValueError(f"{text!r} is not a host and a port, as 127.0.0.1:50052")
    return host, int(port)


def addresses_in(value: str | Iterable[str]) -> tuple[str, ...]:
    """Several: a sequence, or a text with commas between them. They are not looked at."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value)

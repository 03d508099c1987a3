"""The address that a server listens at."""

from __future__ import annotations

import ipaddress
import socket

__all__ = ["bound", "is_loopback"]


def bound(host: str, port: int) -> socket.socket:
    """A socket that owns the port (0: any); connections are refused until somebody listens.

    Raises:
        OSError: it cannot be listened at, with what to change.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise OSError(f"cannot listen at {host}:{port}: {error.strerror or error}; see --host and --port") from None
    return listener


def is_loopback(host: str) -> bool:
    """Whether an address, as numbers, is of this machine alone."""
    return ipaddress.ip_address(host).is_loopback

"""The address that a server listens at, and connections to it."""

from __future__ import annotations

import http.client
import ipaddress
import socket

__all__ = ["SOCKET", "bound", "connection_to", "is_loopback"]

SOCKET = ".sock"  # how the path of a socket ends, which llama-server takes for a host


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


def connection_to(host: str, port: int, timeout: float | None) -> http.client.HTTPConnection:
    """A connection that opens with the first request. timeout: seconds that a call on it may wait; None: for ever."""
    if host.endswith(SOCKET):
        return _SocketConnection(host, timeout)
    return http.client.HTTPConnection(host, port, timeout=timeout)


class _SocketConnection(http.client.HTTPConnection):
    """To a socket in the file system."""

    def __init__(self, path: str, timeout: float | None) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)

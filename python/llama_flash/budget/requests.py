"""What a server leaves alone for the requests of its clients, where nobody says how much."""

from __future__ import annotations

__all__ = ["largest_body", "memory_of", "reserve_of_server"]

_BODY = 1 << 20  # bytes, without the context's part
_BYTES_OF_A_TOKEN = 64  # longer than nearly all of them, escaped as JSON has it
_MEMORY = 48 << 20
_BODIES = 32  # in bytes of the largest
_BESIDE = 8 << 20  # bytes that are left alone beside what requests may take


def largest_body(n_ctx: int) -> int:
    """Bytes of a request, for a sequence of so many tokens."""
    return _BODY + _BYTES_OF_A_TOKEN * n_ctx


def memory_of(body: int) -> int:
    """Bytes that all requests together may take, where the largest has so many."""
    return max(_MEMORY, _BODIES * body)


def reserve_of_server(memory: int) -> int:
    """Bytes of the budget that are not for weights, where requests may take `memory`."""
    return memory + _BESIDE

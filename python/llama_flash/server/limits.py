"""What clients of llama-server may ask for. docs/explanation/serving.md says what is refused beyond it, and why."""

from __future__ import annotations

from dataclasses import dataclass

from ..budget.requests import largest_body, memory_of
from ..native.server import RequestLimits
from ..sizes import parse_size

__all__ = ["Limits"]


@dataclass(frozen=True)
class Limits:
    """Limits of the server, and of each request.

    Attributes:
        max_body: of a request, bytes or a size as text; None: 1 MiB, and 64 bytes for each token of a context.
        max_grammar: of a grammar, bytes or a size as text, given or made from a JSON schema.
        max_memory: of all requests together, bytes or a size as text, a part of the budget; None: 48 MiB, or 32 times
            `max_body` if that is more.
        max_depth: arrays and objects in each other, in a body.
        max_requests: that are answered or wait at the same time.
        timeout: seconds within which a request has to be there as a whole, and each piece of an answer be taken.
    """

    max_body: int | str | None = None
    max_grammar: int | str = 256 << 10
    max_memory: int | str | None = None
    max_depth: int = 64
    max_requests: int = 128
    timeout: int = 60

    def of_requests(self, n_ctx: int) -> RequestLimits:
        """As the server takes them. Raises ValueError for what is no size.

        Args:
            n_ctx: tokens of a sequence.
        """
        body = largest_body(n_ctx) if self.max_body is None else _size("--max-body", self.max_body)
        memory = memory_of(body) if self.max_memory is None else _size("--max-memory", self.max_memory)
        return RequestLimits(
            max_body=body,
            max_grammar=_size("--max-grammar", self.max_grammar),
            max_memory=memory,
            max_depth=self.max_depth,
            max_requests=self.max_requests,
            n_ctx=n_ctx,
        )


def _size(flag: str, value: int | str) -> int:
    try:
        return parse_size(value)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None

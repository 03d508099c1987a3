"""What the controller and the models' sessions agree on: what each tells of its memory, and how a pool is divided."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

__all__ = ["Callback", "EventKind", "FlashEvent", "Session", "beside_flash", "divide"]

EventKind = Literal["shrink", "grow", "pressure", "short"]


@dataclass(frozen=True)
class FlashEvent:
    """Something happened to a model's flash memory. Callbacks of `llm.flash.on_event` get these.

    kind: "shrink" or "grow": it moves from `before` to `after` bytes; "pressure": the kernel found it hard to free
    memory; "short": the limit leaves less than what cannot be given back while the model is loaded, `after` is that.
    """

    kind: EventKind
    before: int
    after: int
    reason: str  # what set the limit
    time: float  # time.time()


Callback = Callable[[FlashEvent], None]


class Session(Protocol):
    """What the controller knows of a model: its flash memory, in bytes."""

    @property
    def asked(self) -> int | None: ...  # budget of the process, as this model's user set it; None: what limits allow
    def reserve(
        self, total: int, rise: int | None = None
    ) -> int: ...  # of a budget of so many bytes: to be left unused
    @property
    def fixed(self) -> int: ...  # of this model, beside flash and interpreter: the most it can come to
    @property
    def certain(self) -> int: ...  # of that, what is in memory for sure: weights
    @property
    def decoding(self) -> bool: ...  # a few tokens at a time, and so is what comes next, unless `recall` is called
    def soon(self, now: float) -> int: ...  # of `fixed`, what may be touched until the next look while it decodes
    @property
    def interpreter(self) -> int: ...  # and all else that was there when the model was loaded
    @property
    def granted(self) -> int: ...  # flash memory it is on the way to
    @property
    def least(self) -> int: ...  # flash memory that it cannot give back
    @property
    def most(self) -> int: ...  # flash memory from which on nothing need be read
    @property
    def touched(self) -> int: ...  # flash memory in use now

    def move(self, n_bytes: int, urgent: bool) -> bool: ...  # a step on the way; True: arrived
    def warm(self) -> bool: ...  # reads records that were hot in an earlier process; False: nothing left to read
    def limited(self, total: int, reserve: int, beside: int, reason: str) -> None: ...
    # the budget in force; beside: of the process, other models and their flash memory, without this model
    def tell(self, event: FlashEvent) -> None: ...  # called without the controller's lock
    def describe(self) -> dict[str, object]: ...


def divide(pool: int, sessions: Sequence[tuple[int, int]]) -> list[int]:
    """Shares of `pool` bytes for sessions with (least, most) bytes: the least for all, then alike in proportion.

    The shares add up to no more than the pool, unless the least do.
    """
    shares = [least for least, _ in sessions]
    left = pool - sum(shares)
    wants = [max(0, most - least) for least, most in sessions]
    total = sum(wants)
    if left > 0 and total > 0:
        scale = min(1.0, left / total)
        shares = [share + int(want * scale) for share, want in zip(shares, wants, strict=True)]
    return shares


def beside_flash(planned: int, measured: int, reserve: int, soon: int | None = None) -> int:
    """What the process takes beside flash memory, or must be able to take, in bytes.

    As planned, or as it is, if that eats too much of the reserve. While all models decode, as it is: graph buffers that
    only prompts need, and cells of the KV cache that no token has reached, are lent to flash until a prompt comes.

    Args:
        planned: the most it comes to.
        measured: what it is now.
        soon: what may be touched until the next look; None: not all models decode.
    """
    most = max(planned, measured - reserve // 2)
    return most if soon is None else min(most, measured + soon)

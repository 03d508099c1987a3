"""What a token of a loaded model is expected to cost, for comparison with what it does."""

from __future__ import annotations

import functools
from collections.abc import Callable

from ..budget.cores import choose_threads
from ..device.profile import DeviceProfile
from ..planning.cost import Cost, expect
from ..planning.reads import experts_ahead
from ..planning.usage import usage_of
from .session import FlashSession

__all__ = ["cost_of"]


def cost_of(session: FlashSession) -> Callable[[DeviceProfile], Cost]:
    """Expected cost of a token of a loaded model, with the memory that it was given; stays usable when it is closed."""
    return functools.partial(
        expect,
        session.meta,
        session.plan,
        session.memory,
        session.native.requirements() if session.native is not None else None,
        predictor=session.predictor,
        window=session.options.window,
        io_depth=session.io_depth,
        lookahead=experts_ahead(session.options),
        usage=usage_of(session.meta.files, session.options),
        awake=choose_threads().awake,
    )

"""How a model's file will be read: by which I/O engine, how many reads at once, how far ahead."""

from __future__ import annotations

from ..device.profile import DeviceProfile
from ..model.bundles import Bundles
from ..options import FlashOffload

__all__ = ["experts_ahead", "io_choice"]

_PIECE = 1 << 20  # bytes of a read, at most
_EXPERTS_AHEAD = 2  # of the next layer, most, to begin with; see docs/measurements/2026-11-21-lookahead.md


def experts_ahead(options: FlashOffload) -> int:
    """Most experts of the next layer that are read ahead of its router; "auto": until others are tried."""
    return _EXPERTS_AHEAD if options.lookahead else 0


def io_choice(options: FlashOffload, bundles: Bundles | None, profile: DeviceProfile | None) -> tuple[str, int]:
    """I/O engine and most reads in flight at once.

    Args:
        profile: of the device, if one was measured; it decides what the options leave open.
    """
    io_engine, depth = options.io_engine, options.io_depth or (128 if bundles else 32)
    if profile is not None and profile.source in ("measured", "cached"):
        if io_engine == "auto" and profile.faster == "pread":
            io_engine = "pread"
        depth = options.io_depth or profile.depth_for(bundles.format.record_bytes if bundles else _PIECE)
    return io_engine, depth

"""Sizes in bytes, as people write them."""

from __future__ import annotations

import math
import re

__all__ = ["ACCEPTED", "format_size", "parse_size"]

ACCEPTED = 'a positive number of bytes (2147483648), a size ("2GiB", "1.5G", "800MB") or a share ("50%")'

# Binary multiples for K, M, G, T as in cgroups and systemd; KB, MB, GB, TB are the decimal ones.
_UNITS = {
    "": 1,
    "b": 1,
    **{unit: 1 << (10 * i) for i, letter in enumerate("kmgt", 1) for unit in (letter, letter + "i", letter + "ib")},
    **{letter + "b": 1000**i for i, letter in enumerate("kmgt", 1)},
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-z]*|%)\s*", re.ASCII | re.IGNORECASE)


def parse_size(value: int | float | str, *, reference: int | None = None) -> int:
    """Bytes meant by `value`.

    Args:
        value: 2147483648, "2GiB", "1.5G", "800MB" or "50%". K, M, G, T are powers of 1024 (as are KiB, ...); KB,
            MB, GB, TB are powers of 1000.
        reference: what a percentage is of, in bytes. Without it percentages are refused.

    Returns:
        A whole number of bytes, at least 1.

    Raises:
        ValueError: not a size (True and False are none); the message names the accepted forms.
        TypeError: neither number nor text; the same message.
    """
    if isinstance(value, bool):
        raise _bad(value)
    if not isinstance(value, (int, float, str)):
        raise TypeError(str(_bad(value)))
    if isinstance(value, (int, float)):
        size: float = value
    else:
        match = _SIZE.fullmatch(value) if len(value) < 64 else None
        if match is None:
            raise _bad(value)
        unit = match[2].lower()
        if unit == "%":
            if reference is None:
                raise ValueError(f"{value!r} is a share, but there is nothing here that it could be a share of")
            size = float(match[1]) / 100 * reference
        elif unit in _UNITS:
            size = int(match[1]) * _UNITS[unit] if match[1].isdigit() else float(match[1]) * _UNITS[unit]
        else:
            raise _bad(value)
    if not 1 <= size < 1 << 63:  # NaN too
        raise _bad(value)
    return int(size)


def format_size(size: int) -> str:
    """`size` bytes with three significant digits: "1.50 GiB", "812 MiB", "17 B"."""
    amount, sign = float(abs(size)), "-" if size < 0 else ""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while amount >= 1000 and len(units) > 1:
        amount /= 1024
        units.pop(0)
    unit = units[0]
    digits = 0 if unit == "B" else max(0, 2 - int(math.log10(max(amount, 1))))
    return f"{sign}{amount:.{digits}f} {unit}"


def _bad(value: object) -> ValueError:
    return ValueError(f"not a size: {value!r}; accepted: {ACCEPTED}")

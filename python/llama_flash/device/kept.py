"""Device profiles that are kept: one JSON file per device in the user's cache directory.

They save a measurement and nothing depends on them: a file that cannot be read, or is of another version or device, is
passed over with one line in the log; one that cannot be written is left out.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from datetime import datetime, timedelta, timezone
from pathlib import Path

from ..kept_files import cache_folder, keep, read_kept
from ..options import IoEngine
from .identity import device_of
from .profile import DeviceProfile, Report, measure, quick_profile

__all__ = ["profile", "profile_for", "recall", "remember"]

logger = logging.getLogger("llama_flash")

_VALID = timedelta(days=180)  # devices wear, and so do file systems


def profile(
    path: str | os.PathLike[str], *, io_engine: IoEngine = "auto", report: Report | None = None
) -> DeviceProfile:
    """Measures the device that holds `path`, and DRAM, in 15 seconds at most; plans made later use it.

    Args:
        path: a file or directory on the device. A file of at least 256 MiB is read itself (a model is best); else a
            temporary file of at most 1 GiB is made beside it, which vanishes with the process.
        io_engine: as in FlashOffload.
        report: called with the share that is done, 0 to 1, and with what is being done.

    Raises:
        OSError: no such path, not readable, or no space for a temporary file.
        FlashReadError: a read failed.
        FlashError: the I/O engine or the plugin is missing.
    """
    measured = measure(path, io_engine=io_engine, report=report)
    remember(measured)
    return measured


def profile_for(path: str | os.PathLike[str], io_engine: IoEngine = "auto") -> DeviceProfile:
    """What is known of the device of file `path`: the profile that is kept, else a quick probe, else cautious defaults.

    The profile's `source` says which.
    """
    return recall(path) or quick_profile(path, io_engine)


def recall(path: str | os.PathLike[str]) -> DeviceProfile | None:
    """The profile kept for the device that holds `path`; None if there is none that can be used."""
    device = device_of(path)
    file = _file_for(device.key)
    try:
        values = json.loads(read_kept(file))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("device profile %s cannot be read (%s): it is ignored", file, error)
        return None
    try:
        known = DeviceProfile.from_dict(values)
        if known.device.key != device.key:
            raise ValueError("it is of another device")
        age = datetime.now(timezone.utc) - datetime.fromisoformat(known.measured)
        if not timedelta(days=-1) < age < _VALID:
            raise ValueError(f"it is of {known.measured}; `llama-flash profile` makes a new one")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        logger.warning("device profile %s is ignored: %s", file, reason)
        return None
    return known


def remember(measured: DeviceProfile) -> Path | None:
    """Keeps the profile. Returns the file, None (and says so) where it cannot be written."""
    file = _file_for(measured.device.key)
    try:
        keep(file, json.dumps(measured.as_dict(), indent=1).encode())
    except OSError as error:
        logger.warning("the device profile is not kept: %s", error)
        return None
    return file


def _file_for(key: str) -> Path:
    return cache_folder() / f"device-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"

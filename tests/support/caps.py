"""Whether memory can be capped here."""

from __future__ import annotations

import os

import pytest

from llama_flash import FlashCapError, run_capped
from llama_flash.budget.cgroup import memory_controller


def require_caps() -> None:
    """Where root has a memory controller, a cap that does not work is a failure and no reason to skip."""
    try:
        run_capped("64MiB", ["true"])
    except FlashCapError as error:
        if os.geteuid() == 0 and memory_controller() is not None:
            pytest.fail(f"root with a memory controller, and yet: {error}")
        pytest.skip(str(error))

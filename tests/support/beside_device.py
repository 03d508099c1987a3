"""A model of which some layers lie on a device: run as a program, since a device stays with its process.

`python beside_device.py` reads a JSON object with the arguments of `beside` and writes one with what `Run` has.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Run", "beside"]

_SECONDS = 300.0


@dataclass
class Run:
    """Sizes in bytes."""

    refused: str = ""  # the message of a FlashBudgetError
    smallest: int = 0  # that it names
    logits: str = ""  # hash of all of them
    memory: dict[str, int] = field(default_factory=dict)  # where the budget goes
    expected: dict[str, int] = field(default_factory=dict)  # as it was planned
    device: int = 0  # weights on devices, as planned
    staging: int = 0
    peak: int = 0  # of the process, from its beginning to the end of the load
    held: int = 0  # of the process, after the last token
    experts_expected: int = 0
    bytes_read: int = 0


def beside(
    model: Path, device: str | None, *, cap: str = "", n_gpu_layers: int = -1, n_tokens: int = 24, **options: Any
) -> Run:
    """One run in a process of its own.

    Args:
        device: address of an RPC server.
        cap: of a memory cgroup of the process.
        options: of FlashOffload; none: without flash.
    """
    about = {"model": str(model), "device": device, "n_gpu_layers": n_gpu_layers, "n_tokens": n_tokens}
    inner = [sys.executable, __file__]
    command = [sys.executable, "-m", "llama_flash", "cap", cap, "--", *inner] if cap else inner
    done = subprocess.run(
        command, input=json.dumps({**about, "options": options}), capture_output=True, text=True, timeout=_SECONDS
    )
    assert done.returncode == 0, done.stderr
    return Run(**json.loads(done.stdout.splitlines()[-1]))


def _run(model: str, device: str | None, n_gpu_layers: int, n_tokens: int, options: dict[str, Any]) -> Run:
    import llama_cpp
    from rpc_device import register

    from llama_flash import FlashBudgetError, FlashOffload
    from llama_flash.budget.rooms import held_by_process

    if device is not None:
        register(device)
    offload = FlashOffload(**options) if options else False
    settings = {"n_ctx": 512, "n_threads": 2, "logits_all": True, "verbose": False, "n_gpu_layers": n_gpu_layers}
    try:
        llm = llama_cpp.Llama(model, flash_offload=offload, **settings)
    except FlashBudgetError as error:
        return Run(refused=str(error), smallest=error.smallest)
    peak = _peak()
    digest = _logits(llm, n_tokens)
    if not options:
        return Run(logits=digest, peak=peak, held=held_by_process())
    plan, stats = llm.flash.plan, llm.flash.stats()
    device_bytes = sum(llm.flash.meta.tensors[name].size for name in plan.on_device)
    found = Run(
        logits=digest,
        memory=stats.memory.as_dict(),
        expected=plan.expected.as_dict(),
        device=device_bytes,
        staging=plan.staging,
        peak=peak,
        held=held_by_process(),
        experts_expected=stats.total.experts_expected,
        bytes_read=stats.total.bytes_read,
    )
    llm.close()
    return found


def _logits(llm: Any, n_tokens: int) -> str:
    prompt: Sequence[int] = range(5, 69)
    llm.eval(list(prompt))
    for token in range(100, 100 + n_tokens):
        llm.eval([token])
    return hashlib.sha256(llm.scores[: llm.n_tokens].tobytes()).hexdigest()


def _peak() -> int:
    """VmHWM without pages of files, which the kernel takes back."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return (int(status["VmHWM"].split()[0]) - int(status["RssFile"].split()[0])) << 10


if __name__ == "__main__":
    print(json.dumps(asdict(_run(**json.load(sys.stdin)))))

"""A question to a real pretrained model that fits into less memory than its file takes; without it, a shipped one."""

from __future__ import annotations

from pathlib import Path

import realmodel
from benchlib.measure import FLASH
from benchlib.runs import Run, run

import llama_flash
from demolib.screen import Screen

_SHIPPED = Path(__file__).resolve().parents[3] / "python/llama_flash/models/stdlib-moe-q8_0.gguf"
_CODE = "def read_file(path):\n"
_CTX, _UBATCH = 512, 128
_ROOM = 32 << 20  # bytes of memory beyond the smallest budget that works
_TIMEOUT = 300.0  # seconds


def show_chat(screen: Screen, question: str, tokens: int) -> bool:
    """Whether it worked. tokens: at most so many are answered."""
    try:
        model = realmodel.ensure()
    except realmodel.RealModelError as error:
        screen.say(f"Left out, the chat: {error}", "yellow")
        screen.say("A small model of this project's own continues a line of Python instead.")
        return _generated(screen, _SHIPPED, "generate", _CODE, tokens)
    screen.say(f"> {question}", "bold")
    return _generated(screen, model, "chat", question, tokens)


def _generated(screen: Screen, model: Path, work: str, prompt: str, tokens: int) -> bool:
    size = model.stat().st_size
    smallest = llama_flash.plan(
        model, n_ctx=_CTX, n_batch=_UBATCH, n_ubatch=_UBATCH, flash_offload={"what": "all"}
    ).smallest
    flash = {"dram_budget": smallest + _ROOM, "what": "all"}
    result = run(
        FLASH,
        model,
        None,
        patience=0.0,
        timeout=_TIMEOUT,
        show=True,
        work=work,
        prompt=prompt,
        tokens=tokens,
        flash=flash,
        n_ctx=_CTX,
        n_ubatch=_UBATCH,
    )
    if not result.ok:
        screen.say("")  # where the answer ended
        screen.error(f"{model.name}: {result.error}")
        return False
    screen.say(_figures(result, size), "dim")
    return True


def _figures(result: Run, size: int) -> str:
    read = result.measured["flash_bytes_per_token"]
    return f"{result.tok_s:.0f} tokens per second, {read / 1e6:.1f} MB of the file's {size / 1e6:.0f} read for each"

"""Draws the pictures of docs/images: models that read a text token by token, with less memory than weights."""

from __future__ import annotations

import argparse
import inspect
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import llama_cpp

import llama_flash
from gguf_tools.routing import random_tokens
from gguf_tools.synthetic import PRESETS, SKEWED, write

ROOT = Path(__file__).resolve().parents[2]
SIZE: dict[str, Any] = {"n_ctx": 512, "n_batch": 64, "n_ubatch": 64}
PROMPT = 40  # tokens


@dataclass(frozen=True)
class Picture:
    model: Callable[[Path], Path]  # of a folder that it may be written to
    beyond: int  # MiB of memory beyond the smallest budget that works
    n_tokens: int


def shipped(_folder: Path) -> Path:
    return Path(str(resources.files("llama_flash") / "models" / "stdlib-opt-q8_0-flash.gguf"))


def mixture(folder: Path) -> Path:
    return write(replace(PRESETS["moe-400m"], popularity=SKEWED), folder / "moe-400m.gguf")[0]


def dense(folder: Path) -> Path:
    return write(PRESETS["dense-400m"], folder / "dense-400m.gguf")[0]


PICTURES = {
    "latency": Picture(dense, 200, 100),
    "reuse": Picture(shipped, 8, 240),
    "residency": Picture(mixture, 140, 240),
}


def draw(what: str, picture: Picture, path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="llama-flash-pictures-") as folder:
        file = picture.model(Path(folder))
        budget = llama_flash.plan(file, **SIZE).smallest + (picture.beyond << 20)
        flash = llama_flash.FlashOffload(dram_budget=budget, warm_start=False)
        llm = llama_cpp.Llama(str(file), flash_offload=flash, n_threads=2, verbose=False, **SIZE)
        text = random_tokens(PROMPT + picture.n_tokens, llm.n_vocab())
        if picture.model is shipped:  # trained on such text
            text = llm.tokenize(inspect.getsource(argparse).encode())[: len(text)]
        llm.eval(text[:PROMPT])
        for token in text[PROMPT:]:  # one by one, as they are generated
            llm.eval([token])
        llm.flash.plot(what, path)
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size >> 10} KiB")
        llm.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", help=f"of {', '.join(PICTURES)}; all of them, if none is named")
    for what in parser.parse_args().what or PICTURES:
        draw(what, PICTURES[what], ROOT / f"docs/images/{what}.png")


if __name__ == "__main__":
    main()

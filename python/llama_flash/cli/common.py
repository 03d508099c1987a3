"""What the commands share: consoles, options, and how errors are told."""

from __future__ import annotations

import sys
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..capped import CapResult
from ..sizes import format_size

__all__ = [
    "DEFAULT_CTX",
    "AsJson",
    "Ctx",
    "DramBudget",
    "Model",
    "Plot",
    "Predictor",
    "Threads",
    "Window",
    "fail",
    "model_path",
    "report_cap",
    "share",
    "stderr",
    "stdout",
]

SHIPPED_MODEL = "stdlib-moe-q8_0.gguf"
DEFAULT_CTX = 2048

stderr = Console(stderr=True, highlight=False)
stdout = Console(highlight=False)

Model = Annotated[Path | None, typer.Argument(help="GGUF file, or its first shard.", metavar="MODEL.gguf")]
DramBudget = Annotated[str, typer.Option("--dram-budget", help='"auto", a size, or a share of the model file.')]
Predictor = Annotated[
    str, typer.Option("--predictor", help="Active neurons of a bundle file: auto, exact, lowrank (lossy) or off.")
]
Window = Annotated[
    int | None, typer.Option("--window", help="Tokens whose neurons stay in memory. Default: as many as have room.")
]
Ctx = Annotated[
    int, typer.Option("-c", "--n-ctx", "--ctx", min=0, help="Context in tokens. 0: 2048, or less if trained so.")
]
Threads = Annotated[int, typer.Option("-t", "--threads", min=0, help="0: one per core.")]
Plot = Annotated[
    Path | None,
    typer.Option("--plot", metavar="FILE", help="Draw it, too: .png, .svg or .pdf (needs the extra `plot`)."),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, instead of text.")]


def model_path(model: Path | None) -> Path:
    if model is not None:
        if not model.is_file():
            raise FileNotFoundError(f"no such model: {model}")
        return model
    shipped = Path(str(resources.files("llama_flash") / "models" / SHIPPED_MODEL))
    if not shipped.is_file():
        raise FileNotFoundError(f"the shipped model is missing ({shipped}); name a GGUF file")
    return shipped


def report_cap(result: CapResult) -> None:
    peak = "unknown" if result.peak_bytes is None else format_size(result.peak_bytes)
    stderr.print(
        f"peak {peak} of {format_size(result.limit_bytes)} ({result.method}), "
        f"{result.oom_kills} OOM kills, exit code {result.exit_code}, {result.seconds:.1f} s",
        style="red" if result.oom_kills else None,
        soft_wrap=True,
    )


def share(option: str, text: str) -> float:
    """0.36 of "36%" or "0.36".

    Raises:
        ValueError: not a share.
    """
    try:
        value = float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0.0 < value <= 1.0:
        raise ValueError(f"{option}: {text!r} is not a share, more than 0 and at most 100%")
    return value


def fail(message: str) -> None:
    stderr.print(f"llama-flash: {message}", style="red", markup=False, soft_wrap=True)
    sys.exit(1)

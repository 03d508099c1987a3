"""What the commands share: consoles, options, and how results and errors are told.

Where two commands mean the same thing, they take it from here: the same name, the same help.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console

from ..budget.capped import CapResult
from ..errors import FlashFormatError
from ..file_kind import kind_of_file
from ..options import IoEngine as IoEngines
from ..options import Predictor as Predictors
from ..options import What as Whats
from ..sizes import format_size

__all__ = [
    "DEFAULT_CTX",
    "AsJson",
    "Cap",
    "Ctx",
    "Draft",
    "DramBudget",
    "FlashAttn",
    "Follow",
    "IoEngine",
    "Lookahead",
    "Model",
    "NBatch",
    "NUbatch",
    "Plot",
    "Predictor",
    "PromptCache",
    "PromptCacheDir",
    "PromptCacheSize",
    "Reserve",
    "Seed",
    "Temperature",
    "Threads",
    "Tokens",
    "TypeK",
    "TypeV",
    "Verbose",
    "WarmStart",
    "What",
    "Window",
    "WorkerToken",
    "Workers",
    "fail",
    "model_path",
    "never_fail_to_print",
    "print_json",
    "report_cap",
    "share",
    "stderr",
    "stdout",
    "utf8",
]

SHIPPED_MODEL = "stdlib-moe-q8_0.gguf"
DEFAULT_CTX = 2048
# as in placement.KV_TYPES, which needs numpy: too much for a help page
_KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")

# without markup: names of files may hold brackets
stderr = Console(stderr=True, highlight=False, markup=False)
stdout = Console(highlight=False, markup=False)


def _flash(*names: str, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel="Flash offload", **settings)


def _context(*names: str, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel="Context", **settings)


def _text(*names: str, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel="Text", **settings)


def _words(words: tuple[str, ...]) -> Callable[[], list[str]]:
    """For the shell's completion."""
    return lambda: list(words)


Model = Annotated[Path | None, typer.Argument(help="GGUF file, or its first shard.", metavar="MODEL.gguf")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, instead of text.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the engine's log.")]

Cap = Annotated[str | None, _flash("--cap", help="Run in a memory cgroup: a size, or a share of the model file (50%).")]
DramBudget = Annotated[
    str, _flash("--dram-budget", metavar="SIZE", help='"auto", a size, or a share of the model file.')
]
Reserve = Annotated[
    str | None,
    _flash("--reserve", metavar="SIZE", help="Left alone within the budget.", show_default="3 %, at least 32 MiB"),
]
What = Annotated[
    str,
    _flash(
        "--what", help="Weights that go to flash: auto, experts, ffn or all.", autocompletion=_words(get_args(Whats))
    ),
]
Predictor = Annotated[
    str,
    _flash(
        "--predictor",
        help="Active neurons of a bundle file: auto, exact, lowrank (lossy) or off.",
        autocompletion=_words(get_args(Predictors)),
    ),
]
Window = Annotated[
    int | None,
    _flash("--window", help="Tokens whose neurons stay in memory.", show_default="as many as have room"),
]
Lookahead = Annotated[
    bool | None,
    _flash(
        "--lookahead/--no-lookahead",
        help="Read ahead what the next layer will probably use.",
        show_default="while it pays",
    ),
]
Draft = Annotated[
    str,
    _flash(
        "--draft",
        metavar="auto|off|ngram|mtp|FILE",
        help="Guesses at the next tokens, checked in one pass: from the text, by the file's head or a smaller model.",
        autocompletion=_words(("auto", "off", "ngram", "mtp")),
    ),
]
Follow = Annotated[
    bool, _flash("--follow/--no-follow", help="Give memory back and take it again as limits and neighbours move.")
]
WarmStart = Annotated[
    bool, _flash("--warm-start/--no-warm-start", help="Read first what was hot when the model was last used.")
]
PromptCache = Annotated[
    bool,
    _flash(
        "--prompt-cache",
        help="Keep the state of prompts on flash: in the user's cache folder, open to the owner alone.",
    ),
]
PromptCacheDir = Annotated[Path | None, _flash("--prompt-cache-dir", metavar="DIR", help="The same, in this folder.")]
PromptCacheSize = Annotated[
    str, _flash("--prompt-cache-size", metavar="SIZE", help="What these files may take on the disk.")
]
Workers = Annotated[
    str | None,
    _flash("--workers", metavar="HOST:PORT,...", help="Others that hold the layers (llama-flash worker), in order."),
]
WorkerToken = Annotated[
    Path | None, _flash("--worker-token-file", metavar="FILE", help="Its first line is what the workers know, too.")
]
IoEngine = Annotated[
    str, _flash("--io-engine", help="auto, io_uring or pread.", autocompletion=_words(get_args(IoEngines)))
]

Ctx = Annotated[
    int, _context("-c", "--n-ctx", "--ctx", min=0, help="Context in tokens. 0: 2048, or less if trained so.")
]
NBatch = Annotated[int, _context("--n-batch", min=1, help="Tokens of a prompt computed in one call.")]
NUbatch = Annotated[int, _context("--n-ubatch", min=1, help="Of these, computed at once.")]
TypeK = Annotated[
    str, _context("--type-k", help=f"Of the KV cache: {', '.join(_KV_TYPES)}.", autocompletion=_words(_KV_TYPES))
]
TypeV = Annotated[str, _context("--type-v", help="The same, for V.", autocompletion=_words(_KV_TYPES))]
FlashAttn = Annotated[bool, _context("--flash-attn", help="As Llama(flash_attn=True).")]
Threads = Annotated[
    int, _context("-t", "--threads", min=0, help="0: one per physical core, as affinity and CPU quota allow.")
]

Tokens = Annotated[int, _text("-n", "--tokens", min=1, help="Tokens to generate.")]
Temperature = Annotated[float, _text("--temp", min=0.0, help="0: always the likeliest token.")]
Seed = Annotated[int, _text("--seed", help="Of the sampler.")]
Plot = Annotated[
    Path | None,
    typer.Option("--plot", metavar="FILE", help="Draw it, too: .png, .svg or .pdf (needs the extra `plot`)."),
]


def model_path(model: Path | None) -> Path:
    """The model that is meant; the shipped one where none is named.

    Raises:
        FileNotFoundError: there is no such file.
        FlashFormatError: it is a folder, a pipe, a device.
    """
    if model is not None:
        if not model.exists():
            raise FileNotFoundError(f"no such model: {model}")
        if kind := kind_of_file(model):
            raise FlashFormatError(f"{model}: {kind}, not a GGUF file")
        return model
    shipped = Path(str(resources.files("llama_flash") / "models" / SHIPPED_MODEL))
    if not shipped.is_file():
        raise FileNotFoundError(f"the shipped model is missing ({shipped}); name a GGUF file")
    return shipped


def utf8(what: str, text: str) -> str:
    """`text` as a model can be asked it, also where the locale did not know how to read it. what: where it is from.

    Raises:
        ValueError: it came as bytes that are not UTF-8.
    """
    if not any("\ud800" <= c <= "\udfff" for c in text):
        return text
    raw = text.encode("utf-8", errors="surrogateescape")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8")[-20:]
        raise ValueError(f"{what}: not UTF-8: byte 0x{raw[error.start]:02x} after {before!r}") from None


def never_fail_to_print() -> None:
    """A terminal that cannot show a character shows its number: text of models and names of files may hold any."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_json(values: Mapping[str, Any]) -> None:
    """One object, on one line."""
    print(json.dumps(values), flush=True)


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
    """Ends the program with one line, whatever a damaged file's names hold."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
    stderr.print(f"llama-flash: {line}", style="red", markup=False, soft_wrap=True)
    sys.exit(1)

"""This very command once more, in a process of its own, below a memory cap: `run --cap`, `chat --cap`, `bench`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import typer

from ..budget.capped import CapResult, run_capped
from ..budget.rooms import default_reserve, held_by_process
from ..model.bundles import read_bundles
from ..model.gguf import GgufMeta
from ..model.shape import ContextShape
from ..planning.placement import estimate, least_for_neurons
from ..sizes import format_size, parse_size
from .common import print_json, report_cap, stderr

__all__ = ["cap_bytes", "cap_values", "command_line", "run_again_capped"]


def command_line(
    ctx: typer.Context, command: str | None = None, options: Sequence[str] = (), **changed: Any
) -> list[str]:
    """The command line of `ctx` with some parameters changed; None leaves one out.

    command: another command than that of `ctx`, which has all of its options that are not left out. options: more of
    them.
    """
    words = [sys.executable, "-m", "llama_flash", command or str(ctx.info_name)]
    arguments = []
    for param in ctx.command.params:
        if param.name not in ctx.params:
            continue
        value = changed.get(param.name, ctx.params[param.name])
        if value is None:
            continue
        if param.param_type_name == "argument":
            arguments.append(str(value))
        elif isinstance(value, bool):
            names = param.opts if value else param.secondary_opts
            words += names[-1:]
        else:
            # one word: a value may begin with a dash
            words += [f"{_long(param.opts)}={one}" for one in (value if isinstance(value, (list, tuple)) else [value])]
    words += options
    return [*words, "--", *arguments] if arguments else words


def _long(names: list[str]) -> str:
    return next(name for name in names if name.startswith("--"))


def run_again_capped(limit: int, command: list[str], as_json: bool) -> int:
    """Runs the command below the cap. Returns its exit code.

    as_json: the command prints a JSON object, which gets what is to be said about the cap, too.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    result = run_capped(limit, command, env=environment, capture_output=as_json)
    if as_json:
        sys.stderr.write(result.stderr or "")
        try:
            report = json.loads(result.stdout or "")
        except ValueError:
            sys.stdout.write(result.stdout or "")
        else:
            print_json({**report, "cap": cap_values(result)})
    report_cap(result)
    if result.oom_kills:
        stderr.print("the cap does not even hold the interpreter; try a larger one", style="red")
    return result.exit_code


def cap_values(result: CapResult) -> dict[str, Any]:
    """For JSON, without the command's output."""
    return {key: value for key, value in asdict(result).items() if key not in ("stdout", "stderr")}


def cap_bytes(cap: str, meta: GgufMeta, n_ctx: int) -> int:
    """Bytes meant by --cap.

    A share of a model that is smaller than the interpreter would not start: then the cap is that share of the weights
    on top of what the process takes without them, and says so.
    """
    size = parse_size(cap, reference=meta.file_bytes)
    if not cap.strip().endswith("%"):
        return size
    import llama_cpp  # noqa: F401  # so that its size is counted

    context = estimate(meta, ContextShape(n_ctx=n_ctx))
    beside = held_by_process() + context.fixed
    if bundles := read_bundles(meta):
        beside += least_for_neurons(bundles)
    beside += default_reserve(beside + size)
    if size >= 2 * beside:
        return size
    stderr.print(
        f"the model file is {format_size(meta.file_bytes)}, an interpreter with context and reserve takes "
        f"{format_size(beside)}: the cap is that plus {cap} of the file, {format_size(beside + size)}",
        style="yellow",
        soft_wrap=True,
    )
    return beside + size

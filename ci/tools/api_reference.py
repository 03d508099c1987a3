"""`make reference`: docs/reference/api.md, from signatures, docstrings and comments beside fields of dataclasses."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_flash
from llama_flash import offload, options
from llama_flash.budget import controller
from llama_flash.budget import rooms as budget
from llama_flash.device import profile as device_profile
from llama_flash.observe import stats
from llama_flash.planning import cost, planner

PAGE = Path(__file__).resolve().parents[2] / "docs/reference/api.md"
WIDTH = 120

HEAD = """\
# API reference

Made by `make reference` from the docstrings; a test compares them. Sizes are in bytes and times in seconds, unless it
says otherwise.

## What is promised

The interface is what this page names, the options of the commands and what they print with `--json`, their exit codes,
and the file format ([format.md](format.md)). All else in the packages may change at any time: names with an underscore,
and modules that are not named here.

Something that goes is marked first: for one minor version at least it works on and raises a `DeprecationWarning` that
names what to use instead, and the [changelog](../../CHANGELOG.md) says so. New options have a default that keeps what
was; a flash GGUF of version 1 stays readable. Speed, the text of messages and the choice that `"auto"` makes are no
part of the interface. A version is the engine's with ours behind it, `0.3.36+flash.0.1.0`: the engine's own interface
is upstream's, and another engine is a minor version here.
"""

COUNTERS = ("hit_rate", "bytes_per_token", "reads_per_token", "neurons_per_token", "wait_per_token", "as_dict")

# title, what is under it, and of classes that do more than they show to users: which members
SECTIONS: tuple[tuple[str, tuple[tuple[str, Any, tuple[str, ...] | None], ...]], ...] = (
    ("Loading a model", (("llama_flash.FlashOffload", llama_flash.FlashOffload, ()),)),
    (
        "A loaded model",
        (
            ("llm.flash", offload.FlashSession, ("stats", "set_budget", "on_event", "window", "close")),
            ("llama_flash.stats.FlashStats", stats.FlashStats, ("as_dict", "active_neurons")),
            ("llama_flash.stats.Counters", stats.Counters, COUNTERS),
            ("llama_flash.budget.Budget", budget.Budget, None),
            ("llama_flash.budget.Breakdown", budget.Breakdown, None),
            ("llama_flash.FlashEvent", llama_flash.FlashEvent, None),
        ),
    ),
    (
        "Before a load",
        (
            ("llama_flash.plan", llama_flash.plan, None),
            ("llama_flash.LoadPlan", planner.LoadPlan, None),
            ("llama_flash.planner.Option", planner.Option, None),
            ("llama_flash.cost.Cost", cost.Cost, None),
            ("llama_flash.profile", llama_flash.profile, None),
            ("llama_flash.DeviceProfile", llama_flash.DeviceProfile, None),
            ("llama_flash.device_profile.ReadRate", device_profile.ReadRate, None),
        ),
    ),
    (
        "Many prompts",
        (
            ("llama_flash.complete_many", llama_flash.complete_many, None),
            ("llama_flash.Completion", llama_flash.Completion, None),
            ("llama_flash.Completions", llama_flash.Completions, ("close",)),
        ),
    ),
    (
        "Memory caps",
        (
            ("llama_flash.run_capped", llama_flash.run_capped, None),
            ("llama_flash.CapResult", llama_flash.CapResult, None),
        ),
    ),
    (
        "Errors",
        tuple(
            (f"llama_flash.{name}", getattr(llama_flash, name), ())
            for name in (
                *(
                    "FlashError",
                    "FlashBudgetError",
                    "FlashReadError",
                    "FlashWorkerError",
                    "FlashFormatError",
                    "FlashCapError",
                ),
                "FlashCpuError",
            )
        ),
    ),
)
ALIASES = {
    **{name: getattr(options, name) for name in ("What", "Predictor", "IoEngine")},
    "EventKind": controller.EventKind,
    "Callback": controller.Callback,
    "Report | None": device_profile.Report | None,
}
NOT_SHOWN = {"Controller", "__version__"}  # of llama_flash.__all__: what moves the memory, and the version


def page() -> str:
    shown = {title.removeprefix("llama_flash.") for _, entries in SECTIONS for title, _, _ in entries}
    if missing := set(llama_flash.__all__) - NOT_SHOWN - shown:
        raise SystemExit(f"{Path(__file__).name}: exported, and in no section: {', '.join(sorted(missing))}")
    parts = [HEAD]
    for section, entries in SECTIONS:
        parts.append(f"## {section}\n")
        for title, thing, members in entries:
            parts.append(entry(title, thing, members))
    return "\n".join(parts)


def entry(title: str, thing: Any, members: tuple[str, ...] | None) -> str:
    lines = [f"### `{title}`", ""]
    is_options = thing is llama_flash.FlashOffload
    if inspect.isfunction(thing) or is_options:
        lines += ["```text", signature(title.rpartition(".")[2], thing), "```", ""]
    elif issubclass(thing, Exception):
        lines += [f"Bases: {', '.join(f'`{base.__name__}`' for base in thing.__bases__)}.", ""]
    lines += document(thing)
    if inspect.isclass(thing):
        if dataclasses.is_dataclass(thing) and not is_options:
            lines += [*fields(thing), ""]
        for name, member in public_members(thing):
            if members is None or name in members:
                lines += [*describe(name, member), ""]
    return "\n".join(lines)


def signature(name: str, thing: Callable[..., Any]) -> str:
    values = inspect.signature(thing)
    returns = "" if inspect.isclass(thing) or values.return_annotation in (None, "None") else values.return_annotation
    end = f" -> {returns}" if returns and returns is not inspect.Signature.empty else ""
    taken = [value for value in values.parameters.values() if value.name not in ("self", "cls")]
    parameters = [
        f"{'**' if value.kind == value.VAR_KEYWORD else ''}{value.name}: {type_name(value.annotation)}"
        + (f" = {value.default!r}" if value.default != value.empty else "")
        for value in taken
    ]
    kinds = [value.kind for value in taken]
    if inspect.Parameter.KEYWORD_ONLY in kinds:
        parameters.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    line = f"{name}({', '.join(parameters)}){end}"
    if len(line) <= WIDTH:
        return line
    return f"{name}(\n" + "".join(f"    {parameter},\n" for parameter in parameters) + f"){end}"


def type_name(annotation: str) -> str:
    """Aliases that this page does not explain are written out."""
    alias = ALIASES.get(annotation)
    if not alias:
        return annotation
    written = str(alias).replace("typing.", "").replace("collections.abc.", "")
    return written.replace(f"{llama_flash.FlashEvent.__module__}.", "llama_flash.")


def document(thing: Any) -> list[str]:
    """A docstring in Google's style as Markdown."""
    text = inspect.getdoc(thing) if thing.__doc__ and not thing.__doc__.startswith(f"{thing.__name__}(") else None
    if not text:
        return []
    lines: list[str] = []
    for part in re.split(r"\n\n+", text):
        head, _, body = part.partition("\n")
        if head in ("Args:", "Attributes:", "Raises:", "Returns:"):
            lines += [f"{head[:-1]}:", "", *items(body), ""]
        else:
            lines += [part, ""]
    return lines


def items(body: str) -> Iterator[str]:
    """`name: what it is`, continued on lines that are indented further."""
    for item in re.split(r"\n(?!\s)", textwrap.dedent(body)):
        names, _, text = item.partition(": ")
        coded = ", ".join(f"`{name}`" for name in names.split(", "))
        yield f"- {coded}: {' '.join(text.split())}"


def fields(thing: type) -> Iterator[str]:
    """The fields of a dataclass that are public, with the comments beside them."""
    source = textwrap.dedent(inspect.getsource(thing))
    comments = {}
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            line = source.splitlines()[(node.end_lineno or node.lineno) - 1]
            comments[node.target.id] = line[node.end_col_offset or 0 :].partition("# ")[2].strip()
    for field in dataclasses.fields(thing):
        comment = comments.get(field.name, "")
        yield f"- `{field.name}: {type_name(str(field.type))}`" + (f": {comment}" if comment else "")


def public_members(thing: type) -> Iterator[tuple[str, Any]]:
    for name, member in vars(thing).items():
        if not name.startswith("_") and isinstance(member, (property, classmethod)) | inspect.isfunction(member):
            yield name, member


def describe(name: str, member: Any) -> Iterator[str]:
    if isinstance(member, property):
        returns = inspect.signature(member.fget).return_annotation if member.fget else ""
        text = " ".join((inspect.getdoc(member) or "").split())
        yield f"- property `{name}: {returns}`" + (f": {text}" if text else "")
        return
    function = member.__func__ if isinstance(member, classmethod) else member
    text = "\n".join(document(function)).strip()
    yield f"**`{signature(name, function)}`**"
    if text:
        yield ""
        yield text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page is out of date")
    args = parser.parse_args()
    text = re.sub(r"\n{3,}", "\n\n", page()).rstrip() + "\n"
    if args.check:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
            sys.exit("docs/reference/api.md is not what the docstrings say: run `make reference`")
    else:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

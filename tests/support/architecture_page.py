"""docs/reference/architectures.md: its table is what was measured, its list of what is not run is the one of the tests.

python tests/support/architecture_page.py
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from architecture_runs import Case, Outcome, compared, run_all
from architectures import architectures
from repository import ROOT

PAGE = ROOT / "docs/reference/architectures.md"
_HEAD = "| architecture | compared | stays in memory | largest that stay |\n|---|---|---:|---|\n"
_NAMED_FROM = 0.15  # share from which on the page names what stays


@dataclass(frozen=True)
class Unrun:
    """Why an architecture is not run."""

    why: str
    says: str = ""  # a regular expression of what the engine says when it refuses it


_DRAFT = (
    "a draft head: its graph takes the hidden states of another model's context, which `llama_cpp.Llama` cannot give"
)
EXCEPTIONS: dict[str, Unrun] = {
    "clip": Unrun("a projector of images, loaded beside a model: the engine refuses it as one", "--mmproj"),
    "gptj": Unrun("a name without an implementation in the engine", "unsupported model architecture"),
    "eagle3": Unrun(_DRAFT),
    "dflash": Unrun(_DRAFT),
    "gemma4-assistant": Unrun(_DRAFT),
}
ALL = [Case(arch) for arch in architectures() if arch not in EXCEPTIONS]


def rows_of_page() -> dict[str, str]:
    """The table's rows, by architecture."""
    table = PAGE.read_text(encoding="utf-8").partition(_HEAD)[2]
    return {match[1]: match[0] for match in re.finditer(r"^\| `([\w.-]+)` \|.*$", table, re.MULTILINE)}


def table(outcomes: Mapping[str, Outcome]) -> str:
    """All architectures; outcomes: of those that are run."""
    rows = []
    for arch in sorted(architectures()):
        if arch in EXCEPTIONS:
            rows.append(f"| `{arch}` | not run | | {EXCEPTIONS[arch].why} |\n")
        else:
            share = outcomes[arch].share
            kinds = dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name) for name in outcomes[arch].resident)
            names = ", ".join(f"`{kind}`" for kind in kinds) if share >= _NAMED_FROM else ""
            rows.append(f"| `{arch}` | {compared(arch)} | {100 * share:.0f} % | {names} |\n")
    return _HEAD + "".join(rows)


def main() -> None:
    outcomes = run_all(ALL)
    wrong = [outcome for outcome in outcomes if outcome.error or outcome.different]
    for outcome in wrong:
        print(f"{outcome.case}: {outcome.error or f'{outcome.different} of {outcome.rows} rows differ'}")
    if wrong:
        sys.exit("error: the page is left as it is")
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text.partition(_HEAD)[0] + table({o.case.arch: o for o in outcomes}), encoding="utf-8")
    few = sum(outcome.share < _NAMED_FROM for outcome in outcomes)
    print(f"{PAGE.name}: {few} of {len(outcomes)} architectures keep less than {_NAMED_FROM:.0%} in memory")


if __name__ == "__main__":
    main()

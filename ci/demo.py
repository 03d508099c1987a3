"""Shows flash offload at work: `make demo`. Text from two shipped models, then a model twice as large as its memory."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchlib import tables
from benchlib.cases import CASES
from benchlib.measure import FLASH, RESIDENT, measure, naive_settings
from benchlib.models import MOE_SKEWED
from benchlib.runs import run, stop_on_sigterm
from demolib import show_neurons
from rich.console import Console

_SHIPPED_MOE = Path(__file__).resolve().parent.parent / "python/llama_flash/models/stdlib-moe-q8_0.gguf"
_PROMPT = 'class Stack:\n    """A stack of items.\n'


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ci/demo.py", description=__doc__)
    parser.add_argument("--prompt", default=_PROMPT)
    parser.add_argument("--folder", type=Path, help="where the large model is written and deleted again")
    parser.add_argument("--layers", type=int, help="layers of the large model (default: 12, 4.3 GB)")
    options = parser.parse_args(argv)
    stop_on_sigterm()
    console = Console()
    if not _generate(console, options.prompt):
        return 1
    show_neurons(console, options.prompt, (Path(__file__).parent / "bench.py").read_text(encoding="utf-8"))
    folder = options.folder or Path(__file__).resolve().parent.parent / "build"
    folder.mkdir(parents=True, exist_ok=True)
    case = next(case for case in CASES if case.name == "moe-50")
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix="demo-") as temporary:
            model = MOE_SKEWED.ensure(Path(temporary), options.layers)
            settings = [*naive_settings(model.stock), FLASH, RESIDENT]
            with console.status("") as status:
                outcome = measure(
                    case, model, settings, 1, status.update if console.is_terminal else console.print, max_seconds=20.0
                )
    except OSError as error:
        console.print(f"[red]error:[/] {error}")
        return 1
    except KeyboardInterrupt:
        console.print("[red]stopped[/]")
        return 130
    console.print(tables.outcome_table(outcome))
    tables.print_failures(console, [outcome])
    return 0 if all(run.ok for run in outcome.of(FLASH)) else 1


def _generate(console: Console, prompt: str) -> bool:
    """Text from the shipped mixture of experts, its experts on flash."""
    console.rule("text from the shipped model, experts on flash")
    result = run(
        FLASH,
        _SHIPPED_MOE,
        None,
        show=True,
        work="generate",
        prompt=prompt,
        tokens=96,
        n_ctx=512,
        flash={"what": "experts"},
    )
    if not result.ok:
        console.print(f"[red]failed:[/] {result.error}")
        return False
    console.print(f"\n{result.tok_s:.0f} tok/s")
    return True


if __name__ == "__main__":
    sys.exit(main())

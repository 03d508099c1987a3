"""Shows flash offload at work: `make demo`. Under three minutes, nothing is left behind but a model in build/models.

A question to a small pretrained model, how little of a ReLU model a token needs, and then a model twice as large as the
memory it may have: stock llama.cpp, flash offload, and stock llama.cpp with all memory, side by side in one table.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))  # what runs is what the benchmarks run

from benchlib.models import MOE_SKEWED
from benchlib.runs import stop_on_signals
from demolib.chat import show_chat
from demolib.compare import Comparison, compare
from demolib.neurons import show_neurons
from demolib.screen import Screen

from gguf_tools import GgufToolsError
from llama_flash import FlashCapError, FlashError, run_capped

_BUILD = Path(__file__).resolve().parents[2] / "build"
_PREFIX = "demo-"
_SPARE = 512 << 20  # bytes of disk beside the large model: the small one, and some to spare
_QUESTION = "What is the capital of France, and what is it known for?"


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    stop_on_signals()
    screen = Screen(parts=3)
    try:
        with _working_folder(options.folder) as folder:
            return _show(screen, options, folder)
    except (FlashError, GgufToolsError, OSError) as error:
        screen.error(str(error))
        return 1
    except KeyboardInterrupt:
        screen.say("\nstopped; nothing is left behind", "red")
        return 130


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ci/tools/demo.py", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--question", default=_QUESTION, help="to the small model")
    parser.add_argument("--layers", type=_positive(int), default=5, help="of the large model, 0.35 GB each")
    parser.add_argument(
        "--seconds",
        type=_positive(float),
        default=7.0,
        help="for which a run of the large model warms up, and again is measured, at most",
    )
    parser.add_argument("--folder", type=Path, default=_BUILD, help="for the large model, until the end")
    return parser.parse_args(argv)


def _positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
        return value

    return parse


def _show(screen: Screen, options: argparse.Namespace, folder: Path) -> int:
    _check_disk(folder, _model_bytes(options.layers))
    screen.part("a chat", "A small pretrained model. For each token it reads what has no room in memory.")
    works = show_chat(screen, options.question, tokens=48)
    screen.part("a ReLU model", "Most of its neurons are zero for a token. Those are not read, nor computed.")
    show_neurons(screen, tokens=200)
    screen.part("a model twice as large as its memory", "A mixture of experts: a token needs 8 of 128 in each layer.")
    model = MOE_SKEWED.ensure(folder, options.layers).stock
    result = compare(screen, model, seconds=options.seconds, no_limit=_why_no_limit())
    show_result(screen, result)
    return 0 if works and result.ok else 1


def show_result(screen: Screen, result: Comparison) -> None:
    """The last screen."""
    screen.show(result.table())
    screen.say(result.meaning())
    for note in result.notes():
        screen.say(note, "dim")
    for failure in result.failures():
        screen.error(failure)


def _model_bytes(layers: int) -> int:
    one, two = (MOE_SKEWED.synthetic(n).n_bytes for n in (1, 2))
    return one + (layers - 1) * (two - one)


def _check_disk(folder: Path, n_bytes: int) -> None:
    """Raises OSError, before anything else is done."""
    free, needed = shutil.disk_usage(folder).free, n_bytes + _SPARE
    if free < needed:
        raise OSError(
            f"the demo needs {needed / 1e9:.1f} GB of disk, most of it until it ends, but {folder.parent} has "
            f'{free / 1e9:.1f} GB free. Make room, or: make demo ARGS="--folder FOLDER_WITH_ROOM", or "--layers 1"'
        )


def _why_no_limit() -> str:
    """Why the kernel cannot be asked to limit the memory of what runs here; "" if it can."""
    try:
        run_capped("64MiB", ["true"])
    except FlashCapError:
        return "no limit can be set here, `llama-flash doctor` says what to allow"
    return ""


@contextmanager
def _working_folder(parent: Path) -> Iterator[Path]:
    """A folder that is removed in the end, however that comes; and what a demo that was killed has left."""
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(f"{_PREFIX}*-*"):
        pid = left.name[len(_PREFIX) :].partition("-")[0]
        if pid.isdecimal() and not Path("/proc", pid).exists():
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(dir=parent, prefix=f"{_PREFIX}{os.getpid()}-"))
    try:
        yield folder
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C would leave half of it
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())

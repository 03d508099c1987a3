"""python -m gguf_tools.synthetic inflate MODEL.gguf OUT.gguf --to 4GB

Makes a larger model that answers what MODEL answers, for tests and measurements with real text and real routing at any
size: its feed-forward blocks (of mixtures: each expert) get neurons whose column of down is zero. It takes no more
memory than some tens of MB. Not for flash files, and not for models that more neurons would change.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from gguf_tools.errors import GgufToolsError
from gguf_tools.source import data_bytes, open_gguf
from gguf_tools.synthetic.inflate import Inflated, inflate
from llama_flash.sizes import parse_size

NAME = "inflate"
_FACTOR = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*x", re.ASCII | re.IGNORECASE)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m gguf_tools.synthetic {NAME}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, metavar="MODEL.gguf", help="a GGUF file, or the first shard of a model")
    parser.add_argument("out", type=Path, metavar="OUT.gguf", help="file to write, in one piece")
    parser.add_argument("--to", required=True, metavar="SIZE", help='a size ("4GB", "2GiB") or a factor ("10x")')
    parser.add_argument("--force", action="store_true", help="replace OUT if it is there")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a killed command leaves no partial file
    try:
        to = _target(options.to, options.model)
        done = inflate(options.model, options.out, to, force=options.force, progress=f"inflating {options.model.name}")
    except (GgufToolsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(f"{options.out}: {options.out.stat().st_size / 1e9:.3f} GB, {_neurons(done)}")
    return 0


def _target(text: str, model: Path) -> int:
    """Bytes. Raises GgufToolsError: neither a size nor a factor above 1."""
    if match := _FACTOR.fullmatch(text.strip()):
        return int(float(match[1]) * sum(map(data_bytes, open_gguf(model).tensors.values())))
    try:
        return parse_size(text)
    except ValueError as error:
        raise GgufToolsError(f'--to: {error}, or a factor ("10x")') from None


def _neurons(done: Inflated) -> str:
    """What became of the blocks' lengths, each pair once."""
    pairs = dict.fromkeys(done.lengths.values())
    shown = ", ".join(f"{after} for {before}" for before, after in list(pairs)[:4]) + (
        ", ..." if len(pairs) > 4 else ""
    )
    return f"{done.bytes / done.bytes_before:.1f} times the model; neurons: {shown}"

"""python -m gguf_tools.synthetic --preset qwen3-30b-a3b-12l --routing skewed OUT.gguf

Sparse OPT models with planted activation statistics: python -m gguf_tools.synthetic opt-6.7b-slice --help
A given model at any size, with the answers it has: python -m gguf_tools.synthetic inflate --help
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from gguf_tools.progress import byte_progress
from gguf_tools.synthetic import PRESETS, SKEWED, inflate_cli, opt_cli, types_named, write


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in opt_cli.OPT_PRESETS:
        return opt_cli.main(argv)
    if argv and argv[0] == inflate_cli.NAME:
        return inflate_cli.main(argv[1:])
    parser = argparse.ArgumentParser(
        prog="python -m gguf_tools.synthetic", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="file to write")
    parser.add_argument("--preset", choices=sorted(PRESETS), required=True)
    parser.add_argument("--routing", choices=("uniform", "skewed"), default="uniform")
    parser.add_argument("--types", help="type of the FFN (Q4_0, IQ4_XS, ...), or a mix (Q4_K_M, Q5_K_M)")
    parser.add_argument("--layers", type=int, help="number of layers, instead of the preset's")
    parser.add_argument("--vocab", type=int, help="size of the vocabulary, instead of the preset's")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    model = PRESETS[options.preset]
    shape = replace(
        model.shape, n_layer=options.layers or model.shape.n_layer, n_vocab=options.vocab or model.shape.n_vocab
    )
    types = types_named(options.types) if options.types else model.types
    popularity = SKEWED if options.routing == "skewed" else 0.0
    model = replace(model, shape=shape, types=types, seed=options.seed, popularity=popularity)
    try:
        with byte_progress(f"writing {options.out.name}", model.n_bytes) as advance:
            files = write(model, options.out, n_shards=options.shards, progress=advance)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for file in files:
        print(f"{file}: {file.stat().st_size / 1e9:.3f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""python -m gguf_tools.synthetic opt-6.7b-slice OUT.gguf [--layers 8] [--type f16] [--layout plain|bundled|split]

Writes a synthetic OPT with planted activation statistics, and OUT.stream.json beside it: a stream of tokens to decode,
and what the model's neurons do on it, measured by a run in numpy. The layouts of one seed hold the same weights, so
that the plain file is the dense reference of the others.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType

from gguf_tools.synthetic.activity import LayerActivity
from gguf_tools.synthetic.codes import token_stream
from gguf_tools.synthetic.opt import OptModel, OptShape
from gguf_tools.synthetic.opt_forward import measure_activity
from gguf_tools.synthetic.opt_writer import write_opt
from llama_flash.whole_files import whole_file

OPT_PRESETS = {
    "opt-6.7b-slice": OptModel(),
    "opt-tiny": OptModel(OptShape(n_layer=3, n_embd=256, n_ff=1024, n_head=4, n_vocab=8192, n_ctx=1024)),
}
STREAM = 2048  # tokens written beside the model


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gguf_tools.synthetic", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", choices=sorted(OPT_PRESETS))
    parser.add_argument("out", type=Path, help="file to write")
    parser.add_argument("--layers", type=int, help="number of layers, instead of the preset's")
    parser.add_argument("--vocab", type=int, help="size of the vocabulary, instead of the preset's")
    parser.add_argument("--type", choices=("f16", "q8_0"), default="f16", help="of the matrices (default: f16)")
    parser.add_argument("--layout", choices=("plain", "bundled", "split"), default="plain")
    parser.add_argument("--order", choices=("random", "coactive"), default="random", help="of the neurons in the file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", type=int, default=256, metavar="TOKENS", help="0: no statistics (default: 256)")
    options = parser.parse_args(argv)
    model = OPT_PRESETS[options.preset]
    shape = replace(
        model.shape, n_layer=options.layers or model.shape.n_layer, n_vocab=options.vocab or model.shape.n_vocab
    )
    model = replace(
        model,
        shape=shape,
        kind=GGMLQuantizationType[options.type.upper()],
        seed=options.seed,
        coactive=options.order == "coactive",
    )
    try:
        write_opt(model, options.out, options.layout, progress=f"writing {options.out.name}")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.out}: {options.out.stat().st_size / 1e9:.3f} GB")
    stream = token_stream(min(STREAM, shape.n_ctx), shape.n_vocab)
    activity: list[LayerActivity] = []
    if options.measure:
        print(_HEADER)
        activity = measure_activity(options.out, stream[: options.measure], lambda il, a: print(_line(str(il), a)))
        print(_line("mean", mean_activity(activity)))
    beside = options.out.with_name(options.out.name + ".stream.json")
    with whole_file(beside) as file:
        file.write(json.dumps({"tokens": stream, "activity": [asdict(layer) for layer in activity]}).encode())
    return 0


def mean_activity(layers: Sequence[LayerActivity]) -> LayerActivity:
    """The mean over layers of all figures."""

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else None

    def means(values: Sequence[tuple[float, ...] | None]) -> tuple[float, ...] | None:
        known = [value for value in values if value is not None]
        return tuple(float(x) for x in np.mean(known, axis=0)) if known else None

    return LayerActivity(
        active=float(np.mean([layer.active for layer in layers])),
        newly_active=means([layer.newly_active for layer in layers]) or (),
        predicted=mean([layer.predicted for layer in layers]),
        newly_predicted=means([layer.newly_predicted for layer in layers]),
        recall=mean([layer.recall for layer in layers]),
        recall_of_mass=mean([layer.recall_of_mass for layer in layers]),
    )


_HEADER = f"""\
Shares of a layer's neurons, in per cent. s_agg(k): predicted (without predictors: active) for any of k tokens in a row;
new: for a token, and for none of the k before it.
layer active  predicted (recall, of mass)  {"s_agg(1) to s_agg(8)":47}  new, k = 1 to 8"""


def _line(name: str, layer: LayerActivity) -> str:
    predicted = "        -                  "
    if layer.predicted is not None and layer.recall is not None and layer.recall_of_mass is not None:
        predicted = f"{layer.predicted:9.2%} ({layer.recall:6.2%}, {layer.recall_of_mass:7.3%})"
    newly = layer.newly_active if layer.newly_predicted is None else layer.newly_predicted
    aggregated = layer.aggregated if layer.aggregated_predicted is None else layer.aggregated_predicted
    shares = [" ".join(f"{100 * x:5.2f}" for x in values) for values in (aggregated[:8], newly[1:])]
    return f"{name:>5} {layer.active:6.2%} {predicted}  {shares[0]}  {shares[1]}"

"""Figure 4: neurons used by k tokens in a row, and those that a token adds, layer by layer."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

from gguf_tools.synthetic.activity import LayerActivity
from gguf_tools.synthetic.codes import token_stream
from gguf_tools.synthetic.opt_forward import OptFile, measure_activity


def measure_windows(path: Path, n_tokens: int, report: Callable[[str], None]) -> list[LayerActivity]:
    """Runs the model in numpy over the stream that is decoded elsewhere."""
    report("a run in numpy: which neurons fire")
    stream = token_stream(n_tokens, OptFile(path).n_vocab)
    return measure_activity(path, stream, lambda il, _: report(f"a run in numpy: layer {il + 1} is done"))


def write_csv(layers: Sequence[LayerActivity], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["layer", "k", "aggregated_predicted", "aggregated_active", "new_predicted", "new_active"])
        for il, layer in enumerate(layers):
            predicted = layer.aggregated_predicted or layer.aggregated
            newly = layer.newly_predicted or layer.newly_active
            for k in range(1, len(layer.newly_active)):
                shares = (predicted[k - 1], layer.aggregated[k - 1], newly[k], layer.newly_active[k])
                writer.writerow([il + 1, k, *(f"{share:.6f}" for share in shares)])

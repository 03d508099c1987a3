"""Make the shipped flash GGUF of the OPT model: convert its Hugging Face folder, calibrate predictors, add provenance.

    .venv/bin/python ci/train/flash.py --hf DIR --export FILE --text FILE --gguf FILE

DIR is what export_hf.py wrote, --export what export.py wrote from the same run (the description is taken from it),
--text a sample of the text that the model was trained on. Runs with the project's own environment, without torch.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from gguf import GGMLQuantizationType

from gguf_tools.calibrate import calibrate
from gguf_tools.convert import convert
from gguf_tools.source import open_gguf
from gguf_tools.stream import copied, write_gguf

PROVENANCE = ("general.name", "general.author", "general.description", "general.license", "general.tags", "training.")


def make(hf: Path, export: Path, text: Path, out: Path, work: Path | None, n_tokens: int) -> None:
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        plain, calibrated = Path(folder, "bundled.gguf"), Path(folder, "calibrated.gguf")
        convert(hf, plain, kind=GGMLQuantizationType.Q8_0)
        report = calibrate(plain, text, calibrated, n_tokens=n_tokens, work=work, say=print)
        told = {key: value for key, value in open_gguf(export).values.items() if key.startswith(PROVENANCE)}
        source = open_gguf(calibrated)
        write_gguf(out, {**source.values, **told}, [copied(t) for t in source.tensors.values()], force=True)
    for layer in report.layers:
        print(
            f"layer {layer.layer}: {layer.active_share:.1%} active, {layer.predicted_share:.1%} predicted at rank "
            f"{layer.rank}, recall {layer.count_recall:.1%} of the neurons, {layer.mass_recall:.2%} of their mass"
        )
    print(f"{out}: {out.stat().st_size} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=Path, required=True)
    parser.add_argument("--export", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="folder to go on from after an interruption")
    parser.add_argument("--tokens", type=int, default=40_000)
    args = parser.parse_args()
    make(args.hf, args.export, args.text, args.gguf, args.work, args.tokens)


if __name__ == "__main__":
    main()

"""Gives a flash file its predictors: records activations on a text, fits layer by layer, and writes the file.

What lives here: the order of the work, where it is kept, and what is written. Of every eight sequences of the text,
five are fitted, two set the thresholds, and the report's figures are those of the one that is held out.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFValueType

from gguf_tools.activations import Recording, Say, record, remove_recording
from gguf_tools.errors import GgufToolsError
from gguf_tools.fitting import Settings, StoredPredictor, fit
from gguf_tools.format import ALIGNMENT, PredictorInfo, bias_name, dimensions_of, weight_name
from gguf_tools.measure import LayerReport, layer_report
from gguf_tools.progress import count_progress
from gguf_tools.source import Bytes, KeyValue
from gguf_tools.sparse_model import SparseModel
from gguf_tools.stream import PlannedTensor, copied, write_gguf
from llama_flash.whole_files import whole_file

TOKENS = 20_000
_VERSION = 1
_PREDICTOR = re.compile(r"blk\.[0-9]+\.ffn_predictor(?:_in|_out)?\.\w+")


@dataclass(frozen=True)
class CalibrationReport:
    """What `calibrate` found, on tokens that nothing was fitted to."""

    model: str
    activation: str
    recall: float  # that was aimed at
    predictor_type: str
    fitted_tokens: int
    threshold_tokens: int
    held_out_tokens: int
    layers: list[LayerReport]


def calibrate(
    model: str | os.PathLike[str],
    text: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    n_tokens: int = TOKENS,
    settings: Settings | None = None,
    work: str | os.PathLike[str] | None = None,
    write: bool = True,
    n_threads: int | None = None,
    force: bool = False,
    say: Say | None = None,
) -> CalibrationReport:
    """Fits predictors to a flash file and writes it with them; predictors that it has are replaced.

    out: the file to write; None: the model itself, which is replaced when all is done. work: folder for activations and
    finished layers, kept; an interrupted run goes on from it, and `reorder` can use it. None: beside the file that is
    written, removed at the end. write: False only reports, for which ordinary GGUF files will do too. n_threads: of the
    engine; None: one per CPU.

    Raises:
        GgufToolsError: not a flash file, not a sparse model, a text that is too short, a work folder of another model
            or text, or a file that cannot be written.
        OSError: a file cannot be opened.
    """
    path, settings = Path(model), settings or Settings()
    subject = SparseModel.open(path)
    target = path if out is None else Path(out)
    if write:
        _check_writable(subject, target, in_place=out is None, force=force)
    folder = target.with_name(f"{target.name}.calibration") if work is None else Path(work)
    recording = record(path, Path(text), folder, n_tokens=n_tokens, n_threads=n_threads, say=say)
    split = _Split.of(recording)
    done = {}
    with count_progress(f"fitting {path.name}" if say else None, len(subject.layers), "layers") as advance:
        for il in subject.layers:
            done[il] = _done(subject, recording, split, il, settings, say)
            advance(1)
    report = CalibrationReport(
        model=str(path),
        activation=str(subject.activation),
        recall=settings.recall,
        predictor_type=settings.kind.name,
        fitted_tokens=int(split.fitted.sum()),
        threshold_tokens=int(split.thresholds.sum()),
        held_out_tokens=int(split.held_out.sum()),
        layers=[layer.report for layer in done.values()],
    )
    if write:
        write_gguf(
            target,
            _values(subject, report),
            list(_tensors(subject, done)),
            alignment=ALIGNMENT,
            progress=None if say is None else f"writing {target.name}",
            force=force or out is None,
            inputs=() if out is None else subject.source.files,
        )
    if work is None:
        remove_recording(folder, [layer.file for layer in done.values()])
    return report


def _check_writable(subject: SparseModel, target: Path, *, in_place: bool, force: bool) -> None:
    """What can be known before hours of work."""
    if not subject.is_flash:
        raise GgufToolsError("has no bundles, and predictors go with them: bundle it first", file=subject.path)
    if in_place and len(subject.source.files) > 1:
        raise GgufToolsError("is one of several shards: name a file to write", file=target)
    if not in_place and target.exists() and not force:
        raise GgufToolsError("is already there (--force replaces it)", file=target)
    if not target.parent.is_dir():
        raise GgufToolsError(f"the folder {target.parent} does not exist", file=target)


@dataclass(frozen=True)
class _Split:
    """Which tokens of a recording are for what: [n_tokens] each."""

    fitted: npt.NDArray[np.bool_]
    thresholds: npt.NDArray[np.bool_]
    held_out: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, recording: Recording) -> _Split:
        turn = recording.sequence_of_token % 8
        thresholds, held_out = np.isin(turn, (2, 5)), turn == 7
        return cls(~(thresholds | held_out), thresholds, held_out)


@dataclass(frozen=True)
class _Done:
    """A layer that is done: its report, and the file that holds its predictor."""

    file: Path
    report: LayerReport

    def load(self) -> StoredPredictor:
        with np.load(self.file) as stored:
            kinds = [GGMLQuantizationType(int(number)) for number in stored["kinds"]]
            return StoredPredictor(stored["input"], stored["output"], stored["bias"], kinds[0], kinds[1])


def _done(
    subject: SparseModel, recording: Recording, split: _Split, il: int, settings: Settings, say: Say | None
) -> _Done:
    """Fits a layer, or takes what an earlier run with the same settings has left."""
    file = recording.folder / f"layer-{il:05d}.npz"
    plain = asdict(settings) | {"kind": settings.kind.name}
    key = json.dumps({"version": _VERSION, "model": recording.model, "tokens": recording.tokens, **plain})
    if file.exists():
        with np.load(file) as stored:
            if str(stored["settings"]) == key:
                return _Done(file, LayerReport(**json.loads(str(stored["report"]))))
    layer = recording.layer(il)
    if layer.n_ff != subject.layers[il].n_ff:
        raise GgufToolsError(f"{layer.n_ff} neurons of layer {il} were recorded", file=subject.path)
    found = fit(
        subject, il, layer.select(split.fitted), layer.select(split.thresholds), settings, sequence=recording.sequence
    )
    report = layer_report(
        il,
        layer.select(split.held_out),
        subject.down_norms(il),
        None if found is None else found.predictor,
        sequence=recording.sequence,
        record_bytes=subject.bundle.record_bytes,
        predictor_bytes=0 if found is None else found.n_bytes,
    )
    report = replace(report, refined=found is not None and found.refined)
    arrays: dict[str, npt.NDArray[Any]] = {"settings": np.array(key), "report": np.array(json.dumps(asdict(report)))}
    if found is not None:
        arrays |= {"input": found.input, "output": found.output, "bias": found.bias}
        arrays["kinds"] = np.array([int(found.input_kind), int(found.output_kind)])

    with whole_file(file) as stream:
        np.savez(stream, allow_pickle=False, **arrays)
    if say:
        say(
            f"layer {il}: {report.active_share:.1%} active, {report.predicted_share:.1%} predicted at rank "
            f"{report.rank}, recall {report.mass_recall:.4f}"
        )
    return _Done(file, report)


def _values(subject: SparseModel, report: CalibrationReport) -> dict[str, KeyValue]:
    values = {key: value for key, value in subject.source.values.items() if not key.startswith("flash.predictor.")}
    by_layer = {layer.layer: layer for layer in report.layers}
    if not any(layer.rank for layer in report.layers):
        return values
    n_layer = dimensions_of(values, subject.path).n_layer
    ranks = tuple(by_layer[il].rank if il in by_layer else 0 for il in range(n_layer))

    def measured(name: str) -> KeyValue:
        figures = [float(getattr(by_layer[il], name)) if il in by_layer else 1.0 for il in range(n_layer)]
        return KeyValue(figures, GGUFValueType.ARRAY, GGUFValueType.FLOAT32)

    return {
        **values,
        **PredictorInfo(ranks, report.recall).to_values(),
        "flash.predictor.active_share": measured("active_share"),
        "flash.predictor.predicted_share": measured("predicted_share"),
        "flash.predictor.measured_recall": measured("mass_recall"),
    }


def _tensors(subject: SparseModel, done: dict[int, _Done]) -> Iterator[PlannedTensor]:
    """All tensors in their order; a layer's predictor after its bundle."""
    layers = {weight_name(il, "bundle"): il for il in done}
    for name, tensor in subject.source.tensors.items():
        if _PREDICTOR.fullmatch(name):
            continue
        yield copied(tensor)
        il = layers.get(name, -1)
        if il >= 0 and done[il].report.rank:
            yield from _predictor_tensors(il, done[il], tensor.shape[1], dimensions_of(subject.source.values).n_embd)


def _predictor_tensors(il: int, layer: _Done, n_ff: int, n_embd: int) -> Iterator[PlannedTensor]:
    stored, rank = layer.load(), layer.report.rank

    def chunks(rows: npt.NDArray[Any]) -> Iterator[Bytes]:
        yield np.ascontiguousarray(rows).view(np.uint8)

    names = (weight_name(il, "predictor_in"), weight_name(il, "predictor_out"), bias_name(il, "predictor"))
    yield PlannedTensor(names[0], (n_embd, rank), stored.input_kind, lambda: chunks(stored.input))
    yield PlannedTensor(names[1], (rank, n_ff), stored.output_kind, lambda: chunks(stored.output))
    yield PlannedTensor(names[2], (n_ff,), GGMLQuantizationType.F32, lambda: chunks(stored.bias))

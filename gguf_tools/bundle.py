"""Stores the feed-forward weights of a model neuron by neuron: an ordinary model becomes a flash file.

What lives here: which models can be bundled, which types the parts get, and the bytes of the records. Rows of up and
gate whose type stays are copied bit by bit; down is dequantised, transposed and quantised along n_embd.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from gguf_tools.errors import GgufToolsError
from gguf_tools.format import ACTIVATIONS, ALIGNMENT, LAYOUTS, Activation, BundleLayout, read_flash
from gguf_tools.neurons import (
    MEMORY,
    Neurons,
    Transposed,
    all_rows_as,
    dense_layers,
    expert_layers,
    row_cost,
    row_runs,
    rows_as,
)
from gguf_tools.source import Bytes, KeyValue, Source, SourceTensor, open_gguf
from gguf_tools.stream import PlannedTensor, copied, write_gguf
from gguf_tools.types import FLASH, PLAIN_TYPES, quantisable

# what the graphs of llama.cpp (src/models/) compute, where that is ReLU-like
_ACTIVATION_OF_ARCHITECTURE = {
    "arcee": "relu2",
    "jais2": "relu2",
    "nemotron": "relu2",
    "nemotron_h": "relu2",
    "opt": "relu",
    "plm": "relu2",
    "smallthinker": "reglu",
}
# those of them whose experts are
_RELU_EXPERTS = frozenset({"smallthinker"})
# a factor or a norm between up and down, or a scale beside a matrix: records have no place for them
_UNSUPPORTED = re.compile(r"blk\.(\d+)\.(?:ffn_sub_norm\..*|ffn_act\..*|ffn_(?:gate|up|down)\.(?!weight$|bias$).*)")
_UNSUPPORTED_OF_EXPERTS = re.compile(r"blk\.\d+\.ffn_(?:gate_up_exps\..*|(?:gate|up|down)_exps\.(?!weight$).*)")
_EXPERTS = re.compile(r"blk\.\d+\.ffn_\w+_exps\.weight")


@dataclass(frozen=True)
class BundlePlan:
    """A flash file to be written. It is also what `read_flash` reads."""

    layout: BundleLayout
    activation: Activation
    values: dict[str, KeyValue]
    planned: list[PlannedTensor]
    n_ff: dict[int, int]  # neurons of each layer that is bundled; of a layer of experts: of each expert
    n_expert: dict[int, int]  # experts of each layer of experts that is bundled
    notes: list[str] = field(default_factory=list)  # what a user should know about the choices made

    @property
    def tensors(self) -> dict[str, PlannedTensor]:
        return {tensor.name: tensor for tensor in self.planned}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "layout": self.layout.layout,
            "record_bytes": self.layout.record_bytes,
            "parts": [{"name": part.name, "type": part.kind.name} for part in self.layout.parts],
            "layers": [{"layer": il, "neurons": n, "experts": self.n_expert.get(il, 0)} for il, n in self.n_ff.items()],
            "activation": str(self.activation),
            "notes": self.notes,
        }


def bundle(
    model: Source | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    kind: GGMLQuantizationType | None = None,
    down_kind: GGMLQuantizationType | None = None,
    layout: str = "bundled",
    activation: Activation | None = None,
    memory: int = MEMORY,
    force: bool = False,
    progress: str | None = None,
) -> BundlePlan:
    """Writes a model as a flash file: its feed-forward blocks as neuron bundles, all else byte for byte.

    These are the dense ones, and the experts of architectures whose experts are ReLU-like (smallthinker).

    model: a GGUF file, the first of its shards, or a Source. kind: type of all parts; None keeps that of up and gate.
    down_kind: type of down; None: as the others. layout: bundled or split. activation: for models whose file does not
    say that they are relufied. memory: bytes to work in, besides what Python and the engine take. force: replaces a
    file that is there. progress: what to call the work on stderr; None shows none. Returns what was written.

    Raises:
        GgufToolsError: the model cannot be bundled (it says why), is damaged, or the file cannot be written.
        OSError: the model's file cannot be opened.
    """
    inputs: Sequence[Path] = ()
    file: Path | str = ""
    if isinstance(model, (str, os.PathLike)):
        file = Path(model)
        model = open_gguf(file)
        inputs = model.files
    plan = plan_bundle(
        model, kind=kind, down_kind=down_kind, layout=layout, activation=activation, memory=memory, file=file
    )
    write_gguf(out, plan.values, plan.planned, alignment=ALIGNMENT, progress=progress, force=force, inputs=inputs)
    return plan


def plan_bundle(
    source: Source,
    *,
    kind: GGMLQuantizationType | None = None,
    down_kind: GGMLQuantizationType | None = None,
    layout: str = "bundled",
    activation: Activation | None = None,
    memory: int = MEMORY,
    file: Path | str = "",
) -> BundlePlan:
    """What `bundle` would write. Arguments and errors are those of `bundle`; file: what errors call the model."""
    if layout not in LAYOUTS:
        raise GgufToolsError(f"unknown layout {layout!r}, known: {', '.join(LAYOUTS)}")
    if read_flash(source, file):
        raise GgufToolsError("is bundled already: unbundle it first", file=file)
    arch = source.values.get("general.architecture")
    if arch is None or arch.type != GGUFValueType.STRING:
        raise GgufToolsError("is missing", file=file, key="general.architecture")
    _refuse_other_models(source, arch.value, file)
    layers = dense_layers(source, file)
    if arch.value in _RELU_EXPERTS:
        layers = dict(sorted((layers | expert_layers(source, file)).items()))
    n_expert = {il: neurons.n_expert for il, neurons in layers.items() if neurons.n_expert}
    if n_expert and layout != "bundled":
        raise GgufToolsError(f"layout {layout} is for dense layers only: experts are bundled", file=file)
    gated = _gated(layers, file)
    activation = _activation(source, arch.value, activation, gated=gated, file=file)
    kinds, notes = _kinds(layers, kind, down_kind, file)
    bundles = BundleLayout.of(kinds, layers[min(layers)].parts["up"].shape[0], layout)
    values = source.values | bundles.to_values() | activation.to_values(arch.value)
    if not PLAIN_TYPES.issuperset(kinds.values()):
        version = KeyValue(int(gguf.GGML_QUANT_VERSION), GGUFValueType.UINT32)
        values.setdefault("general.quantization_version", version)
    n_ff = {il: neurons.n_ff for il, neurons in layers.items()}
    plan = BundlePlan(bundles, activation, values, _planned(source, layers, bundles, memory), n_ff, n_expert, notes)
    read_flash(plan, file)  # a model's own contradictions (shapes of biases, say) are found before anything is written
    return plan


def _refuse_other_models(source: Source, arch: str, file: Path | str) -> None:
    weights = re.compile(r"blk\.\d+\.ffn_(?:up|down)\.weight")
    experts = any(_EXPERTS.fullmatch(name) for name in source.tensors)
    if not any(weights.fullmatch(name) for name in source.tensors) and not (experts and arch in _RELU_EXPERTS):
        if experts:
            raise GgufToolsError(
                f"{arch} is a mixture of experts without dense feed-forward blocks, and its experts are not ReLU-like "
                f"(those of {', '.join(sorted(_RELU_EXPERTS))} are), so no neuron could be skipped: experts stream "
                "from the file as it is, there is nothing to bundle",
                file=file,
            )
        raise GgufToolsError(f"{arch} has no dense feed-forward blocks (blk.N.ffn_up.weight)", file=file)
    for name in source.tensors:
        match = _UNSUPPORTED.fullmatch(name)
        dense = match and f"blk.{match[1]}.ffn_up.weight" in source.tensors
        if dense or (arch in _RELU_EXPERTS and _UNSUPPORTED_OF_EXPERTS.fullmatch(name)):
            raise GgufToolsError("has no place in a bundle, so this model cannot be bundled", file=file, tensor=name)


def _gated(layers: dict[int, Neurons], file: Path | str) -> bool:
    gated = {il: "gate" in neurons.parts for il, neurons in layers.items()}
    if len(set(gated.values())) > 1:
        without = next(il for il, gate in gated.items() if not gate)
        name = layers[without].name("gate")
        raise GgufToolsError("is missing, but other layers have a gate", file=file, tensor=name)
    return gated[min(gated)]


def _activation(source: Source, arch: str, asked: Activation | None, *, gated: bool, file: Path | str) -> Activation:
    activation = Activation.from_values(source.values, arch, file)
    if activation is None and arch in _ACTIVATION_OF_ARCHITECTURE:
        activation = Activation(_ACTIVATION_OF_ARCHITECTURE[arch])
    if activation is not None and asked is not None and asked != activation:
        raise GgufToolsError(f"its activation is {activation}, not {asked}", file=file)
    activation = activation or asked
    if activation is None:
        raise GgufToolsError(
            f"the activation of architecture {arch} is not known to be ReLU-like, so no neuron could be skipped. If "
            f"this model was relufied by its maker, say how: --activation {'|'.join(ACTIVATIONS)}",
            file=file,
        )
    if not activation.fits(gated=gated):
        fitting = ", ".join(name for name, gates in ACTIVATIONS.items() if gated in gates)
        raise GgufToolsError(
            f"{activation.name} is not an activation for a model {'with' if gated else 'without'} a gate "
            f"(those are: {fitting})",
            file=file,
        )
    return activation


def _kinds(
    layers: dict[int, Neurons],
    kind: GGMLQuantizationType | None,
    down_kind: GGMLQuantizationType | None,
    file: Path | str,
) -> tuple[dict[str, GGMLQuantizationType], list[str]]:
    """Type of each part, and what is to be said about it."""
    rows = [tensor for neurons in layers.values() for part, tensor in neurons.parts.items() if part != "down"]
    downs = [_matrix(neurons.parts["down"]) for neurons in layers.values()]
    found = sorted({tensor.kind for tensor in rows})
    if kind is None and len(found) > 1:
        other = next(tensor for tensor in rows if tensor.kind != rows[0].kind)
        raise GgufToolsError(
            f"is {other.kind.name}, {rows[0].name} is {rows[0].kind.name}; all records of a file have the same types: "
            "choose one with --type",
            file=file,
            tensor=other.name,
        )
    kind = found[0] if kind is None else kind  # F32 is 0
    n_embd = rows[0].shape[0]
    notes: list[str] = []
    row_kind = kind if found == [kind] else _fitting(kind, n_embd, notes)
    if found != [row_kind]:
        notes.append(f"gate and up: {_names(found)} -> {row_kind.name}")
    column_kind = _fitting(row_kind if down_kind is None else down_kind, n_embd, notes)
    matrices = sorted({tensor.kind for tensor in downs})
    if matrices != [column_kind] or column_kind not in PLAIN_TYPES:
        anew = " along n_embd" if column_kind not in PLAIN_TYPES else ""
        notes.append(f"down: {_names(matrices)} -> {column_kind.name}{anew}")
    parts = dict.fromkeys(layers[min(layers)].parts, row_kind)
    return parts | {"down": column_kind}, notes


def _matrix(down: SourceTensor) -> SourceTensor:
    return down.matrix if isinstance(down, Transposed) else down


def _fitting(kind: GGMLQuantizationType, n_embd: int, notes: list[str]) -> GGMLQuantizationType:
    chosen = quantisable(kind, n_embd)
    if chosen != kind:
        notes.append(
            f"{kind.name} does not fit rows of {n_embd} elements, or needs an importance matrix: {chosen.name}"
        )
    return chosen


def _names(kinds: Sequence[GGMLQuantizationType]) -> str:
    return ", ".join(kind.name for kind in kinds)


def _planned(source: Source, layers: dict[int, Neurons], bundles: BundleLayout, memory: int) -> list[PlannedTensor]:
    """All tensors, in the source's order; a bundle stands where the first of its parts stood."""
    replaced = {neurons.name(part): neurons for neurons in layers.values() for part in neurons.parts}
    planned: dict[str, PlannedTensor] = {}
    for name, tensor in source.tensors.items():
        if name not in replaced:
            planned[name] = copied(tensor)
            continue
        neurons = replaced[name]
        bundle = neurons.name("bundle")
        shape = (bundles.record_bytes, *neurons.parts["up"].shape[1:])
        chunks = partial(records, neurons, bundles, memory)
        planned.setdefault(bundle, PlannedTensor(bundle, shape, FLASH, chunks))
    return list(planned.values())


def records(neurons: Neurons, bundles: BundleLayout, memory: int = MEMORY) -> Iterator[Bytes]:
    """The bytes of a layer's bundle, in order, made in about `memory` bytes. Raises what `rows_as` does."""
    parts = [(neurons.parts[part.name], part.kind) for part in bundles.parts]
    if bundles.layout == "split":
        for tensor, kind in parts:
            yield from all_rows_as(tensor, kind, memory)
        return
    cost = 2 * bundles.record_bytes + sum(row_cost(tensor, kind) for tensor, kind in parts)
    for rows in row_runs([tensor for tensor, _ in parts], cost, memory):
        yield np.concatenate([rows_as(tensor, kind, rows.start, rows.stop) for tensor, kind in parts], axis=1)

"""Makes a GGUF file of a Hugging Face checkpoint, bundled or ordinary.

What lives here: which type each tensor gets. Not here: what a checkpoint means (huggingface/), bundling (bundle.py),
writing (stream.py). Nothing is held whole: rows are read, converted and written.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace

import gguf
from gguf import GGMLQuantizationType, LlamaFileType

from gguf_tools import ggml
from gguf_tools.bundle import BundlePlan, plan_bundle
from gguf_tools.errors import GgufToolsError
from gguf_tools.format import ALIGNMENT
from gguf_tools.huggingface import HuggingFaceSource, open_huggingface
from gguf_tools.huggingface.plan import uint32
from gguf_tools.neurons import MEMORY, rows_as
from gguf_tools.source import Bytes, Floats, SourceTensor, raw_row_bytes, row_length
from gguf_tools.stream import copied, write_gguf
from gguf_tools.types import quantisable

_K = GGMLQuantizationType

# what a checkpoint can be converted to, and what the file says of itself
FILE_TYPES = {
    _K.F32: LlamaFileType.ALL_F32,
    _K.F16: LlamaFileType.MOSTLY_F16,
    _K.BF16: LlamaFileType.MOSTLY_BF16,
    _K.Q8_0: LlamaFileType.MOSTLY_Q8_0,
    _K.Q4_0: LlamaFileType.MOSTLY_Q4_0,
    _K.Q4_K: LlamaFileType.MOSTLY_Q4_K_S,
}
_SMALL = frozenset({_K.Q4_0, _K.Q4_K})  # too coarse for the output, as llama.cpp has it (src/llama-quant.cpp)
_FFN_WEIGHT = re.compile(r"blk\.\d+\.ffn_(?:gate|up|down)\.weight")


@dataclass(frozen=True)
class Retyped:
    """A SourceTensor: another one in another type."""

    tensor: SourceTensor
    kind: GGMLQuantizationType

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    def raw(self, start: int, stop: int) -> Bytes:
        return rows_as(self.tensor, self.kind, start, stop).reshape(stop - start, raw_row_bytes(self))

    def floats(self, start: int, stop: int) -> Floats:
        return ggml.dequantize(self.raw(start, stop), self.kind)


@dataclass(frozen=True)
class Conversion:
    """What was written."""

    source: HuggingFaceSource  # the model in its new types, except for what is bundled
    bundles: BundlePlan | None  # None: an ordinary file


def convert(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    kind: GGMLQuantizationType = _K.F16,
    bundled: bool = True,
    memory: int = MEMORY,
    force: bool = False,
    progress: str | None = None,
) -> Conversion:
    """Writes a checkpoint as a GGUF file.

    kind: type of the matrices, one of FILE_TYPES; vectors and positions are F32. bundled: as a flash file; otherwise an
    ordinary one. memory: bytes to work in, besides what Python and the engine take. force: replaces a file that is
    there. progress: what to call the work on stderr; None shows none.

    Raises:
        GgufToolsError: what `open_huggingface` raises; every neuron is always active, so that there is nothing to
            bundle; values do not fit the type; the file cannot be written.
        OSError: a file of the checkpoint cannot be opened.
    """
    if kind not in FILE_TYPES:
        known = ", ".join(one.name.lower() for one in FILE_TYPES)
        raise GgufToolsError(f"a checkpoint is not converted to {kind.name}, but to {known}")
    source = open_huggingface(directory)
    if bundled and source.activation is None:
        raise GgufToolsError(
            f"activation {source.activation_name!r} keeps every neuron active: nothing to bundle "
            "(--no-bundle writes an ordinary GGUF)",
            file=source.directory,
        )
    source = _retyped(source, kind, keep_ffn=bundled)
    inputs = [file for file in source.directory.iterdir() if file.is_file()]
    if not bundled:
        planned = [copied(tensor) for tensor in source.tensors.values()]
        write_gguf(out, source.values, planned, alignment=32, progress=progress, force=force, inputs=inputs)
        return Conversion(source, None)
    plan = plan_bundle(source, kind=kind, memory=memory, file=source.directory)
    write_gguf(out, plan.values, plan.planned, alignment=ALIGNMENT, progress=progress, force=force, inputs=inputs)
    return Conversion(source, plan)


def _retyped(source: HuggingFaceSource, kind: GGMLQuantizationType, *, keep_ffn: bool) -> HuggingFaceSource:
    """keep_ffn: those weights stay as they are; a bundle is made of them in its own way."""
    output = "output.weight" if "output.weight" in source.tensors else "token_embd.weight"
    tensors: dict[str, SourceTensor] = {}
    for name, tensor in source.tensors.items():
        wanted = _kind_of(tensor, kind, is_output=name == output)
        kept = wanted == tensor.kind or (keep_ffn and _FFN_WEIGHT.fullmatch(name))
        tensors[name] = tensor if kept else Retyped(tensor, wanted)
    values = source.values | {
        "general.file_type": uint32(int(FILE_TYPES[kind])),
        "general.quantization_version": uint32(int(gguf.GGML_QUANT_VERSION)),
    }
    return replace(source, values=values, tensors=tensors)


def _kind_of(tensor: SourceTensor, kind: GGMLQuantizationType, *, is_output: bool) -> GGMLQuantizationType:
    """As llama.cpp has it: vectors are F32, positions are not worth less, the output gets more than four bits."""
    if len(tensor.shape) == 1 or tensor.name == "position_embd.weight":
        return _K.F32
    return quantisable(_K.Q6_K if is_output and kind in _SMALL else kind, row_length(tensor))

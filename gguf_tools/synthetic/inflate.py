"""A model of any size that answers what a given one answers: its feed-forward blocks get neurons that say nothing.

A neuron whose column of down is zero adds zero to the output, whatever its rows of gate and up are. So text, routing
and what drafts are worth stay the real model's, while the bytes to be read grow. The added rows are the model's own
neurons, drawn anew and mixed, so that they are of the same type and size, compute what real ones compute, and hardly
two are alike (rows of a single block, as in tiny models, cannot be mixed). Nothing here holds a tensor: rows are copied
and made while they are written.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFValueType

from gguf_tools import ggml
from gguf_tools.errors import GgufToolsError
from gguf_tools.format import read_flash
from gguf_tools.idle import FFN
from gguf_tools.source import (
    Bytes,
    GgufSource,
    KeyValue,
    SourceTensor,
    data_bytes,
    open_gguf,
    raw_row_bytes,
    row_blocks,
    row_count,
    row_length,
)
from gguf_tools.stream import PlannedTensor, copied, write_gguf
from gguf_tools.synthetic.weights import rng_for
from gguf_tools.types import PLAIN_TYPES, block_of, row_bytes

_POOL = 16 << 20  # bytes of a matrix that added rows are drawn from
_MIXED = 1 / 8  # share of an added row's blocks that come from yet another neuron, one at least
_ROWS = 32  # neurons are added in multiples of it: kernels work on as many rows at once

# what else a feed-forward block has and keeps as it is: as wide as the embedding, or as many as the experts
_BESIDE = re.compile(
    r"blk\.\d+\.(?:(?:post_|pre_)?ffn_norm(?:_\d|_exps)?|ffn_(?:post|pre)_norm(?:_\d)?|ffn_gate_inp(?:_shexp)?"
    r"|ffn_(?:latent|routed)_(?:down|up)|ffn_routed_norm)\.\w+"
)
_LENGTHS = tuple(
    f"{kind}feed_forward_length" for kind in ("", "expert_", "expert_shared_", "expert_chunk_")
)  # keys, without the architecture
# these look at all neurons of a token at once, so that more of them change the function
_ACROSS_NEURONS = {"gemma3n": "keeps the neurons that stand out among all of a token"}

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Inflated:
    """What `inflate` wrote."""

    bytes: int  # of all tensors' data
    bytes_before: int
    lengths: dict[str, tuple[int, int]]  # neurons of each block, or of each of its experts, before and after


@dataclass
class _Block:
    """The feed-forward block of a layer, or its experts, or its shared expert."""

    name: str  # blk.0.ffn, with _exps, _shexp
    n_ff: int
    down: SourceTensor
    inputs: dict[str, SourceTensor] = field(default_factory=dict)  # gate, up or gate_up
    biases: dict[str, SourceTensor] = field(default_factory=dict)  # of the inputs
    extra: int = 0  # neurons to be added

    @property
    def n_expert(self) -> int:
        return math.prod(self.down.shape[2:])

    @property
    def step(self) -> int:
        """Neurons that can be added without cutting a block of down's rows."""
        return math.lcm(block_of(self.down.kind)[0], _ROWS)

    def parts(self, tensor: SourceTensor) -> int:
        """Matrices of n_ff rows that lie one after the other in a tensor: two where gate and up are one tensor."""
        return int(tensor.shape[1]) // self.n_ff

    @property
    def drawn_from(self) -> int:
        """The first so many neurons of each expert."""
        return max(1, min(self.n_ff, _POOL // max(raw_row_bytes(tensor) for tensor in self.inputs.values())))

    def drawn(self, expert: int) -> Numbers:
        """Of which neuron each added one is made: the same in gate, up and their biases. [extra]"""
        return rng_for(expert, self.name).integers(0, self.drawn_from, self.extra)

    def added_bytes(self, extra: int) -> int:
        """What that many neurons more take."""
        rows = sum(self.parts(tensor) * raw_row_bytes(tensor) for tensor in self.inputs.values()) * self.n_expert
        biases = sum(data_bytes(bias) // self.n_ff for bias in self.biases.values())
        return (rows + biases) * extra + row_count(self.down) * row_bytes(self.down.kind, extra)


def inflate(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: int,
    *,
    force: bool = False,
    progress: str | None = None,
) -> Inflated:
    """Writes `model` with so many more neurons that its tensors take about `to` bytes.

    All feed-forward blocks grow by the same factor, experts within each expert; the key-values of their lengths follow.
    to: bytes; met as nearly as whole blocks of the types of down allow. The same model and size give the same file.
    force: replaces a file that is there. progress: what to call the work on stderr; None shows none.

    Raises:
        GgufToolsError: damaged, a flash file, no feed-forward blocks, some that more neurons would change or that are
            not known here, `to` is not more than the model has, or the file cannot be written.
        OSError: the file cannot be opened.
    """
    path = Path(model)
    source = open_gguf(path)
    architecture = _architecture(source, path)
    blocks = _blocks(source, path)
    grown = _grow(blocks, source, architecture, to, path)
    tensors = {tensor.name: copied(tensor) for tensor in source.tensors.values()}
    for block in grown:
        tensors |= _planned(block)
    values = _longer(source.values, architecture, grown[0].n_ff, grown[0].n_ff + grown[0].extra, path)
    write_gguf(
        out,
        values,
        [tensors[name] for name in source.tensors],
        alignment=source.alignment,
        progress=progress,
        force=force,
        inputs=source.files,
    )
    return Inflated(
        bytes=sum(map(data_bytes, tensors.values())),
        bytes_before=sum(map(data_bytes, source.tensors.values())),
        lengths={block.name: (block.n_ff, block.n_ff + block.extra) for block in grown},
    )


def _architecture(source: GgufSource, path: Path) -> str:
    if read_flash(source, path) is not None:
        raise GgufToolsError("is a flash file: make an ordinary one of it (unbundle), inflate that", file=path)
    value = source.values.get("general.architecture")
    if value is None or value.type != GGUFValueType.STRING:
        raise GgufToolsError("is missing", file=path, key="general.architecture")
    architecture = str(value.value)
    if reason := _ACROSS_NEURONS.get(architecture):
        raise GgufToolsError(f"{architecture} {reason}: with more neurons it would answer otherwise", file=path)
    return architecture


def _blocks(source: GgufSource, path: Path) -> list[_Block]:
    """All feed-forward blocks. Raises GgufToolsError for tensors whose place in one is not known."""
    found: dict[str, dict[str, SourceTensor]] = {}
    for name, tensor in source.tensors.items():
        if match := FFN.fullmatch(name):
            found.setdefault(f"{match[1]}.ffn{match[3]}", {})[f"{match[2]}.{match[4]}"] = tensor
        elif "ffn" in name and not _BESIDE.fullmatch(name):
            raise GgufToolsError("its place in the feed-forward block is not known here", file=path, tensor=name)
    if not found:
        raise GgufToolsError("has no feed-forward blocks that could get more neurons", file=path)
    return [_block(name, tensors, path) for name, tensors in found.items()]


def _block(name: str, tensors: Mapping[str, SourceTensor], path: Path) -> _Block:
    down = tensors.get("down.weight")
    if down is None:
        raise GgufToolsError("has no down", file=path, tensor=name)
    if len(down.shape) < 2:
        raise GgufToolsError(f"has the shape {list(down.shape)}", file=path, tensor=down.name)
    block = _Block(name, down.shape[0], down)
    for key, tensor in tensors.items():
        part, _, what = key.partition(".")
        if what == "weight" and part != "down":
            if not _fits(block, tensor.shape[1:]):
                raise _unfit(block, tensor, path)
            block.inputs[part] = tensor
        elif what == "bias" and part != "down":
            if not _fits(block, tensor.shape) or tensor.kind not in PLAIN_TYPES:
                raise _unfit(block, tensor, path)
            block.biases[part] = tensor
        elif what.endswith("scale") and row_count(tensor) * row_length(tensor) not in (1, block.n_expert):
            raise _unfit(block, tensor, path)
    if not block.inputs:
        raise GgufToolsError("has no up", file=path, tensor=name)
    return block


def _fits(block: _Block, shape: tuple[int, ...]) -> bool:
    """Whether a shape is that of one or two rows of neurons for each expert."""
    return bool(shape) and shape[0] in (block.n_ff, 2 * block.n_ff) and math.prod(shape[1:]) == block.n_expert


def _unfit(block: _Block, tensor: SourceTensor, path: Path) -> GgufToolsError:
    return GgufToolsError(
        f"is {tensor.kind.name} {list(tensor.shape)}, which does not go with the {block.n_ff} neurons of "
        f"{block.down.name}",
        file=path,
        tensor=tensor.name,
    )


def _grow(blocks: list[_Block], source: GgufSource, architecture: str, to: int, path: Path) -> list[_Block]:
    """The blocks with their `extra`: all by one factor, so that what the engine makes of one length stays true."""
    lengths = [block.n_ff for block in blocks]
    for _, value in _length_values(source.values, architecture):
        lengths += [n for n in (value.value if value.type == GGUFValueType.ARRAY else [value.value]) if n]
    common = math.gcd(*lengths)
    step = math.lcm(*(block.step // math.gcd(block.step, block.n_ff // common) for block in blocks))
    before = sum(map(data_bytes, source.tensors.values()))
    of_a_step = sum(block.added_bytes(block.n_ff // common * step) for block in blocks)
    steps = round((to - before) / of_a_step)
    if steps < 1:
        raise GgufToolsError(
            f"has {before / 1e6:.1f} MB of weights already, and gets at least {of_a_step / 1e6:.1f} MB more: "
            f"{to / 1e6:.1f} MB are too few",
            file=path,
        )
    if max(lengths) // common * step * steps >= 1 << 31:
        raise GgufToolsError(f"cannot have so many neurons that it takes {to / 1e9:.1f} GB", file=path)
    return [replace(block, extra=block.n_ff // common * step * steps) for block in blocks]


def _length_values(values: Mapping[str, KeyValue], architecture: str) -> Iterator[tuple[str, KeyValue]]:
    for name in _LENGTHS:
        key = f"{architecture}.{name}"
        if key in values:
            yield key, values[key]


def _longer(
    values: Mapping[str, KeyValue], architecture: str, before: int, after: int, path: Path
) -> dict[str, KeyValue]:
    """Key-values with all lengths times after / before, which is a whole number for each."""
    changed = dict(values)
    for key, value in _length_values(values, architecture):
        if value.type == GGUFValueType.ARRAY:
            changed[key] = replace(value, value=[n * after // before for n in value.value])
        else:
            changed[key] = replace(value, value=value.value * after // before)
    if len(changed) == len(values) and changed == dict(values):
        raise GgufToolsError("is missing", file=path, key=f"{architecture}.feed_forward_length")
    return changed


def _planned(block: _Block) -> dict[str, PlannedTensor]:
    """The block's tensors as they are written."""
    n_ff = block.n_ff + block.extra
    planned = [PlannedTensor(block.down.name, (n_ff, *block.down.shape[1:]), block.down.kind, partial(_columns, block))]
    for tensor in block.inputs.values():
        shape = (tensor.shape[0], block.parts(tensor) * n_ff, *tensor.shape[2:])
        planned.append(PlannedTensor(tensor.name, shape, tensor.kind, partial(_rows, block, tensor)))
    for tensor in block.biases.values():
        shape = (tensor.shape[0] // block.n_ff * n_ff, *tensor.shape[1:])
        planned.append(PlannedTensor(tensor.name, shape, tensor.kind, partial(_bias, block, tensor)))
    return {tensor.name: tensor for tensor in planned}


def _rows(block: _Block, tensor: SourceTensor) -> Iterator[Bytes]:
    """Of gate and up: each expert's rows, and then those that are added."""
    size = raw_row_bytes(tensor)
    unit = _unit(tensor.kind, row_length(tensor))
    for expert in range(block.n_expert):
        drawn = block.drawn(expert)
        for part in range(block.parts(tensor)):
            first = (expert * block.parts(tensor) + part) * block.n_ff
            for rows in row_blocks(block.n_ff, size):
                yield tensor.raw(first + rows.start, first + rows.stop)
            pool = tensor.raw(first, first + block.drawn_from).reshape(block.drawn_from, -1, unit)
            rng = rng_for(first, tensor.name)
            for rows in row_blocks(block.extra, size):
                yield _mixed(pool, drawn[rows], rng)


def _mixed(pool: Bytes, neurons: Numbers, rng: np.random.Generator) -> Bytes:
    """Rows of these neurons, some blocks of which are those that another neuron has in the same place.

    pool: [rows, blocks, bytes]. Returns [neurons, bytes].
    """
    n_rows, n_blocks, size = pool.shape
    row = np.repeat(neurons[:, None], n_blocks, axis=1)
    other = rng.random(row.shape, np.float32) < _MIXED
    if n_blocks > 1:
        other[np.arange(len(row)), rng.integers(0, n_blocks, len(row))] = True
    row[other] = rng.integers(0, n_rows, int(other.sum()))
    return _take(pool.reshape(-1, size), row * n_blocks + np.arange(n_blocks))


def _columns(block: _Block) -> Iterator[Bytes]:
    """Of down: each row, and then zeros in its type."""
    down = block.down
    idle = _idle(down)
    size = row_bytes(down.kind, block.extra)
    rng = rng_for(0, down.name)
    for rows in row_blocks(row_count(down), raw_row_bytes(down) + size):
        own = down.raw(rows.start, rows.stop)
        draws = rng.integers(0, len(idle), (len(own), size // idle.shape[1]))
        yield np.concatenate([own, _take(idle, draws)], axis=1)


def _idle(tensor: SourceTensor) -> Bytes:
    """Blocks of a tensor made zero: by their scale alone where there is one, so that they do not compress. [n, bytes]

    Raises GgufToolsError if the type has no zero.
    """
    rows = max(1, min(row_count(tensor), (_POOL >> 4) // raw_row_bytes(tensor)))
    # elements of their own are taken one by one: a row need not be a multiple of more
    own: Bytes = tensor.raw(0, rows).reshape(-1, block_of(tensor.kind)[1]).copy()
    if tensor.kind in _SCALES:
        own[:, _SCALES[tensor.kind]] = 0
        if _is_zero(own, tensor.kind):
            return own
    zeros = np.zeros((1, _ROWS // math.gcd(_ROWS, block_of(tensor.kind)[0]) * own.shape[1]), np.uint8)
    if not _is_zero(zeros, tensor.kind):
        raise GgufToolsError(f"is {tensor.kind.name}, which has no zero", tensor=tensor.name)
    return zeros


def _is_zero(blocks: Bytes, kind: GGMLQuantizationType) -> bool:
    return not ggml.dequantize(blocks, kind).any()


def _take(blocks: Bytes, which: Numbers) -> Bytes:
    """Rows made of blocks. which: [rows, blocks]."""
    items = np.ascontiguousarray(blocks).view(np.dtype((np.void, blocks.shape[1])))[:, 0]
    rows: Bytes = np.take(items, which).view(np.uint8).reshape(len(which), -1)
    return rows


def _bias(block: _Block, tensor: SourceTensor) -> Iterator[Bytes]:
    for expert in range(block.n_expert):
        own = tensor.raw(expert, expert + 1).reshape(tensor.shape[0] // block.n_ff, block.n_ff, -1)
        yield np.concatenate([own, own[:, block.drawn(expert)]], axis=1)


def _unit(kind: GGMLQuantizationType, elements: int) -> int:
    """Bytes of what rows are mixed in: blocks, or runs of single elements; else whole rows."""
    per_unit, size = ggml.block_layout(kind)
    return size if elements % per_unit == 0 else row_bytes(kind, elements)


_K = GGMLQuantizationType
# where a block has what all its values are multiplied with (ggml-common.h)
_SCALES = {
    **dict.fromkeys((_K.Q4_0, _K.Q5_0, _K.Q8_0, _K.IQ4_NL, _K.IQ4_XS), slice(0, 2)),
    **dict.fromkeys((_K.IQ1_S, _K.IQ2_XXS, _K.IQ2_XS, _K.IQ2_S, _K.IQ3_XXS, _K.IQ3_S), slice(0, 2)),
    **dict.fromkeys((_K.Q4_1, _K.Q5_1, _K.Q4_K, _K.Q5_K), slice(0, 4)),
    _K.Q2_K: slice(80, 84),
    _K.Q3_K: slice(108, 110),
    _K.Q6_K: slice(208, 210),
    _K.TQ1_0: slice(52, 54),
    _K.TQ2_0: slice(64, 66),
}

"""Stores the neurons of each layer in another order: the same function, fewer and longer reads.

What lives here: which sets of neurons the order is made for, and every tensor that has to follow it. The order itself
is found in order.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from gguf_tools.activations import Bits, Numbers, Recording, Say, fingerprint, open_recording, record
from gguf_tools.errors import GgufToolsError
from gguf_tools.format import ALIGNMENT, weight_name
from gguf_tools.measure import predict
from gguf_tools.order import Reads, count_reads, order_by_coactivation
from gguf_tools.progress import Advance, count_progress
from gguf_tools.source import Bytes, SourceTensor, raw_row_bytes, row_blocks, row_count
from gguf_tools.sparse_model import SparseModel
from gguf_tools.stream import PlannedTensor, copied, write_gguf
from gguf_tools.types import FLASH, PLAIN_TYPES
from gguf_tools.windows import newly_active_sets
from llama_flash.whole_files import temporary_folder

WINDOW = 5
_ORDINARY_ALIGNMENT = 32
_BLOCK = 8 << 20  # bytes written at a time


@dataclass(frozen=True)
class LayerReads:
    """Reads of a layer per token, on tokens that the order was not made from."""

    layer: int
    all_before: Reads  # of all neurons that a token needs
    all_after: Reads
    new_before: Reads  # of those that none of the window's tokens needed
    new_after: Reads


def reorder(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    text: str | os.PathLike[str] | None = None,
    activations: str | os.PathLike[str] | None = None,
    n_tokens: int = 20_000,
    window: int = WINDOW,
    n_threads: int | None = None,
    force: bool = False,
    say: Say | None = None,
) -> list[LayerReads]:
    """Writes a model with its neurons ordered by co-activation; each is stored once.

    The order is made for what is read: the neurons that a token needs (by the file's predictors, if it has some) and
    that none of the `window` tokens before it did. Of every eight sequences, one is held out for the figures.
    activations: folder of a recording of this very file (as `calibrate` leaves it); else text is recorded.

    Raises:
        GgufToolsError: not a sparse model, an ordinary file whose down is quantised (its blocks run along the neurons:
            bundle it first), a recording of another model, or a file that cannot be written.
        OSError: a file cannot be opened.
    """
    path, target = Path(model), Path(out)
    if (text is None) == (activations is None):
        raise GgufToolsError("a text or a recording of activations is needed, and not both")
    if window < 0:
        raise GgufToolsError(f"the window must not be negative: {window}")
    subject = SparseModel.open(path)
    _check(subject, target, force)
    with temporary_folder(target) as folder:
        if activations is None:
            recording = record(path, Path(str(text)), folder, n_tokens=n_tokens, n_threads=n_threads, say=say)
        else:
            recording = open_recording(Path(activations))
            if recording.model != fingerprint(subject.source):
                raise GgufToolsError("holds the activations of another model", file=recording.folder)
        with count_progress(f"ordering {path.name}" if say else None, len(subject.layers), "layers") as advance:
            orders, reports = _orders(subject, recording, window, say, advance)
    write_reordered(subject, target, orders, force=force, progress=None if say is None else f"writing {target.name}")
    return reports


def write_reordered(
    model: SparseModel,
    out: Path,
    orders: Mapping[int, Numbers],
    *,
    force: bool = False,
    progress: str | None = None,
) -> None:
    """Writes a model whose layer il has neuron orders[il][i] in place i; other layers stay as they are.

    Raises GgufToolsError as `reorder` does.
    """
    _check(model, out, force)
    for il, order in orders.items():
        if not np.array_equal(np.sort(order), np.arange(model.layers[il].n_ff)):
            raise GgufToolsError(f"not an order of the {model.layers[il].n_ff} neurons of layer {il}")
    planned = [_planned(model, tensor, orders) for tensor in model.source.tensors.values()]
    write_gguf(
        out,
        model.source.values,
        planned,
        alignment=ALIGNMENT if model.is_flash else _ORDINARY_ALIGNMENT,
        progress=progress,
        force=force,
        inputs=model.source.files,
    )


def _check(model: SparseModel, out: Path, force: bool) -> None:
    """What can be known before hours of work."""
    if out.exists() and not force:
        raise GgufToolsError("is already there (--force replaces it)", file=out)
    if not out.parent.is_dir():
        raise GgufToolsError(f"the folder {out.parent} does not exist", file=out)
    if model.is_flash:
        return
    for il in model.layers:
        down = model.source.tensors[weight_name(il, "down")]
        if down.kind not in PLAIN_TYPES:
            raise GgufToolsError(
                f"is {down.kind.name}, in blocks of several neurons, which cannot be reordered: bundle the model first",
                file=model.path,
                tensor=down.name,
            )


def _orders(
    model: SparseModel, recording: Recording, window: int, say: Say | None, advance: Advance
) -> tuple[dict[int, Numbers], list[LayerReads]]:
    held_out = recording.sequence_of_token % 8 == 7
    orders, reports = {}, []
    for il, neurons in model.layers.items():
        needed = _needed(model, recording, il)
        new = newly_active_sets(needed, recording.sequence, window)
        order = order_by_coactivation(new[~held_out], neurons.n_ff)
        report = LayerReads(
            il,
            count_reads(needed[held_out], neurons.n_ff),
            count_reads(needed[held_out], neurons.n_ff, order),
            count_reads(new[held_out], neurons.n_ff),
            count_reads(new[held_out], neurons.n_ff, order),
        )
        orders[il] = order
        reports.append(report)
        advance(1)
        if say:
            before, after = report.new_before, report.new_after
            say(f"layer {il}: {after.reads:.1f} reads for {after.neurons:.1f} new neurons, {before.reads:.1f} before")
    return orders, reports


def _needed(model: SparseModel, recording: Recording, il: int) -> Bits:
    """The neurons that are read for each token."""
    predictor = model.predictor(il)
    if predictor is None:
        return recording.active(il)[0]
    return predict(recording.layer(il), model.down_norms(il), predictor)[0]


_ROWS = re.compile(r"blk\.(\d+)\.ffn_(?:up|gate|predictor_out|bundle)\.weight")
_COLUMNS = re.compile(r"blk\.(\d+)\.ffn_(?:(?:up|gate|predictor)\.bias|down\.weight)")


def _planned(model: SparseModel, tensor: SourceTensor, orders: Mapping[int, Numbers]) -> PlannedTensor:
    """The tensor as it is written."""
    rows, columns = _ROWS.fullmatch(tensor.name), _COLUMNS.fullmatch(tensor.name)
    match = rows or columns
    order = orders.get(int(match[1])) if match else None
    if match is None or order is None:
        return copied(tensor)
    if columns:
        chunks = partial(_columns, tensor, order)
    elif tensor.kind == FLASH and model.bundle.layout == "split":
        parts = model.layers[int(match[1])].parts
        chunks = partial(_rows, [parts[part.name] for part in model.bundle.parts], order)
    else:
        chunks = partial(_rows, [tensor], order)
    return PlannedTensor(tensor.name, tensor.shape, tensor.kind, chunks)


def _rows(tensors: Sequence[SourceTensor], order: Numbers) -> Iterator[Bytes]:
    """One tensor after the other."""
    for tensor in tensors:
        for block in row_blocks(len(order), raw_row_bytes(tensor), _BLOCK):
            yield np.concatenate([tensor.raw(row, row + 1) for row in order[block].tolist()])


def _columns(tensor: SourceTensor, order: Numbers) -> Iterator[Bytes]:
    """Of a tensor that is stored element by element."""
    size = raw_row_bytes(tensor) // len(order)
    for rows in row_blocks(row_count(tensor), raw_row_bytes(tensor), _BLOCK):
        elements = tensor.raw(rows.start, rows.stop).reshape(-1, len(order), size)
        yield elements[:, order].reshape(len(elements), -1)

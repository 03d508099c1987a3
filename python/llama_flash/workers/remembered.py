"""Warm start at a worker: records that were hot when layers were last computed on this host, whichever it has now.

A session numbers the records of the weights that it has. Here they are numbered as the file has them, so that one list
serves every division of the model; several workers of one host add to it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..kept_files import in_turn
from ..native import bindings
from ..native.handle import Session
from ..options import FlashOffload
from ..planning.hot import Ids, Records, load, save

__all__ = ["HostRecords", "Numbers"]

_PART = "of workers"
_NEURON = 1 << 63  # in the plugin's numbers: of all bundles, from 0 on; else of all other records
_OF_LAYER = 1 << 31  # in a key: neurons of this layer; else the place of a tensor in the file
_KEY = np.uint64(32)  # bits before the key
_RECORD = np.uint64((1 << 32) - 1)


class Numbers:
    """Of the records that a session has: a key for each tensor or bundle, and a record of it.

    Args:
        tensors: with records, in the order of the session's numbers.
        names: of all tensors of the file, in its order.
    """

    def __init__(self, tensors: Sequence[bindings.llama_flash_tensor], names: Sequence[str]) -> None:
        place = {name: i for i, name in enumerate(names)}
        neurons = [t.first_record for t in tensors if t.kind == bindings.llama_flash_kind.LLAMA_FLASH_NEURONS]
        firsts, keys = [], []
        for tensor in tensors:
            of_neurons = tensor.kind == bindings.llama_flash_kind.LLAMA_FLASH_NEURONS
            firsts.append(tensor.first_record + (_NEURON - neurons[0] if of_neurons else 0))
            keys.append(_OF_LAYER | tensor.layer if of_neurons else place[tensor.name.decode()])
        order = np.argsort(np.array(keys, np.uint64))
        self._keys, self._firsts = np.array(keys, np.uint64)[order], np.array(firsts, np.uint64)[order]
        self._counts = np.array([t.n_records for t in tensors], np.uint64)[order]
        self._by_first = np.argsort(self._firsts)

    def kept(self, ids: Ids) -> Ids:
        """Of the session's numbers: those of the file."""
        at = np.searchsorted(self._firsts[self._by_first], ids, side="right") - 1
        at = self._by_first[at]
        found: Ids = (self._keys[at] << _KEY) | (ids - self._firsts[at])
        return found

    def here(self, kept: Ids) -> Ids:
        """Of the file's numbers: those of the session, of what it has."""
        kept = kept[self.has(kept)]
        at = np.searchsorted(self._keys, kept >> _KEY)
        found: Ids = self._firsts[at] + (kept & _RECORD)
        return found

    def has(self, kept: Ids) -> npt.NDArray[np.bool_]:
        """Which of the file's numbers are of records of the session."""
        at = np.minimum(np.searchsorted(self._keys, kept >> _KEY), len(self._keys) - 1)
        found: npt.NDArray[np.bool_] = (self._keys[at] == kept >> _KEY) & ((kept & _RECORD) < self._counts[at])
        return found


class HostRecords(Records):
    """The hot records of a model's files at the workers of this host.

    Args:
        names: of all tensors of the files.
    """

    def __init__(self, files: Sequence[Path], names: Sequence[str], options: FlashOffload) -> None:
        super().__init__(files, options, _PART)
        self._names = names

    def load(self, native: Session) -> Ids:
        kept = load(self._files[0], self._mark, _PART)
        return Numbers(native.tensors(), self._names).here(kept) if len(kept) else kept

    def save(self, native: Session, ids: Ids) -> None:
        numbers = Numbers(native.tensors(), self._names)
        with contextlib.suppress(OSError), in_turn("hot"):
            before = load(self._files[0], self._mark, _PART)
            save(self._files[0], self._mark, np.concatenate([numbers.kept(ids), before[~numbers.has(before)]]), _PART)

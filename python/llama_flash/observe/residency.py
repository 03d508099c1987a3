"""Which records of a model are in DRAM and when each was last used, as the plugin tells it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..native import bindings
from ..native.handle import Session

__all__ = ["NEVER", "Kind", "Place", "Residency", "Reuse", "Tensor", "read_residency"]

NEVER = 0xFFFFFFFF  # age of a record that no token has used

Kind = Literal["experts", "panels", "neurons"]
Place = bindings.llama_flash_place
Reuse = npt.NDArray[np.uint64]  # by distance in tokens to the use before: uses; element 0: all others

_KINDS: dict[int, Kind] = {0: "experts", 1: "panels", 2: "neurons"}  # enum llama_flash_kind


@dataclass(frozen=True)
class Tensor:
    """The records of one tensor, or of one layer's neuron bundle."""

    name: str
    layer: int  # -1: of none
    kind: Kind
    first: int  # number of its first record
    count: int  # of records
    record_bytes: int  # of the largest


@dataclass(frozen=True)
class Residency:
    """Of all records, between two operations of a decode."""

    tensors: tuple[Tensor, ...]
    place: npt.NDArray[np.uint8]  # by record: Place
    age: npt.NDArray[np.uint32]  # by record: tokens since the last one that used it, 0: the last token did; or NEVER

    @property
    def in_dram(self) -> npt.NDArray[np.bool_]:
        """By record: it is there, not only on its way."""
        return self.place >= Place.LLAMA_FLASH_PASSING

    def of(self, tensor: Tensor) -> slice:
        return slice(tensor.first, tensor.first + tensor.count)


def read_residency(session: Session) -> Residency:
    """Asks the plugin's session. Raises FlashError."""
    tensors = tuple(
        Tensor(
            name=t.name.decode(errors="replace"),
            layer=t.layer,
            kind=_KINDS[t.kind],
            first=t.first_record,
            count=t.n_records,
            record_bytes=t.record_bytes,
        )
        for t in session.tensors()
    )
    return Residency(tensors, *session.residency(sum(tensor.count for tensor in tensors)))

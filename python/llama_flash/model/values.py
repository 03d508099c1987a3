"""Values of small weights, read from the file."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..errors import FlashReadError
from .gguf import GgufMeta

__all__ = ["read_floats"]


def read_floats(meta: GgufMeta, name: str) -> npt.NDArray[np.float32]:
    """Of a weight of type F32; its shape in the order of numpy, which is the reverse of ggml's.

    Raises:
        FlashReadError: the file has become shorter.
        OSError: it cannot be read.
    """
    tensor = meta.tensors[name]
    values = np.fromfile(tensor.file, "<f4", tensor.size // 4, offset=tensor.offset)
    if values.nbytes != tensor.size:
        raise FlashReadError(
            f"{tensor.file}: tensor {name} ends early: the file has become shorter",
            file=str(tensor.file),
            offset=tensor.offset,
            size=tensor.size,
            tensor=name,
        )
    return values.reshape(tensor.shape[::-1])

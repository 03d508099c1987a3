"""The types of tensors that the engine knows, and their sizes: to read a file's head without the engine's libraries.

A CPU that the engine was not built for cannot load these, but is to be told so; and heads are read before they are.
"""

from __future__ import annotations

__all__ = ["TYPE_SIZES", "tensor_bytes", "type_name"]

# enum ggml_type: name, elements and bytes of a block; tests compare it with the engine
_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
    17996: ("FLASH", 1, 1),
}

TYPE_SIZES = {number: (block, size) for number, (_, block, size) in _TYPES.items()}


def type_name(kind: int) -> str:
    """As "Q4_K"; the number of a type that the engine does not know."""
    return _TYPES[kind][0] if kind in _TYPES else str(kind)


def tensor_bytes(kind: int, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor. shape: as ggml's ne, the row length first.

    Raises:
        ValueError: the engine does not know the type, or rows are not whole blocks of it.
    """
    if kind not in TYPE_SIZES:
        raise ValueError(f"is of type {kind}, which this engine does not know")
    block, size = TYPE_SIZES[kind]
    row = shape[0] if shape else 1
    if row % block:
        raise ValueError(f"is of type {kind}: rows of {row} elements are not whole blocks of {block}")
    total = row // block * size
    for n in shape[1:]:
        total *= n
    return total

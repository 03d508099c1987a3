"""The ggml types: the one that flash files add, names, and which can be quantised to.

`import gguf_tools` makes GGML_TYPE_FLASH known to the `gguf` package, so that its reader lists flash files.
"""

from __future__ import annotations

from typing import cast

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from llama_flash.model.flash_keys import BUNDLE_TYPE
from llama_flash.model.ggml_types import TYPE_SIZES, type_name


def _add_type(number: int) -> GGMLQuantizationType:
    """Adds a member to the enumeration, which Python has no call for, unless a newer `gguf` has it."""
    if number in GGMLQuantizationType._value2member_map_:
        return GGMLQuantizationType(number)
    name = type_name(number)
    member = int.__new__(GGMLQuantizationType, number)
    member._name_, member._value_ = name, number
    member.__objclass__ = GGMLQuantizationType
    member._sort_order_ = len(GGMLQuantizationType._member_names_)
    type.__setattr__(cast(type, GGMLQuantizationType), name, member)
    GGMLQuantizationType._member_names_.append(name)
    GGMLQuantizationType._member_map_[name] = member
    GGMLQuantizationType._value2member_map_[number] = member
    GGML_QUANT_SIZES[member] = TYPE_SIZES[number]
    return member


FLASH = _add_type(BUNDLE_TYPE)
_add_type(42)  # Q2_0: the engine's, not yet in the package

_K = GGMLQuantizationType

# what a row can be made of; the others are intermediate results of the engine, or whole numbers
WEIGHT_TYPES = frozenset(_K) - {FLASH, _K.Q8_1, _K.Q8_K, _K.I8, _K.I16, _K.I32, _K.I64, _K.F64}
# stored element by element: a matrix of these is transposed without rounding
PLAIN_TYPES = frozenset({_K.F32, _K.F16, _K.BF16})

# llama.cpp, src/llama-quant.cpp, tensor_type_fallback: for rows that a type of large blocks cannot hold
_SMALLER_BLOCKS = {
    **dict.fromkeys((_K.IQ1_S, _K.IQ1_M, _K.IQ2_XXS, _K.IQ2_XS, _K.IQ2_S, _K.IQ3_XXS, _K.IQ3_S, _K.IQ4_XS), _K.IQ4_NL),
    **dict.fromkeys((_K(42), _K.Q2_K, _K.Q3_K, _K.TQ1_0, _K.TQ2_0), _K.Q4_0),
    _K.Q4_K: _K.Q5_0,
    _K.Q5_K: _K.Q5_1,
    _K.Q6_K: _K.Q8_0,
}
# these cannot be made without an importance matrix (ggml.c, ggml_quantize_requires_imatrix)
NEED_IMATRIX = frozenset({_K.IQ1_S, _K.IQ2_XXS, _K.IQ2_XS})


def block_of(kind: GGMLQuantizationType) -> tuple[int, int]:
    """Elements and bytes of a block of the type."""
    return TYPE_SIZES[kind]


def row_bytes(kind: GGMLQuantizationType, elements: int) -> int:
    """Bytes of a row of that many elements. Raises ValueError if it is not a multiple of the type's block."""
    block, size = block_of(kind)
    if elements % block:
        raise ValueError(f"{kind.name} needs rows that are a multiple of {block} elements, got {elements}")
    return elements // block * size


def fits(kind: GGMLQuantizationType, elements: int) -> bool:
    """Whether a row of that many elements can be of that type."""
    return elements % block_of(kind)[0] == 0


def quantisable(kind: GGMLQuantizationType, elements: int) -> GGMLQuantizationType:
    """The type itself, or the next best one that rows of that many elements can be quantised to."""
    if kind in NEED_IMATRIX or kind == _K.IQ1_M:  # IQ1_M can, but is of no use
        kind = _K.Q2_K
    if not fits(kind, elements):
        kind = _SMALLER_BLOCKS.get(kind, kind)
    return kind if fits(kind, elements) else _K.F16


def kind_named(name: str) -> GGMLQuantizationType:
    """A weight type by its name, in any case: "q4_K", "F16". Raises ValueError for other names."""
    by_name = {kind.name.upper(): kind for kind in WEIGHT_TYPES}
    kind = by_name.get(name.upper())
    if kind is None:
        raise ValueError(f"unknown type {name!r}, known: {', '.join(sorted(by_name)).lower()}")
    return kind

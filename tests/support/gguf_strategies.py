"""Keys and values of GGUF files for hypothesis to draw, and how many it draws."""

from __future__ import annotations

from gguf import GGUFValueType as V
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from gguf_tools.source import KeyValue

few = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
many = settings(few, max_examples=300)

whole_types = {
    V.UINT8: 8,
    V.INT8: -8,
    V.UINT16: 16,
    V.INT16: -16,
    V.UINT32: 32,
    V.INT32: -32,
    V.UINT64: 64,
    V.INT64: -64,
}
strings = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def scalars_of(kind: V) -> st.SearchStrategy[object]:
    if kind in whole_types:
        bits = whole_types[kind]
        low, high = (0, 2**bits - 1) if bits > 0 else (-(2 ** (-bits - 1)), 2 ** (-bits - 1) - 1)
        return st.integers(low, high)
    return {
        V.FLOAT32: st.floats(width=32, allow_nan=False),
        V.FLOAT64: st.floats(allow_nan=False),
        V.BOOL: st.booleans(),
        V.STRING: strings,
    }[kind]


scalar_types = st.sampled_from([*whole_types, V.FLOAT32, V.FLOAT64, V.BOOL, V.STRING])
key_values = st.one_of(
    scalar_types.flatmap(lambda kind: scalars_of(kind).map(lambda value: KeyValue(value, kind))),
    scalar_types.flatmap(
        lambda kind: st.lists(scalars_of(kind), max_size=6).map(lambda values: KeyValue(values, V.ARRAY, kind))
    ),
)

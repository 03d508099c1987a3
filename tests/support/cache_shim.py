"""slot_cache and ring, called from Python: compiled with cache_shim.cpp, without the engine."""

from __future__ import annotations

import ctypes
from pathlib import Path

from hypothesis import HealthCheck, settings
from plugin_parts import compile_cpp, sources
from repository import SUPPORT

NONE = -1
SETTINGS = settings(
    max_examples=300,
    deadline=None,
    database=None,
    derandomize=True,  # a change is judged by what it changes, not by the day's luck
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def compiled(folder: Path) -> ctypes.CDLL:
    """The library, in `folder`."""
    source = SUPPORT / "cache_shim.cpp"
    path = folder / "cache_shim.so"
    library = ctypes.CDLL(str(compile_cpp(path, "-shared", "-fPIC", source, *sources("memory/cache", "memory/ring"))))
    i32, u32, u64, size = ctypes.c_int32, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_size_t
    handle, boolean = ctypes.c_void_p, ctypes.c_bool
    for name, result, *arguments in (
        ("cache_new", handle, ctypes.POINTER(u32), u32, size),
        ("cache_free", None, handle),
        ("cache_use", None, handle, u32, u64, u32, u32),
        ("cache_take", i32, handle, u32, u32, boolean, ctypes.POINTER(i32)),
        ("cache_hold", None, handle, i32),
        ("cache_end_op", None, handle),
        ("cache_score", ctypes.c_double, handle, u32),
        ("cache_set_reading", None, handle, i32, boolean),
        ("cache_drop", None, handle, i32),
        ("cache_add", i32, handle, u32),
        ("cache_retire", boolean, handle, u32, boolean, *[ctypes.POINTER(i32)] * 3),
        ("cache_record_in", u32, handle, i32),
        ("cache_used", u32, handle),
        ("ring_new", handle, size, u32),
        ("ring_free", None, handle),
        ("ring_take", i32, handle, size, u32),
        ("ring_give", None, handle, i32),
        ("ring_address", size, handle, i32),
        ("ring_record_in", u32, handle, i32),
        ("ring_oldest", i32, handle),
    ):
        function = getattr(library, str(name))
        function.restype, function.argtypes = result, arguments
    return library

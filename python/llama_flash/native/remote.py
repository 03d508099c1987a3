"""Models divided among hosts: the plugin's calls of both ends (struct llama_flash_worker, llama_flash_remote_*)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..errors import FlashError
from . import bindings
from .handle import Session
from .library import library, raise_error

__all__ = ["Worker", "binding", "buffer_type_of", "connect", "place_layers", "settle"]

_MOST_DIMENSIONS = 4
_ANY = (1 << 64) - 1  # bytes
_Many = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def connect(endpoint: str, connection: socket.socket) -> int:
    """Gives the engine the connection for data; returns the worker's ggml_backend_dev_t.

    Raises:
        FlashReadError: the worker does not answer.
    """
    error, device = bindings.llama_flash_error(), ctypes.c_void_p()
    fd = connection.detach()
    if library().llama_flash_remote_connect(endpoint.encode(), fd, ctypes.byref(device), ctypes.byref(error)):
        raise_error(error)
    assert device.value is not None
    return device.value


def settle(endpoint: str) -> bool:
    """Waits until the worker has done all that it was sent; False: the connection is lost."""
    return bool(library().llama_flash_remote_settle(endpoint.encode()))


def buffer_type_of(device: int) -> int:
    """ggml_backend_buffer_type_t of a device's memory."""
    function = library().ggml_backend_dev_buffer_type
    function.restype, function.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    address: int = function(device)
    return address


def place_layers(model_params: Any, devices: Sequence[int], n_layers: Sequence[int]) -> object:
    """Gives each device so many layers, in order. What it returns must outlive the load.

    model_params: llama_model_params.
    """
    import llama_cpp as engine

    some = (ctypes.c_void_p * (len(devices) + 1))(*devices, None)
    shares = (ctypes.c_float * max(len(devices), engine.LLAMA_MAX_DEVICES))(*n_layers)
    shares[len(devices) - 1] += 1  # the engine counts the output as a layer; its weights are placed by name
    model_params.devices = ctypes.addressof(some)
    model_params.tensor_split = ctypes.cast(shares, ctypes.POINTER(ctypes.c_float))
    model_params.n_gpu_layers = -1
    model_params.split_mode = engine.LLAMA_SPLIT_MODE_LAYER
    return some, shares


@contextlib.contextmanager
def binding(files: Sequence[str | os.PathLike[str]]) -> Iterator[None]:
    """Around the load, in its thread: weights of workers are named to them. files: the shards, in order.

    Raises:
        FlashFormatError: a worker does not have one of them.
    """
    lib, error = library(), bindings.llama_flash_error()
    paths = (ctypes.c_char_p * len(files))(*(os.fsencode(path) for path in files))
    if lib.llama_flash_remote_bind_begin(paths, len(files), ctypes.byref(error)):
        raise_error(error)
    try:
        yield
    except BaseException:
        lib.llama_flash_remote_bind_end(None)
        raise
    if lib.llama_flash_remote_bind_end(ctypes.byref(error)):
        raise_error(error)


class Worker:
    """`struct llama_flash_worker`. To be closed after `serve` has returned.

    Args:
        session: new, without a model.
        limit: bytes of memory for buffers.
        weights: bytes of all weights of the files.

    Raises:
        FlashReadError: a file cannot be opened.
        FlashError: the plugin refuses.
    """

    def __init__(
        self, session: Session, files: Sequence[str | os.PathLike[str]], n_threads: int, limit: int, weights: int
    ) -> None:
        self._lib = library()
        paths = (ctypes.c_char_p * len(files))(*(os.fsencode(path) for path in files))
        error = bindings.llama_flash_error()
        self._address: int | None = self._lib.llama_flash_worker_new(
            session.address, paths, len(files), n_threads, limit, weights, ctypes.byref(error)
        )
        if not self._address:
            raise_error(error)
        self._many: Any = None  # what the plugin has the address of

    def on_many(self, many: Callable[[], None]) -> None:
        """Before `serve`: is called on its thread before more of the client's buffers is touched than was expected."""
        self._many = _Many(lambda _: many())
        self._call("llama_flash_worker_on_many", ctypes.cast(self._many, ctypes.c_void_p), None)

    def expect(self, n_bytes: int | None) -> None:
        """Until it is said again, so many bytes of the client's buffers are touched at most; None: any number."""
        self._call("llama_flash_worker_expect", _ANY if n_bytes is None else n_bytes)

    def add_weight(self, name: str, kind: int, shape: Sequence[int], file: int, offset: int, home: int) -> None:
        """Before `serve`: a weight that the client may ask for. kind: enum ggml_type; home: enum llama_flash_home."""
        if len(shape) > _MOST_DIMENSIONS:
            raise FlashError(f"tensor {name} has more than {_MOST_DIMENSIONS} dimensions")
        ne = (ctypes.c_int64 * _MOST_DIMENSIONS)(*shape, *[1] * (_MOST_DIMENSIONS - len(shape)))
        self._call("llama_flash_worker_add_weight", name.encode(), kind, ne, file, offset, home)

    def serve(self, connection: socket.socket) -> None:
        """Until the client has left, or sent what is refused."""
        self._call("llama_flash_worker_serve", connection.detach())

    def raise_refusal(self) -> None:
        """Raises what was refused since it was last asked, if anything was."""
        self._call("llama_flash_worker_take_refusal")

    def memory(self) -> bindings.llama_flash_worker_memory:
        """Of weights, and of the client's buffers."""
        raw = bindings.llama_flash_worker_memory()
        self._lib.llama_flash_worker_get_memory(self._address, ctypes.byref(raw))
        return raw

    def close(self) -> None:
        address, self._address = self._address, None
        if address is not None:
            self._lib.llama_flash_worker_free(address)

    def _call(self, function: str, *arguments: Any) -> None:
        error = bindings.llama_flash_error()
        if getattr(self._lib, function)(self._address, *arguments, ctypes.byref(error)) != 0:
            raise_error(error)

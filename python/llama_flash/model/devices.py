"""What a load gives to devices that have memory of their own: a GPU, or an RPC server in its place.

Which weights and how much of the context lie there, the engine says itself, asked with the same parameters
(graphs.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..native.calls import cpu_buffer_type, has_devices, name_devices, named_devices

__all__ = ["Devices", "devices_of"]


@dataclass(frozen=True)
class Devices:
    """As llama_model_params and llama_context_params say it."""

    n_layers: int  # n_gpu_layers: the last ones; less than none: all of them
    split_mode: int
    main_gpu: int
    tensor_split: tuple[float, ...]  # shares of layers by device; empty: as the engine divides them
    named: tuple[int, ...] | None  # ggml_backend_dev_t; None: all that the engine finds
    kqv: bool  # offload_kqv
    op_offload: bool
    stays: tuple[str, ...] = ()  # patterns of weights that stay in main memory

    def enter(self, model_params: Any) -> object:
        """Into llama_model_params of a model that is not allocated. What it returns must outlive the load."""
        model_params.n_gpu_layers, model_params.split_mode = self.n_layers, self.split_mode
        model_params.main_gpu = self.main_gpu
        return name_devices(model_params, self.named, self.tensor_split)

    def overrides(self) -> list[tuple[Sequence[str], int]]:
        """For native.calls.override."""
        return [(self.stays, cpu_buffer_type())] if self.stays else []


def devices_of(model_params: Any, context_params: Any) -> Devices | None:
    """Of a load; None: no layer of it is to lie on a device."""
    import llama_cpp

    if model_params.n_gpu_layers == 0 or not (model_params.devices or has_devices()):
        return None
    most = llama_cpp.LLAMA_MAX_DEVICES
    shares = tuple(model_params.tensor_split[:most]) if model_params.tensor_split else ()
    return Devices(
        n_layers=int(model_params.n_gpu_layers),
        split_mode=int(model_params.split_mode),
        main_gpu=int(model_params.main_gpu),
        tensor_split=shares,
        named=named_devices(model_params),
        kqv=bool(context_params.offload_kqv),
        op_offload=bool(context_params.op_offload),
    )

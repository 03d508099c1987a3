"""Runs a model and watches its dense feed-forward blocks: what goes into them, and what their neurons come out as.

The engine calls back for every node of the graph. Watched are the products with blk.N.ffn_up.weight, whose second
source is the block's input, and with blk.N.ffn_down.weight, whose second source holds the neurons' values.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gguf_tools import ggml
from gguf_tools.errors import GgufToolsError

Floats = npt.NDArray[np.float32]

_OUTPUT_BYTES = 128 << 20  # bounds the logits of a batch
_WEIGHT = re.compile(r"blk\.(\d+)\.ffn_(up|down)\.weight")
_F32 = 0  # GGML_TYPE_F32


@dataclass(frozen=True)
class Observation:
    """A layer's feed-forward block on a sequence of tokens."""

    inputs: Floats  # [tokens, n_embd]
    neurons: Floats  # [tokens, n_ff]: what down is multiplied with


class Observer:
    """A loaded model. One sequence at a time, each from an empty context."""

    def __init__(
        self,
        path: Path,
        *,
        n_ctx: int,
        n_vocab: int,
        flash_offload: dict[str, Any] | None = None,
        n_threads: int | None = None,
    ) -> None:
        """flash_offload: as of `llama_cpp.Llama`; None: the model is resident. n_threads: None: one per CPU.

        Raises GgufToolsError if the engine cannot load the model.
        """
        from llama_cpp import Llama, llama_cpp

        callback = llama_cpp.ggml_backend_sched_eval_callback(self._on_tensor)

        class Watched(Llama):  # type: ignore[misc]
            """A `Llama` whose context calls back, for which `Llama.__init__` has no argument."""

            @property
            def context_params(self) -> Any:
                return self._watched_params

            @context_params.setter
            def context_params(self, params: Any) -> None:
                params.cb_eval = callback
                self._watched_params = params

        threads = n_threads or len(os.sched_getaffinity(0))
        self._n_batch = max(32, min(n_ctx, _OUTPUT_BYTES // (4 * n_vocab)))
        self._seen: dict[tuple[int, str], list[Floats]] = {}
        self._error: BaseException | None = None
        self._callback = callback
        try:
            self._llm: Any = Watched(
                str(path),
                n_ctx=n_ctx,
                n_batch=self._n_batch,
                n_ubatch=self._n_batch,
                n_threads=threads,
                n_threads_batch=threads,
                logits_all=True,  # or the last layer would drop the rows that it need not compute
                verbose=False,
                **({} if flash_offload is None else {"flash_offload": flash_offload}),
            )
        except (ValueError, RuntimeError) as error:
            raise GgufToolsError(f"the engine cannot load this model ({error})", file=path) from error

    def close(self) -> None:
        self._llm.close()

    def tokenize(self, text: bytes) -> list[int]:
        """Without the tokens that begin a prompt."""
        return list(self._llm.tokenize(text, add_bos=False, special=False))

    @property
    def first_tokens(self) -> list[int]:
        """What the model wants before every prompt."""
        return list(self._llm.tokenize(b"", add_bos=True))

    def run(self, tokens: Sequence[int]) -> dict[int, Observation]:
        """Decodes a sequence; returns what each layer that has a dense feed-forward block saw."""
        self._seen.clear()
        self._llm._ctx.kv_cache_clear()
        for start in range(0, len(tokens), self._n_batch):
            self._llm._batch.set_batch(tokens[start : start + self._n_batch], start, logits_all=True)
            self._llm._ctx.decode(self._llm._batch)
            if self._error is not None:
                raise self._error
        return {
            il: Observation(np.concatenate(self._seen[il, "up"]), np.concatenate(self._seen[il, "down"]))
            for il in sorted({il for il, _ in self._seen})
        }

    def _on_tensor(self, tensor: int, ask: bool, _data: object) -> bool:
        try:
            node = _node(tensor)
            match = _WEIGHT.fullmatch(ggml.tensor_name(node.src[0])) if node.src[0] and node.src[1] else None
            if match is None:
                return not ask  # asked: no interest; told: go on
            if not ask:
                self._seen.setdefault((int(match[1]), match[2]), []).append(_floats(_node(node.src[1])))
        except BaseException as error:  # ctypes would print it and go on
            self._error = self._error or error
            return False
        return True


class _Node(ctypes.Structure):
    """ggml's `struct ggml_tensor` (ggml.h) up to its data."""

    _fields_ = [
        ("head", ggml.TensorView),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
    ]


def _node(tensor: int) -> _Node:
    node = ctypes.cast(tensor, ctypes.POINTER(_Node)).contents
    if node.data != ggml.library().ggml_get_data(tensor):
        raise RuntimeError("this engine's struct ggml_tensor is not the one that is known here")
    return node


def _floats(node: _Node) -> Floats:
    """Copies a contiguous 2-D float32 tensor out of the engine: [ne1, ne0]."""
    head = node.head
    columns, rows = int(head.ne[0]), int(head.ne[1])
    if head.type != _F32 or head.nb[0] != 4 or head.nb[1] != 4 * columns or head.ne[2] * head.ne[3] != 1:
        raise RuntimeError("the engine multiplies with something that is not a float32 matrix")
    memory = (ctypes.c_float * (rows * columns)).from_address(node.data)
    values: Floats = np.ctypeslib.as_array(memory).reshape(rows, columns).copy()
    return values

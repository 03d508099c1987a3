"""The connections for data of a worker, one after the other in one process, without what limits a client's time.

`python rpc_host.py MODEL [PREDICTOR]` prints its port. A client connects twice: for data, and to say a byte once it has
bound its weights, and whenever what has failed is to be forgotten; each is answered. A kernel's assert ends the
process, as it ends the one of a worker's client. PREDICTOR: how active neurons are found, where the file has bundles.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_flash.model.bundles import Bundles, read_bundles
from llama_flash.model.ggml_types import tensor_bytes
from llama_flash.model.gguf import GgufMeta, read_gguf

__all__ = ["LIMIT", "UBATCH", "Weight", "weights_of"]

LIMIT = 64 << 20  # bytes of memory for buffers, and for a message
UBATCH = 64  # tokens
SLOTS = 256 << 10  # bytes above the least that works
_HOMES = {  # weights that a client may bind, and where they are to be: enum llama_flash_home
    "blk.0.attn_norm.weight": 0,
    "blk.0.attn_q.weight": 1,
    "blk.0.ffn_gate_exps.weight": 2,
    "blk.0.ffn_up_exps.weight": 2,
    "blk.0.attn_output.weight": 2,
}


@dataclass(frozen=True)
class Weight:
    name: str
    type: int
    shape: tuple[int, ...]
    offset: int  # in the file
    home: int

    @property
    def size(self) -> int:
        return tensor_bytes(self.type, self.shape)


def _bundles_of(meta: GgufMeta) -> Bundles | None:
    bundles = read_bundles(meta)
    return None if bundles is None else bundles.of_layers(range(1))


def weights_of(meta: GgufMeta) -> list[Weight]:
    """Of the first layer."""
    found = [
        Weight(t.name, t.type, t.shape, t.offset, home)
        for name, home in _HOMES.items()
        if (t := meta.tensors.get(name)) is not None
    ]
    bundles = _bundles_of(meta)
    parts = () if bundles is None else bundles.presented()
    return found + [Weight(name, kind, shape, tensor.offset, 2) for name, kind, shape, tensor in parts]


def _attach(session: Any, bundles: Bundles | None, predictor: Any) -> None:
    """As a worker does when its client's context exists."""
    from llama_flash import FlashOffload
    from llama_flash.native.params import neuron_params

    session.bind_end()
    if bundles is not None:
        options = FlashOffload(predictor=predictor)
        session.set_neurons(neuron_params(predictor, options, bundles.format.record_bytes, UBATCH))
    session.set_memory(session.requirements().min_memory + SLOTS)


def _serve(meta: GgufMeta, bundles: Bundles | None, predictor: str, data: socket.socket, says: socket.socket) -> None:
    from llama_flash import FlashError
    from llama_flash.native.handle import Session
    from llama_flash.native.remote import Worker

    session = Session("pread", io_threads=1)
    for description in () if bundles is None else bundles.descriptions():
        session.add_bundle(description)
    worker = Worker(session, meta.files, 2, LIMIT, meta.file_bytes)
    for weight in weights_of(meta):
        worker.add_weight(weight.name, weight.type, weight.shape, 0, weight.offset, weight.home)

    def compute() -> None:
        with contextlib.suppress(FlashError):
            worker.serve(data)

    thread = threading.Thread(target=compute)
    thread.start()
    attached = False
    while says.recv(1):
        with contextlib.suppress(FlashError):
            if attached:
                session.raise_pending()
            else:
                _attach(session, bundles, predictor)
        attached = True
        with contextlib.suppress(OSError):
            says.sendall(b"d")
    thread.join()
    says.close()
    worker.close()
    session.close()


def main(model: str, predictor: str = "exact") -> None:
    import llama_cpp  # noqa: F401  # registers the plugin

    meta = read_gguf(Path(model))
    bundles = _bundles_of(meta)
    with socket.create_server(("127.0.0.1", 0)) as door:
        print(door.getsockname()[1], flush=True)
        while True:
            data, _ = door.accept()
            says, _ = door.accept()
            _serve(meta, bundles, predictor, data, says)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The connections for data of a worker, one after the other in one process, without what limits a client's time.

`python rpc_host.py MODEL` prints its port. A kernel's assert ends it, as it ends the process of a worker's client.
"""

from __future__ import annotations

import contextlib
import socket
import sys
from pathlib import Path

__all__ = ["HOMES", "LIMIT"]

LIMIT = 64 << 20  # bytes of memory for buffers, and for a message
HOMES = {  # weights that a client may bind, and where they are to be: enum llama_flash_home
    "blk.0.attn_norm.weight": 0,
    "blk.0.attn_q.weight": 1,
    "blk.0.ffn_gate_exps.weight": 2,
}


def main(model: str) -> None:
    import llama_cpp  # noqa: F401  # registers the plugin

    from llama_flash import FlashError
    from llama_flash.model.gguf import read_gguf
    from llama_flash.native.handle import Session
    from llama_flash.native.remote import Worker

    meta = read_gguf(Path(model))
    with socket.create_server(("127.0.0.1", 0)) as door:
        print(door.getsockname()[1], flush=True)
        while True:
            client, _ = door.accept()
            session = Session("pread", io_threads=1)
            worker = Worker(session, meta.files, 2, LIMIT, meta.file_bytes)
            for name, home in HOMES.items():
                tensor = meta.tensors[name]
                worker.add_weight(name, tensor.type, tensor.shape, 0, tensor.offset, home)
            with contextlib.suppress(FlashError):
                worker.serve(client)
            worker.close()
            session.close()


if __name__ == "__main__":
    main(sys.argv[1])

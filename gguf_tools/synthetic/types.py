"""Which ggml type each group of tensors is stored in."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gguf import GGMLQuantizationType as T

from gguf_tools import ggml
from gguf_tools.synthetic.forms import Tensor


@dataclass(frozen=True)
class Types:
    ffn: T  # gate and up, shared experts, experts
    ffn_down: T
    ffn_down_more: T | None = None  # every other layer's down, as in Q4_K_M
    attn: T = T.Q8_0
    embd: T = T.Q8_0
    output: T = T.Q8_0

    def of(self, tensor: Tensor) -> T:
        if tensor.group == "f32":
            return T.F32
        if tensor.group == "ffn_down" and self.ffn_down_more is not None and tensor.layer % 2 == 0:
            wanted = self.ffn_down_more
        else:
            wanted = T(getattr(self, tensor.group))
        elements, _ = ggml.block_layout(wanted)
        # as llama.cpp does for rows that a type of large blocks cannot hold
        return wanted if tensor.shape[-1] % elements == 0 else T.Q8_0 if tensor.shape[-1] % 32 == 0 else T.F16


def types_named(name: str) -> Types:
    """One type for the FFN ("Q4_0", "IQ4_XS", ...), or one of llama.cpp's mixes ("Q4_K_M", "Q5_K_M")."""
    if name in ("Q4_K_M", "Q5_K_M"):
        kind = T[name[:-2]]
        return Types(ffn=kind, ffn_down=kind, ffn_down_more=T.Q6_K, attn=kind, embd=kind, output=T.Q6_K)
    kind = T[name]
    return Types(ffn=kind, ffn_down=kind)


def everything(name: str) -> Types:
    """One type for every matrix of the model."""
    kind = T[name]
    return replace(types_named(name), attn=kind, embd=kind, output=kind)

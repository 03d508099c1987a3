"""Heads of multi-token prediction: layers behind a model's own, of the same file, that guess at tokens further on.

The engine leaves them out of memory unless it is told to load them (`load_mtp` of llama_model_params).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .gguf import GgufMeta, TensorInfo

__all__ = ["MtpHead", "drafting_head", "mtp_head", "takes_too_many", "without_mtp"]

# architectures whose heads the engine has graphs for
_ATTENTION = frozenset(("cohere2moe", "deepseek2", "deepseek32", "glm-dsa", "glm4moe", "hy_v3", "mimo2", "step35"))
_RECURRENT = frozenset(("bailingmoe3", "deepseek4", "glm5-next", "nemotron_h_moe", "qwen35", "qwen35moe", "qwen3next"))
_SEVERAL = frozenset(("hy_v3", "mimo2", "step35"))  # that take a file with more than one head
_NEEDED = {"mimo2": "attn_qkv.weight"}  # in the head's layer; else the engine refuses to build its graph


@dataclass(frozen=True)
class MtpHead:
    """Of a file."""

    tensors: tuple[TensorInfo, ...]
    shared: frozenset[str]  # names of the model's own matrices that it multiplies by, too
    n_layers: int

    @property
    def bytes(self) -> int:
        return sum(tensor.size for tensor in self.tensors)

    def read_bytes(self, meta: GgufMeta) -> int:
        """Bytes of weights that a guess reads: of experts those of one token, of embeddings next to nothing."""
        used, experts = meta.number("expert_used_count"), max(1, meta.number("expert_count"))
        total = sum(meta.tensors[name].size for name in self.shared)
        for tensor in self.tensors:
            if not tensor.name.endswith(".embed_tokens.weight"):
                total += tensor.size * used // experts if len(tensor.shape) > 2 else tensor.size
        return total


def mtp_head(meta: GgufMeta) -> MtpHead | None:
    """The head of the file; None where it has none that the engine can compute."""
    n_layers = meta.number("nextn_predict_layers")
    first = meta.number("block_count") - n_layers
    if meta.architecture not in _ATTENTION | _RECURRENT or n_layers < 1 or first < 1:
        return None
    needed = ("nextn.eh_proj.weight", _NEEDED.get(meta.architecture, "nextn.eh_proj.weight"))
    if any(f"blk.{first}.{name}" not in meta.tensors for name in needed):
        return None
    if meta.number("rope.dimension_sections") and meta.architecture in _ATTENTION:
        return None  # the head's graph rotates as if there were none, which ends the process
    tensors = _behind(meta)
    if len(tensors) == sum(t.layer is not None for t in meta.tensors.values()):
        return None  # a head for another file
    output = "output.weight" if "output.weight" in meta.tensors else "token_embd.weight"
    own = f"blk.{first}.nextn.shared_head_head.weight" in meta.tensors
    return MtpHead(tensors, frozenset() if own else frozenset({output}), n_layers)


def drafting_head(meta: GgufMeta) -> MtpHead | None:
    """The head, where drafts of it can be taken back, which is not so beside recurrent layers, and the engine computes
    one of so many."""
    head = mtp_head(meta)
    if head is None or meta.architecture in _RECURRENT or takes_too_many(meta):
        return None
    return head


def takes_too_many(meta: GgufMeta) -> bool:
    """Whether the file has more heads than the engine has a graph for."""
    return meta.number("nextn_predict_layers") > 1 and meta.architecture not in _SEVERAL


def without_mtp(meta: GgufMeta) -> GgufMeta:
    """As the engine loads the file when no drafts are made of its head, also of one that it cannot compute."""
    names = {tensor.name for tensor in _behind(meta)}
    if not names:
        return meta
    return replace(meta, tensors={name: tensor for name, tensor in meta.tensors.items() if name not in names})


def _behind(meta: GgufMeta) -> tuple[TensorInfo, ...]:
    """Tensors of the layers behind the model's own; empty where it has none of its own: a head for another file."""
    first = meta.number("block_count") - meta.number("nextn_predict_layers")
    if first < 1 or first >= meta.number("block_count"):
        return ()
    return tuple(t for t in meta.tensors.values() if t.layer is not None and t.layer >= first)

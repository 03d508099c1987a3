"""What a refusal of a budget says beside the number: what cannot leave memory, and what of the options would need less.

Each advice was tried on the engine's own graphs: one that frees less than a MiB is not given.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace

from ..errors import FlashError
from ..model.gguf import GgufMeta
from ..model.graphs import graphs_of
from ..model.shape import ContextShape
from ..options import FlashOffload
from ..sizes import format_size
from .placed import Plan

__all__ = ["advice_for"]

_LEAST = 1 << 20  # bytes that an advice frees
_NAMED = 3  # kinds of weights
_F16, _Q8_0 = 1, 8  # enum ggml_type


def advice_for(meta: GgufMeta, plan: Plan, options: FlashOffload, shape: ContextShape) -> tuple[str, ...]:
    """Whole sentences. plan: the one that was refused."""
    found = [_staying(meta, plan), *_needs_less(meta, options, shape)]
    return tuple(sentence for sentence in found if sentence)


def _staying(meta: GgufMeta, plan: Plan) -> str:
    on_flash = {tensor.name for tensor in plan.tensors}
    on_flash.update(layer.tensor.name for layer in plan.bundles.layers) if plan.bundles else None
    kinds: dict[str, int] = defaultdict(int)
    for tensor in meta.tensors.values():
        if tensor.name not in on_flash | plan.on_device:
            kinds[re.sub(r"\bblk\.\d+\.", "blk.*.", tensor.name)] += tensor.size
    largest = sorted(kinds.items(), key=lambda item: -item[1])[:_NAMED]
    if not largest:
        return ""
    named = ", ".join(f"{name} {format_size(size)}" for name, size in largest)
    return f"{format_size(sum(kinds.values()))} of the weights cannot leave memory, most of it {named}."


def _needs_less(meta: GgufMeta, options: FlashOffload, shape: ContextShape) -> list[str]:
    def size(of: ContextShape) -> int:
        graphs = graphs_of(meta, of)
        outputs = 4 * meta.n_vocab * (of.n_outputs + of.n_scores)
        return graphs.kv + graphs.compute + outputs

    try:
        now = size(shape)
    except (FlashError, OSError):
        return []
    less = min(shape.n_batch, max(1, shape.n_ubatch // 4))
    tries = {
        "a smaller n_ctx": replace(shape, n_ctx=max(256, shape.n_ctx // 2), n_scores=shape.n_scores // 2),
        "a smaller n_ubatch": replace(shape, n_ubatch=less),
        "a KV cache of q8_0 (type_k)": replace(shape, type_k=_Q8_0) if shape.type_k == _F16 else shape,
        "logits_all=False": replace(shape, n_outputs=1, n_scores=0) if shape.n_scores else shape,
    }
    helps = []
    for what, other in tries.items():
        try:
            if other != shape and size(other) + _LEAST <= now:
                helps.append(what)
        except (FlashError, OSError):  # it cannot be had: a type of cache, say
            continue
    if options.what in ("experts", "ffn"):
        helps.append("what='auto'")
    if not helps:
        return []
    listed = " or ".join([", ".join(helps[:-1]), helps[-1]]) if len(helps) > 1 else helps[0]
    return [f"{listed[0].upper()}{listed[1:]} needs less."]

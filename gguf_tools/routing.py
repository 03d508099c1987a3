"""Measures how a mixture of experts routes: which experts each token uses, and what a cache of experts makes of it."""

from __future__ import annotations

import argparse
import json
import sys
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gguf_tools import ggml

Trace = npt.NDArray[np.int32]  # [tokens, MoE layers, experts used]


def random_tokens(n: int, n_vocab: int, seed: int = 0) -> list[int]:
    """A token stream without the loops that greedy decoding falls into."""
    return [int(token) for token in np.random.default_rng(seed).integers(0, n_vocab, n)]


def trace_routing(model_path: Path, tokens: Sequence[int], *, n_threads: int = 2, n_batch: int = 64) -> Trace:
    """Runs the stock engine over the tokens and records the experts that each one is routed to."""
    from llama_cpp import llama_cpp
    from llama_cpp._logger import set_verbose

    from llama_flash.model.load import load_model, new_context

    set_verbose(False)
    llama_cpp.llama_backend_init()
    seen: dict[str, list[npt.NDArray[np.int32]]] = {}

    def on_tensor(tensor: int, ask: bool, _data: object) -> bool:
        name = ggml.tensor_name(tensor)
        if not name.startswith("ffn_moe_topk-"):
            return not ask  # asked: no interest; told: go on
        if not ask:
            seen.setdefault(name, []).append(ggml.tensor_int32(tensor))
        return True

    callback = llama_cpp.ggml_backend_sched_eval_callback(on_tensor)
    model = load_model(model_path, llama_cpp.llama_model_default_params())
    try:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = len(tokens)
        params.n_batch = params.n_ubatch = n_batch
        params.n_threads = params.n_threads_batch = n_threads
        params.cb_eval = callback
        context = new_context(model_path, model, params)
        try:
            _decode(context, tokens, n_batch)
        finally:
            llama_cpp.llama_free(context)
    finally:
        llama_cpp.llama_model_free(model)
    if not seen:
        raise ValueError(f"{model_path}: not a mixture of experts")
    layers = sorted(seen, key=lambda name: int(name.rpartition("-")[2]))
    return np.stack([np.concatenate(seen[name]) for name in layers], axis=1)


def _decode(context: int, tokens: Sequence[int], n_batch: int) -> None:
    from llama_cpp import llama_cpp

    batch = llama_cpp.llama_batch_init(n_batch, 0, 1)
    try:
        for start in range(0, len(tokens), n_batch):
            part = tokens[start : start + n_batch]
            batch.n_tokens = len(part)
            for i, token in enumerate(part):
                batch.token[i], batch.pos[i] = token, start + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = True  # or the last layer would drop the rows it need not compute
            if status := llama_cpp.llama_decode(context, batch):
                raise RuntimeError(f"llama_decode returned {status}")
    finally:
        llama_cpp.llama_batch_free(batch)


def lru_hit_rate(trace: Trace, n_cached: int, *, warm_up: int = 0) -> float:
    """Share of expert uses found in one LRU cache of n_cached experts over all layers, tokens after warm_up."""
    cache: OrderedDict[tuple[int, int], None] = OrderedDict()
    hits = uses = 0
    for i, token in enumerate(trace):
        for il, experts in enumerate(token):
            for expert in experts:
                key = (il, int(expert))
                hit = key in cache
                if hit:
                    cache.move_to_end(key)
                else:
                    cache[key] = None
                    if len(cache) > n_cached:
                        cache.popitem(last=False)
                if i >= warm_up:
                    hits, uses = hits + hit, uses + 1
    return hits / uses


def distinct_experts(trace: Trace, window: int = 100) -> float:
    """Distinct experts per layer in a run of `window` tokens, the mean over layers and runs."""
    runs = [trace[i : i + window] for i in range(0, len(trace) - window + 1, window)] or [trace]
    return float(np.mean([len(np.unique(run[:, il])) for run in runs for il in range(trace.shape[1])]))


@dataclass(frozen=True)
class RoutingStatistics:
    tokens: int
    layers: int
    n_expert: int
    n_expert_used: int
    distinct_per_100_tokens: float
    lru_hit_rate: dict[str, float]  # by share of all experts that the cache holds


def routing_statistics(
    trace: Trace, n_expert: int, cached_shares: Sequence[float] = (0.1, 0.2, 0.39, 0.5, 0.75)
) -> RoutingStatistics:
    n_tokens, n_layers, n_used = trace.shape
    total = n_layers * n_expert
    return RoutingStatistics(
        tokens=n_tokens,
        layers=n_layers,
        n_expert=n_expert,
        n_expert_used=n_used,
        distinct_per_100_tokens=round(distinct_experts(trace), 1),
        lru_hit_rate={
            f"{share:.2f}": round(lru_hit_rate(trace, int(share * total), warm_up=n_tokens // 2), 4)
            for share in cached_shares
        },
    )


def measure(model_path: Path, *, n_tokens: int = 400, text: str | None = None) -> RoutingStatistics:
    """Routing statistics of a model over `text`, or over random tokens where there is none."""
    from gguf import GGUFReader

    reader = GGUFReader(model_path)
    arch = reader.fields["general.architecture"].contents()
    n_expert = int(reader.fields[f"{arch}.expert_count"].contents())
    if text is None:
        tokens = random_tokens(n_tokens, len(reader.fields["tokenizer.ggml.tokens"].data))
    else:
        from llama_cpp import Llama

        tokenizer = Llama(str(model_path), vocab_only=True, verbose=False)
        tokens = tokenizer.tokenize(text.encode(), add_bos=False)[:n_tokens]
        tokenizer.close()
    return routing_statistics(trace_routing(model_path, tokens), n_expert)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gguf_tools.routing", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--text", type=Path, help="text to route, instead of random tokens")
    options = parser.parse_args(argv)
    try:
        text = options.text.read_text() if options.text else None
        statistics = measure(options.model, n_tokens=options.tokens, text=text)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(asdict(statistics), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

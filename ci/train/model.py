"""The trained models, in exactly the arithmetic that llama.cpp runs for their architecture.

A form is a `ModelConfig` and the feed-forward block that it names; everything else is shared.
Sources: llama.cpp src/models/arcee.cpp, src/models/qwen3moe.cpp, build_moe_ffn in src/llama-graph.cpp; for OPT, which
llama.cpp does not have, Hugging Face's transformers models/opt/modeling_opt.py with do_layer_norm_before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Form = Literal["arcee", "draft", "moe", "opt"]
RopePairs = Literal["neighbours", "halves"]  # ggml's NORM and NEOX

POSITION_OFFSET = 2  # OPT: position p has row p + 2 of its table
EMBEDDING_STD = 0.3  # where it is also the output matrix: the products that make the logits start small, ...
OUTPUT_NORM_START = 0.07  # ... and the rows not so small that what the blocks add drowns them
LOOK_BACK_SCALE = 1.25  # most of a head's attention on its token, and a gradient left


@dataclass(frozen=True)
class ModelConfig:
    form: Form
    architecture: str  # llama.cpp's name
    rope_pairs: RopePairs | None  # None: learned positions
    n_embd: int
    n_layer: int
    n_head: int
    n_ff: int  # of one expert, where there are experts
    n_expert: int = 0
    n_expert_used: int = 0
    qk_norm: bool = False
    biases: bool = False  # in every linear map, and LayerNorm instead of RMSNorm
    tied: bool = False  # the output matrix is the embedding's
    n_vocab: int = 4096
    n_ctx: int = 1024
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


FORMS: dict[Form, ModelConfig] = {
    "arcee": ModelConfig(
        form="arcee", architecture="arcee", rope_pairs="neighbours", n_embd=256, n_layer=6, n_head=4, n_ff=3072
    ),
    "draft": ModelConfig(
        form="draft", architecture="arcee", rope_pairs="neighbours", n_embd=256, n_layer=2, n_head=4, n_ff=352
    ),
    "moe": ModelConfig(
        form="moe",
        architecture="qwen3moe",
        rope_pairs="halves",
        n_embd=256,
        n_layer=3,
        n_head=4,
        n_ff=256,
        n_expert=32,
        n_expert_used=4,
        qk_norm=True,
        norm_eps=1e-6,
    ),
    "opt": ModelConfig(
        form="opt",
        architecture="opt",
        rope_pairs=None,
        n_embd=256,
        n_layer=6,
        n_head=4,
        n_ff=3072,
        biases=True,
        tied=True,
    ),
}


class RMSNorm(nn.Module):
    def __init__(self, n: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


def make_norm(config: ModelConfig) -> nn.LayerNorm | RMSNorm:
    """Of the residual stream, which is float32."""
    if config.biases:
        return nn.LayerNorm(config.n_embd, config.norm_eps)
    return RMSNorm(config.n_embd, config.norm_eps)


class Linear(nn.Module):
    """y = x W^T + b, computed in x's type; the master weights stay in float32."""

    def __init__(self, n_in: int, n_out: int, zero: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_out, n_in))
        self.bias = nn.Parameter(torch.zeros(n_out)) if bias else None
        if not zero:
            nn.init.normal_(self.weight, std=1 / math.sqrt(n_in))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def rope_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin, [n_ctx, head_dim / 2]."""
    frequencies = config.rope_base ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim)
    angles = torch.outer(torch.arange(config.n_ctx, dtype=torch.float64), frequencies)
    return angles.cos().float(), angles.sin().float()


def position_frequencies(config: ModelConfig) -> Tensor:
    """Radians per token, [n_embd / 2], falling from pi."""
    return math.pi * config.rope_base ** -torch.arange(0, 1, 2 / config.n_embd)


def sinusoids(config: ModelConfig) -> Tensor:
    """[n_ctx + offset, n_embd]: where the learned table of positions starts."""
    angles = torch.outer(torch.arange(config.n_ctx + POSITION_OFFSET), position_frequencies(config))
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, pairs: RopePairs) -> Tensor:
    """Rotate x [batch, time, head, head_dim]; cos and sin are [time, 1, head_dim / 2]."""
    if pairs == "halves":
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.q = Linear(config.n_embd, config.n_embd, bias=config.biases)
        self.k = Linear(config.n_embd, config.n_embd, bias=config.biases)
        self.v = Linear(config.n_embd, config.n_embd, bias=config.biases)
        self.output = Linear(config.n_embd, config.n_embd, zero=True, bias=config.biases)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    @torch.no_grad()
    def look_back(self) -> None:
        """Let head h start with its query on the token h + 1 before, by the high frequencies of `sinusoids`.

        Rotary positions give this for nothing; from a table, one pass over a small text is short to learn it.
        """
        config, n = self.config, self.config.head_dim // 2
        frequencies = position_frequencies(config)[:n]
        rows = torch.eye(config.n_embd // 2)[:n]  # the n highest frequencies out of the sines, or out of the cosines
        zeros = torch.zeros_like(rows)
        sines, cosines = torch.cat((rows, zeros), dim=1), torch.cat((zeros, rows), dim=1)
        queries, keys = [], []
        for head in range(config.n_head):
            cos, sin = (f((head + 1) * frequencies)[:, None] for f in (torch.cos, torch.sin))
            queries += [sines * cos - cosines * sin, cosines * cos + sines * sin]
            keys += [sines, cosines]
        self.q.weight.copy_(LOOK_BACK_SCALE * torch.cat(queries))
        self.k.weight.copy_(LOOK_BACK_SCALE * torch.cat(keys))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, time, n_embd = x.shape
        n_head, head_dim = self.config.n_head, self.config.head_dim
        q, k, v = (linear(x).view(batch, time, n_head, head_dim) for linear in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).to(x.dtype), self.k_norm(k).to(x.dtype)
        if self.config.rope_pairs is not None:
            q, k = (apply_rope(t, cos, sin, self.config.rope_pairs).to(x.dtype) for t in (q, k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if x.is_cuda:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            # On the CPU the fused kernel is half as fast as two bfloat16 matrix products around a softmax.
            q, k, v = (t.reshape(batch * n_head, time, head_dim) for t in (q, k, v))
            mask = torch.full((time, time), -torch.inf, dtype=q.dtype).triu(1).expand(batch * n_head, time, time)
            scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=1 / math.sqrt(head_dim))
            y = (scores.softmax(-1) @ v).view(batch, n_head, time, head_dim)
        return cast(Tensor, self.output(y.transpose(1, 2).reshape(batch, time, n_embd)))


class ReluFeedForward(nn.Module):
    """down(relu(up(x)))"""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = Linear(config.n_embd, config.n_ff, bias=config.biases)
        self.down = Linear(config.n_ff, config.n_embd, zero=True, bias=config.biases)
        self.rectified: Tensor | None = None  # [batch, time, n_ff], relu(up(x)) of the last forward pass

    def activate(self, rectified: Tensor) -> Tensor:
        return rectified

    def forward(self, x: Tensor) -> Tensor:
        self.rectified = F.relu(self.up(x))
        return cast(Tensor, self.down(self.activate(self.rectified)))

    def sparsity_loss(self, target: float) -> Tensor:
        """L1 over the (constant) root mean square, so that smaller activations gain nothing; times how far the share
        of active neurons is above `target`, so that the push ends where the target is met. Of every fourth token."""
        assert self.rectified is not None
        sample = self.rectified[:, ::4].float()
        constant = sample.detach()
        share = (constant > 0).float().mean().item()
        return max(0.0, share / target - 1) * sample.mean() / constant.square().mean().sqrt().clamp_min(1e-6)


class SquaredReluFeedForward(ReluFeedForward):
    """down(relu(up(x))^2): llama.cpp's LLM_FFN_RELU_SQR without a gate."""

    def activate(self, rectified: Tensor) -> Tensor:
        return rectified.square()


class _Experts(torch.autograd.Function):
    """SwiGLU experts, dropless: each expert multiplies the run of (sorted) tokens that chose it.

    x [n, n_embd], gate_up [n_expert, 2 n_ff, n_embd], down [n_expert, n_embd, n_ff], chosen [n, used]
    -> [n, used, n_embd]. Written by hand because autograd would make a full-size gradient per slice of the weights.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor) -> Tensor:
        n_used = chosen.shape[1]
        order = chosen.flatten().argsort(stable=True)
        ends = torch.bincount(chosen.flatten(), minlength=gate_up.shape[0]).cumsum(0).tolist()
        rows = x[order // n_used]
        hidden = rows.new_empty(rows.shape[0], gate_up.shape[1])
        out = torch.empty_like(rows)
        start = 0
        for expert, end in enumerate(ends):
            torch.mm(rows[start:end], gate_up[expert].T, out=hidden[start:end])
            start = end
        gate, up = hidden.chunk(2, dim=1)
        activation = F.silu(gate) * up
        start = 0
        for expert, end in enumerate(ends):
            torch.mm(activation[start:end], down[expert].T, out=out[start:end])
            start = end
        unsort = torch.empty_like(order)
        unsort[order] = torch.arange(order.numel(), device=order.device)
        ctx.save_for_backward(rows, hidden, activation, gate_up, down, order, unsort)
        ctx.ends, ctx.n_used = ends, n_used
        return out[unsort].view(x.shape[0], n_used, x.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        rows, hidden, activation, gate_up, down, order, unsort = ctx.saved_tensors
        d_out = grads[0].reshape(-1, rows.shape[1])[order]
        d_activation = torch.empty_like(activation)
        d_down, d_gate_up = torch.empty_like(down), torch.empty_like(gate_up)
        start = 0
        for expert, end in enumerate(ctx.ends):
            torch.mm(d_out[start:end], down[expert], out=d_activation[start:end])
            torch.mm(d_out[start:end].T, activation[start:end], out=d_down[expert])
            start = end
        gate, up = hidden.chunk(2, dim=1)
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        d_gate = d_activation * up * (sigmoid + silu * (1 - sigmoid))
        d_hidden = torch.cat((d_gate, d_activation * silu), dim=1)
        d_rows = torch.empty_like(rows)
        start = 0
        for expert, end in enumerate(ctx.ends):
            torch.mm(d_hidden[start:end], gate_up[expert], out=d_rows[start:end])
            torch.mm(d_hidden[start:end].T, rows[start:end], out=d_gate_up[expert])
            start = end
        d_x = d_rows[unsort].view(-1, ctx.n_used, rows.shape[1]).sum(1)
        return d_x, d_gate_up, d_down, None


class MoeFeedForward(nn.Module):
    """Softmax router, the best `n_expert_used` with weights normalised to one: llama.cpp's qwen3moe."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        n_expert, n_ff, n_embd = config.n_expert, config.n_ff, config.n_embd
        self.config = config
        self.router = Linear(n_embd, n_expert)
        self.gate = nn.Parameter(torch.randn(n_expert, n_ff, n_embd) / math.sqrt(n_embd))
        self.up = nn.Parameter(torch.randn(n_expert, n_ff, n_embd) / math.sqrt(n_embd))
        self.down = nn.Parameter(torch.zeros(n_expert, n_embd, n_ff))
        self.balance_loss: Tensor | None = None
        self.chosen: Tensor | None = None  # [tokens, n_expert_used]

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        probabilities = self.router(flat.float()).softmax(-1)
        weights, chosen = probabilities.topk(self.config.n_expert_used, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        self.chosen = chosen
        # Switch Transformer, eq. 4: smallest when every expert gets the same share.
        share = torch.bincount(chosen.flatten(), minlength=self.config.n_expert).float() / chosen.numel()
        self.balance_loss = self.config.n_expert * (share * probabilities.mean(0)).sum()
        gate_up = torch.cat((self.gate, self.up), dim=1).to(x.dtype)
        y: Tensor = _Experts.apply(flat, gate_up, self.down.to(x.dtype), chosen)  # type: ignore[no-untyped-call]
        weighted: Tensor = y * weights.unsqueeze(-1).to(x.dtype)
        return weighted.sum(1).view_as(x)


FEED_FORWARD: dict[Form, Callable[[ModelConfig], nn.Module]] = {
    "arcee": SquaredReluFeedForward,
    "draft": SquaredReluFeedForward,
    "moe": MoeFeedForward,
    "opt": ReluFeedForward,
}


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attn_norm = make_norm(config)
        self.attn = Attention(config)
        self.ffn_norm = make_norm(config)
        self.ffn = FEED_FORWARD[config.form](config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
        x = x + self.attn(self.attn_norm(x).to(dtype), cos, sin)
        return cast(Tensor, x + self.ffn(self.ffn_norm(x).to(dtype)))


class LanguageModel(nn.Module):
    """tokens [batch, time] -> logits [batch, time, n_vocab]. The residual stream is float32, the products `dtype`."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embd = nn.Embedding(config.n_vocab, config.n_embd)
        self.position_embd = None
        if config.rope_pairs is None:
            self.position_embd = nn.Embedding(config.n_ctx + POSITION_OFFSET, config.n_embd)
            self.position_embd.weight.data.copy_(2 * EMBEDDING_STD * sinusoids(config))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        if config.rope_pairs is None:
            cast(Block, self.blocks[0]).attn.look_back()
        self.output_norm = make_norm(config)
        self.output = None
        if config.tied:
            nn.init.normal_(self.token_embd.weight, std=EMBEDDING_STD)
            nn.init.constant_(self.output_norm.weight, OUTPUT_NORM_START)
        else:
            self.output = Linear(config.n_embd, config.n_vocab, zero=True)
        cos, sin = rope_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, tokens: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        time = tokens.shape[1]
        cos, sin = self.cos[:time, None], self.sin[:time, None]
        x = self.token_embd(tokens)
        if self.position_embd is not None:
            x = x + self.position_embd.weight[POSITION_OFFSET : POSITION_OFFSET + time]
        for block in self.blocks:
            x = block(x, cos, sin, dtype)
        x = self.output_norm(x).to(dtype)
        if self.output is None:
            return F.linear(x, self.token_embd.weight.to(dtype))
        return cast(Tensor, self.output(x))

    def balance_loss(self) -> Tensor | None:
        """Mean over the layers of the routers' load-balancing loss; None for a dense model."""
        losses = [m.balance_loss for m in self.modules() if isinstance(m, MoeFeedForward)]
        present = [loss for loss in losses if loss is not None]
        return torch.stack(present).mean() if present else None

    def sparsity_loss(self, target: float) -> Tensor:
        """Mean over the layers of the rectified neurons' sparsity loss, for `target` as the share of active ones."""
        return torch.stack([m.sparsity_loss(target) for m in self.modules() if isinstance(m, ReluFeedForward)]).mean()

    def active_shares(self) -> list[float]:
        """Share of active neurons per layer in the last forward pass; empty for a mixture of experts."""
        rectified = [m.rectified for m in self.modules() if isinstance(m, ReluFeedForward)]
        return [(r > 0).float().mean().item() for r in rectified if r is not None]

    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

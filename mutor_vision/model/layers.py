"""The layers of a block of the transformer.

Legend: B batch, T inputs, C width, H heads, D width of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mutor_vision.config import TransformerConfig
from mutor_vision.model.attention import apply_rope


def recomputed(function, *inputs: Tensor) -> Tensor:
    """function(*inputs), recomputed in the backward pass, so that only the inputs are kept: for what is cheap."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class Dropout(nn.Dropout):
    """On a CPU the mask takes one byte a number; F.dropout's takes four and is slower to draw. Other devices have a
    fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        if not self.training or self.p == 0:
            return x
        keep = torch.rand_like(x, dtype=torch.float32) >= self.p
        return (x * keep).mul_(1 / (1 - self.p))


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training a sample's branch is left out with probability p."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        keep = x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(1 - self.p)
        return x * keep.div_(1 - self.p)


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): fc2(silu(gate) * value), without biases."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1_g = nn.Linear(dim, hidden, bias=False)
        self.fc1_x = nn.Linear(dim, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        return self.fc2(_Gated.apply(self.fc1_g(x), self.fc1_x(x)))


class _Gated(torch.autograd.Function):
    """silu(gate) * x, keeping no more than its inputs: these are the largest tensors of a block."""

    @staticmethod
    def forward(ctx, gate, x):
        ctx.save_for_backward(gate, x)
        return F.silu(gate).mul_(x)

    @staticmethod
    def backward(ctx, grad):
        gate, x = ctx.saved_tensors
        grad_silu = grad * x
        return torch.ops.aten.silu_backward(grad_silu, gate), F.silu(gate).mul_(grad)


class Attention(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)
        self.dropout = Dropout(config.residual_dropout)

    def forward(self, x: Tensor, sin: Tensor, cos: Tensor, attend) -> Tensor:
        """x (B, T, C), sin and cos of its positions (B or 1, 1, T, D), attend: q, k, v -> output, each (B, H, T, D)."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # v is copied: as a view it would keep the buffer of q and k alive until the backward pass.
        q, k, v = apply_rope(q, sin, cos), apply_rope(k, sin, cos), v.contiguous()
        return self.dropout(self.out(attend(q, k, v).transpose(1, 2).flatten(2)))


class Block(nn.Module):
    def __init__(self, config: TransformerConfig, drop_path: float):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.ffn = FeedForward(config.dim, config.ffn_dim)
        self.ffn_dropout = Dropout(config.ffn_dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, sin: Tensor, cos: Tensor, attend) -> Tensor:
        x = x + self.drop_path(self.attention(recomputed(self.attention_norm, x), sin, cos, attend))
        return x + self.drop_path(self.ffn_dropout(self.ffn(recomputed(self.ffn_norm, x))))


def initialise(module: nn.Module) -> None:
    """N(0, 0.02) for every matrix, no depth scaling, as LlamaGen."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)

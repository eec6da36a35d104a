"""LlamaGen's class-conditional transformer (arXiv 2406.06525): tokens, labels, positions and an attention pattern in,
logits out. It knows nothing of offsets, registers' targets or losses; a register is one more row of the token
embedding, placed by its position.

Legend: B batch, N = h * w slots, T inputs, C width, H heads, D width of a head, V codebook size.
"""

import copy
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import DropPath, SwiGLU
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mutor_vision.attention import AttentionPattern, SplitAttention, additive_mask, causal_attention
from mutor_vision.config import TransformerConfig
from mutor_vision.rope import apply_rope, rope_table


class KVCache:
    """Keys and values of the inputs seen so far, in memory that is taken once; for use under no_grad. Setting `length`
    back forgets the inputs after it."""

    def __init__(self, config: TransformerConfig, batch: int, *, device: torch.device, dtype: torch.dtype):
        shape = (batch, config.heads, config.num_tokens, config.head_dim)
        # Zeros, because a masked slot still takes part: 0 * NaN is NaN.
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.layers)]
        self.length = 0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of new inputs q, k, v (B, H, M, D) to themselves and the first `length`; keeps k and v."""
        end = self.length + k.shape[2]
        keys, values = self.keys[layer][:, :, :end], self.values[layer][:, :, :end]
        keys[:, :, self.length :] = k
        values[:, :, self.length :] = v
        return causal_attention(q.to(keys.dtype), keys, values)

    def advance(self, count: int) -> None:
        self.length += count

    def rows(self, count: int) -> "KVCache":
        """The first `count` rows of the batch, in the same memory."""
        part = copy.copy(self)
        part.keys = [keys[:count] for keys in self.keys]
        part.values = [values[:count] for values in self.values]
        return part


class StaticStep:
    """One input after those in a cache, in shapes that stay the same from step to step, as CUDA graphs need them: its
    slot is a tensor, and attention reads `reach` slots under a mask."""

    def __init__(self, cache: KVCache, position: Tensor, reach: int):
        """position (1,) int64 on the cache's device, below `reach`; the slots before it are filled."""
        self.cache = cache
        self.position = position
        self.reach = reach
        seen = torch.arange(reach, device=position.device) <= position
        self.mask = additive_mask(seen[None, None, None], cache.keys[0].dtype)  # (1, 1, 1, reach)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As KVCache.attend, for M = 1."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys.index_copy_(2, self.position, k.to(keys.dtype))
        values.index_copy_(2, self.position, v.to(values.dtype))
        keys, values = keys[:, :, : self.reach], values[:, :, : self.reach]
        return F.scaled_dot_product_attention(q.to(keys.dtype), keys, values, attn_mask=self.mask)

    def advance(self, count: int) -> None:
        """The caller moves `position`."""


def recomputed(function, *inputs: Tensor) -> Tensor:
    """function(*inputs), of which only the inputs are kept for the backward pass: for what is cheap to do twice."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class Dropout(nn.Dropout):
    """On a CPU with a mask of one byte for each number, where F.dropout keeps four and takes longer to draw them. Other
    devices have a fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        if not self.training or self.p == 0:
            return x
        keep = torch.rand_like(x, dtype=torch.float32) >= self.p
        return (x * keep).mul_(1 / (1 - self.p))


class FeedForward(SwiGLU):
    def forward(self, x: Tensor) -> Tensor:
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
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        q, k, v = apply_rope(q, sin, cos), apply_rope(k, sin, cos), v.contiguous()  # nothing keeps all of qkv alive
        return self.dropout(self.out(attend(q, k, v).transpose(1, 2).flatten(2)))  # (B, T, C)


class Block(nn.Module):
    def __init__(self, config: TransformerConfig, drop_path: float):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.ffn = FeedForward(config.dim, config.ffn_dim, bias=False)
        self.ffn_dropout = Dropout(config.ffn_dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, sin: Tensor, cos: Tensor, attend) -> Tensor:
        x = x + self.drop_path(self.attention(recomputed(self.attention_norm, x), sin, cos, attend))
        return x + self.drop_path(self.ffn_dropout(self.ffn(recomputed(self.ffn_norm, x))))


class Transformer(nn.Module):
    """Sizes of LlamaGen (parameters without the register's row): B 12 layers, 12 heads, 768 wide, 110,888,448;
    L 24/16/1024; XL 36/20/1280; XXL 48/24/1536; 3B 24/32/3200 (1000 classes, V = 16384, 16x16 tokens)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        assert config.vocab_size > 0 and config.num_classes > 0 and config.num_tokens > 0, "resolve the config first"
        self.config = config
        self.recompute = False  # keep no more than a block's input for the backward pass, which runs it again
        self.null_class = config.num_classes
        self.register_token = config.vocab_size
        self.class_embedding = nn.Embedding(config.num_classes + 1, config.dim)
        self.token_embedding = nn.Embedding(config.vocab_size + 1, config.dim)  # the last row is the register's
        self.token_dropout = Dropout(config.token_dropout)
        drop_paths = [config.drop_path * i / max(1, config.layers - 1) for i in range(config.layers)]
        self.blocks = nn.ModuleList(Block(config, drop_path) for drop_path in drop_paths)
        self.norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.register_buffer("rope", rope_table(config.grid, config.head_dim, config.rope_base), persistent=False)
        self.apply(initialise)
        nn.init.zeros_(self.head.weight)  # the first loss is ln V

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None,
        positions: Tensor,
        pattern: AttentionPattern | None = None,
        cache: KVCache | StaticStep | None = None,
    ) -> Tensor:
        """tokens (B, M) int64 in [0, V] (V = register), labels (B,) in [0, num_classes] (num_classes = null class) or
        None, positions (B or 1, T) slots in [0, N] -> logits (B, T, V) float32.

        With labels the class token comes first and T = M + 1; without, T = M. pattern None is plain causal. With a
        cache the inputs continue the ones it holds. One call serves training, validation, prefill and decoding.
        """
        return self.logits(self.hidden(tokens, labels, positions, pattern, cache))

    def hidden(self, tokens, labels, positions, pattern=None, cache=None) -> Tensor:
        """The normalised last hidden states (B, T, C); arguments as in forward."""
        assert pattern is None or cache is None, "a cache holds causal inputs only"
        x = self.token_embedding(tokens)  # (B, M, C)
        if labels is not None:
            x = torch.cat([self.class_embedding(labels)[:, None], x], dim=1)  # (B, T, C)
        x = self.token_dropout(x)
        sin, cos = self.rope[:, positions][:, :, None]  # each (B or 1, 1, T, D)
        attend = causal_attention if pattern is None else SplitAttention(pattern, compute_dtype(x))
        for layer, block in enumerate(self.blocks):
            if cache is not None:
                attend = partial(cache.attend, layer)
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, sin, cos, attend, use_reentrant=False)  # with the same dropout
            else:
                x = block(x, sin, cos, attend)
        if cache is not None:
            cache.advance(x.shape[1])
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., C) -> float32 logits (..., V)."""
        return self.head(hidden).float()


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type in which a linear layer multiplies x: autocast's where it is on, else x's own."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def initialise(module: nn.Module) -> None:
    """N(0, 0.02) for every matrix, no depth scaling, as LlamaGen."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)

"""LlamaGen's class-conditional transformer (arXiv 2406.06525): tokens, labels, positions and an attention pattern in,
logits out. It knows nothing of offsets, registers' targets or losses; a register is one more row of the token
embedding, placed by its position.

Legend: B batch, N = h * w slots, T inputs, C width, H heads, D width of a head, V codebook size.
"""

from collections.abc import Collection
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mutor_vision.config import TransformerConfig
from mutor_vision.model.attention import AttentionPattern, SplitAttention, causal_attention, rope_table
from mutor_vision.model.cache import KVCache, StaticStep, WindowStep
from mutor_vision.model.layers import Block, Dropout, initialise


class Transformer(nn.Module):
    """Sizes of LlamaGen (parameters without the register's row): B 12 layers, 12 heads, 768 wide, 110,888,448;
    L 24/16/1024; XL 36/20/1280; XXL 48/24/1536; 3B 24/32/3200 (1000 classes, V = 16384, 16x16 tokens)."""

    rope: Tensor

    def __init__(self, config: TransformerConfig):
        super().__init__()
        assert config.vocab_size > 0 and config.num_classes > 0 and config.num_tokens > 0, "resolve the config first"
        self.config = config
        self.gate = None  # told how many inputs are registers, where a drafter is in the blocks (model/drafter.py)
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
        cache: KVCache | StaticStep | WindowStep | None = None,
    ) -> Tensor:
        """tokens (B, M) int64 in [0, V] (V = register), labels (B,) in [0, num_classes] (num_classes = null class) or
        None, positions (B or 1, T) slots in [0, N] -> logits (B, T, V) float32.

        With labels the class token comes first and T = M + 1; without, T = M. pattern None is plain causal. With a
        cache the inputs continue the ones it holds. One call serves training, validation, prefill and decoding.
        """
        return self.logits(self.hidden(tokens, labels, positions, pattern, cache))

    def hidden(
        self, tokens: Tensor, labels: Tensor | None, positions: Tensor, pattern: AttentionPattern | None = None,
        cache: KVCache | StaticStep | WindowStep | None = None,
    ) -> Tensor:  # fmt: skip
        """The normalised last hidden states (B, T, C); arguments as in forward."""
        return self.states(tokens, labels, positions, pattern, cache)["last"]

    def states(
        self, tokens: Tensor, labels: Tensor | None, positions: Tensor, pattern: AttentionPattern | None = None,
        cache: KVCache | StaticStep | WindowStep | None = None, taps: Collection[str] = (),
    ) -> dict[str, Tensor]:  # fmt: skip
        """'last': the normalised last hidden states; and under the name of each tap, 'blocks.0' to
        'blocks.<layers - 1>', what that block puts out; each (B, T, C). Other arguments as in forward."""
        assert pattern is None or cache is None, "a cache holds causal inputs only"
        states = {}
        x = self.token_embedding(tokens)  # (B, M, C)
        if labels is not None:
            x = torch.cat([self.class_embedding(labels)[:, None], x], dim=1)  # (B, T, C)
        x = self.token_dropout(x)
        if self.gate is not None:
            self.gate.registers = x.shape[1] - getattr(pattern or cache, "num_causal", x.shape[1])
        sin, cos = self.rope[:, positions][:, :, None]  # each (B or 1, 1, T, D)
        attend = causal_attention if pattern is None else SplitAttention(pattern, compute_dtype(x))
        for layer, block in enumerate(self.blocks):
            if cache is not None:
                attend = partial(cache.attend, layer)
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, sin, cos, attend, use_reentrant=False)  # with the same dropout
            else:
                x = block(x, sin, cos, attend)
            if (name := f"blocks.{layer}") in taps:
                states[name] = x
        if cache is not None:
            cache.advance(x.shape[1])
        states["last"] = self.norm(x)
        assert states.keys() == {"last", *taps}, f"no such taps: {sorted({*taps} - states.keys())}"
        return states

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

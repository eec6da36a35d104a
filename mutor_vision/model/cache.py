"""Keys and values of the inputs seen so far, in memory that is taken once."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from mutor_vision.config import TransformerConfig
from mutor_vision.model.attention import additive_mask, causal_attention


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

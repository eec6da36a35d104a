"""Keys and values of the inputs seen so far, in memory that is taken once."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mutor_vision.config import TransformerConfig
from mutor_vision.model.attention import additive_mask, causal_attention


class KVCache:
    """Keys and values of the inputs seen so far, in memory that is taken once; for use under no_grad. Setting `length`
    back forgets the inputs after it."""

    def __init__(
        self, config: TransformerConfig, batch: int, *, device: torch.device, dtype: torch.dtype, slots: int = 0
    ):
        """slots: how many inputs it holds, 0 = as many as an image has."""
        shape = (batch, config.heads, slots or config.num_tokens, config.head_dim)
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
        return self._of(lambda x: x[:count])

    def selected(self, rows: Tensor) -> "KVCache":
        """A copy of these rows (K,) int64 of the batch."""
        return self._of(lambda x: x.index_select(0, rows))

    def _of(self, part: Callable[[Tensor], Tensor]) -> "KVCache":
        other = copy.copy(self)
        other.keys, other.values = [part(x) for x in self.keys], [part(x) for x in self.values]
        return other


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


class WindowStep:
    """M inputs of each row, from the row's own slot on, after those in a cache. The first `window` are causal; each of
    the others sees the cache, the window and itself, as a register behind the window's last input does. Keys of all go
    to the cache; what lies after a row's `start` is overwritten by its next window."""

    def __init__(self, cache: KVCache, start: Tensor, count: int, window: int, reach: int):
        """start (R,) int64, the slot of each row's first input; the slots before it are filled. count: M. reach: slots
        that attention reads, at least start + M."""
        self.cache, self.reach, self.num_causal = cache, reach, window
        self.rows = torch.arange(len(start), device=start.device)[:, None]
        ahead = torch.arange(count, device=start.device)
        self.slots = start[:, None] + ahead  # (R, M)
        last = start[:, None] + ahead.clamp(max=window - 1)
        key = torch.arange(reach, device=start.device)
        seen = (key <= last[:, :, None]) | (key == self.slots[:, :, None])
        self.mask = additive_mask(seen[:, None], cache.keys[0].dtype)  # (R, 1, M, reach)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As KVCache.attend."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.rows, :, self.slots] = k.transpose(1, 2).to(keys.dtype)
        values[self.rows, :, self.slots] = v.transpose(1, 2).to(values.dtype)
        keys, values = keys[:, :, : self.reach], values[:, :, : self.reach]
        return F.scaled_dot_product_attention(q.to(keys.dtype), keys, values, attn_mask=self.mask)

    def advance(self, count: int) -> None:
        """The caller moves `start`."""

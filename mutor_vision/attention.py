"""Who may look at whom, and the attention that obeys it.

Legend: B batch, N causal inputs, R private inputs, T = N + R, H heads, D width of a head.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class AttentionPattern:
    """N causal inputs come first, then R private ones: private input r looks at causal inputs 0..last_visible[:, r],
    at itself if `sees_itself`, and is seen by no other input."""

    num_causal: int
    last_visible: Tensor  # (B, R) int64 in [0, num_causal)
    sees_itself: bool = True

    def private_mask(self) -> Tensor:
        """(B, 1, R, T) bool, True = may look: the rows of the private inputs."""
        num_private = self.last_visible.shape[1]
        slots = torch.arange(self.num_causal, device=self.last_visible.device)
        prefix = slots <= self.last_visible[:, :, None]  # (B, R, N)
        itself = torch.eye(num_private, dtype=torch.bool, device=slots.device) & self.sees_itself
        return torch.cat([prefix, itself.expand(prefix.shape[0], -1, -1)], dim=2)[:, None]

    def dense_mask(self) -> Tensor:
        """(B, 1, T, T) bool, True = may look: the whole pattern."""
        private = self.private_mask()
        causal = torch.ones(self.num_causal, private.shape[-1], dtype=torch.bool, device=private.device).tril()
        causal[:, self.num_causal :] = False
        return torch.cat([causal.expand(private.shape[0], 1, -1, -1), private], dim=2)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (B, H, M, D) are the last M of the L positions of k and v (B, H, L, D); each sees itself and all before."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    if num_queries == num_keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if num_queries == 1:
        return F.scaled_dot_product_attention(q, k, v)
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device).tril(num_keys - num_queries)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The readable reference: q, k, v (B, H, T, D) under AttentionPattern.dense_mask()."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def split_attention(q: Tensor, k: Tensor, v: Tensor, num_causal: int, private_mask: Tensor) -> Tensor:
    """The same in two calls: causal inputs exactly as if no private input existed (to the last bit, and without paying
    for a mask), then the private ones under AttentionPattern.private_mask()."""
    n = num_causal
    regular = causal_attention(q[:, :, :n], k[:, :, :n], v[:, :, :n])
    private = F.scaled_dot_product_attention(q[:, :, n:], k, v, attn_mask=private_mask)
    return torch.cat([regular, private], dim=2)

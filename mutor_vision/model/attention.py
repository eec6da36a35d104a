"""Who may look at whom, and the attention that obeys it.

Legend: B batch, N causal inputs, R registers, T = N + R, H heads, D width of a head.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mutor_vision.model import fast_paths


@dataclass(frozen=True)
class AttentionPattern:
    """N causal inputs come first, then R registers: register r sees causal inputs 0..last_visible[:, r], itself if
    `sees_itself`, and is seen by no other input."""

    num_causal: int
    last_visible: Tensor  # (B, R) int64 in [0, num_causal)
    sees_itself: bool = True

    def prefix_mask(self) -> Tensor:
        """(B, 1, R, N) bool, True = sees: registers in rows, causal inputs in columns."""
        slots = torch.arange(self.num_causal, device=self.last_visible.device)
        return (slots <= self.last_visible[:, :, None])[:, None]

    def register_mask(self) -> Tensor:
        """(B, 1, R, T) bool, True = sees: the registers' rows of `dense_mask`."""
        prefix = self.prefix_mask()
        itself = torch.eye(prefix.shape[2], dtype=torch.bool, device=prefix.device) & self.sees_itself
        return torch.cat([prefix, itself.expand(prefix.shape[0], 1, -1, -1)], dim=3)

    def dense_mask(self) -> Tensor:
        """(B, 1, T, T) bool, True = sees: the whole pattern."""
        registers = self.register_mask()
        causal = torch.ones(self.num_causal, registers.shape[-1], dtype=torch.bool, device=registers.device).tril()
        causal[:, self.num_causal :] = False
        return torch.cat([causal.expand(registers.shape[0], 1, -1, -1), registers], dim=2)


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


class SplitAttention:
    """The same in two calls: the causal inputs without a mask, as if there were no registers, so that their outputs
    keep every bit; then the registers. Made once for all layers, which share its masks."""

    def __init__(self, pattern: AttentionPattern, dtype: torch.dtype):
        """dtype: of queries, keys and values."""
        self.num_causal = pattern.num_causal
        on_cpu = pattern.last_visible.device.type == "cpu"
        self.merged = pattern.sees_itself and on_cpu and fast_paths.prefix_attention()
        if not self.merged:
            self.mask: Tensor | None = additive_mask(pattern.register_mask(), dtype)
        elif _is_one_per_slot(pattern):
            self.mask = None
        else:
            seen = pattern.prefix_mask()
            self.mask = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (B, H, T, D) -> (B, H, T, D)."""
        n = self.num_causal
        if self.merged:
            return _MergedAttention.apply(q, k, v, n, self.mask)
        regular = causal_attention(q[:, :, :n], k[:, :, :n], v[:, :, :n])
        registers = F.scaled_dot_product_attention(q[:, :, n:], k, v, attn_mask=self.mask)
        return torch.cat([regular, registers], dim=2)


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., T) bool -> 0 where True, -inf where False, with rows that begin at multiples of 8 numbers: CUDA's kernels
    read such a mask in place, and copy a boolean one, or one with other rows, in every layer."""
    width = mask.shape[-1]
    padded = mask.new_zeros(*mask.shape[:-1], -(-width // 8) * 8, dtype=dtype)[..., :width]
    return padded.masked_fill_(~mask, -torch.inf)


class _MergedAttention(torch.autograd.Function):
    """Causal attention of the first n of q, k, v (B, H, N + R, D); registers attend to the causal keys that `mask`
    (B, 1, R, N) allows (None: R = N and register r sees 0..r) and each to its own key. CPU only: CUDA has another
    kernel.

    The kernel gives the output o_p over the causal keys and its log-sum-exp lse_p. A register's own logit
    s = q.k_self / sqrt(D) is merged: lse = logaddexp(lse_p, s), o = exp(lse_p - lse) o_p + exp(s - lse) v_self. The
    kernel's backward pass recomputes exp(logit - lse) and needs sum(grad . o); given the merged o and lse, its
    gradients of the causal keys are exact.
    """

    @staticmethod
    def forward(ctx, q, k, v, n, mask):
        if mask is not None:
            mask = mask.to(torch.promote_types(q.dtype, mask.dtype))  # float64 with a float32 mask comes out wrong
        # Memory in the order (B, T, H, D): the output projection copies nothing.
        out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        prefix = k[:, :, :n], v[:, :, :n]
        out[:, :, :n], lse = fast_paths.prefix_attention_forward(q[:, :, :n], *prefix, True)
        own_q, own_k, own_v = q[:, :, n:], k[:, :, n:], v[:, :, n:]
        registers, prefix_lse = fast_paths.prefix_attention_forward(own_q, *prefix, mask is None, mask)
        s = (own_q * own_k).sum(-1, dtype=prefix_lse.dtype) * q.shape[-1] ** -0.5
        merged = torch.logaddexp(prefix_lse, s, out=torch.empty_like(prefix_lse))  # in the kernel's own layout
        own_share = (s - merged).exp_()
        out[:, :, n:] = torch.lerp(registers, own_v, own_share[..., None].to(out.dtype))
        ctx.n = n
        ctx.save_for_backward(q, k, v, mask, out, lse, merged, own_share)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, mask, out, lse, merged, own_share = ctx.saved_tensors
        n = ctx.n
        prefix = k[:, :, :n], v[:, :, :n]
        backward = fast_paths.prefix_attention_backward
        grad_q, grad_k, grad_v = backward(grad[:, :, :n], q[:, :, :n], *prefix, out[:, :, :n], lse, True)
        grad, out, own_q, own_k, own_v = (tensor[:, :, n:] for tensor in (grad, out, q, k, v))
        register_q, register_k, register_v = backward(grad, own_q, *prefix, out, merged, mask is None, mask)
        share = own_share[..., None].to(grad.dtype)
        grad_s = share * (grad * (own_v - out)).sum(-1, keepdim=True) * q.shape[-1] ** -0.5
        grad_q = torch.cat([grad_q, register_q.add_(grad_s * own_k)], dim=2)
        grad_k = torch.cat([grad_k.add_(register_k), grad_s * own_q], dim=2)
        grad_v = torch.cat([grad_v.add_(register_v), share * grad], dim=2)
        return grad_q, grad_k, grad_v, None, None


def _is_one_per_slot(pattern: AttentionPattern) -> bool:
    slots = torch.arange(pattern.num_causal, device=pattern.last_visible.device)
    return pattern.last_visible.shape[1] == len(slots) and bool((pattern.last_visible == slots).all())


def rope_table(grid: tuple[int, int], head_dim: int, base: float) -> Tensor:
    """(h, w) -> float32 (2, h * w + 1, head_dim): sines and cosines of every slot."""
    bands = head_dim // 4  # half of a head turns with the row, half with the column
    frequencies = 1.0 / base ** (torch.arange(bands).float() / bands)
    places = torch.cartesian_prod(*(torch.arange(side).float() for side in grid))  # (h * w, 2)
    angles = (places[:, :, None] * frequencies).flatten(1).repeat_interleave(2, dim=1)
    return torch.stack([torch.cat([torch.zeros(1, head_dim), part]) for part in (angles.sin(), angles.cos())])


def apply_rope(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Rotate x (B, H, T, D) by sin, cos (B or 1, 1, T, D) in float32; returns x's dtype."""
    wide = x.float()
    turned = torch.stack([-wide[..., 1::2], wide[..., ::2]], dim=-1).flatten(-2)  # each pair by a quarter turn
    return (wide * cos + turned * sin).to(x.dtype)

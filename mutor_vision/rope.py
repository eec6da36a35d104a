"""2D rotary embedding by slot: row 0 for the class token, row t for the t-th image token in raster order.

timm's tables equal LlamaGen's to the last bit (interleaved pairs, the first half of a head turns with the grid row, the
second with the column). LlamaGen's class token has an all-zero row, cos = sin = 0, so its query and key are zero
vectors: every later input attends to it with logit 0. An identity row would load the same weights and compute
something else. Source: LlamaGen, autoregressive/models/gpt.py, precompute_freqs_cis_2d.
"""

import torch
from timm.layers import apply_rot_embed, build_rotary_pos_embed
from torch import Tensor


def rope_table(grid: tuple[int, int], head_dim: int, base: float) -> Tensor:
    """(h, w) -> float32 (2, h * w + 1, head_dim): sines and cosines of every slot."""
    sin, cos = build_rotary_pos_embed(list(grid), dim=head_dim, in_pixels=False, temperature=base)
    return torch.stack([torch.cat([torch.zeros(1, head_dim), part]) for part in (sin, cos)])


def apply_rope(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Rotate x (B, H, T, D) by sin, cos (B or 1, 1, T, D) in float32; returns x's dtype."""
    return apply_rot_embed(x.float(), sin, cos).to(x.dtype)

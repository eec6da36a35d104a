"""A drafter for a finished model: registers that learn to guess tokens ahead while the model stays as it is. The
register's embedding and a low-rank adapter on the blocks' matrices are trained, and the adapter is active at register
inputs alone. Registers are seen by no other input, so regular logits keep their bits. After arXiv 2507.11851, where
mask tokens have such an adapter.

Legend: B batch, T inputs, R of them registers, which come last.
"""

from typing import Any

import torch
from torch import Tensor, nn

LINEAR_LAYERS = ("qkv", "out", "fc1_g", "fc1_x", "fc2")  # of every block


class Gate:
    """How many inputs of the forward pass in progress are registers. Transformer.states sets it."""

    registers = 0


class GatedLinear(nn.Module):
    """base(x), and at registers scale * up(down(x)) more, which is 0 until it is trained."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, gate: Gate):
        super().__init__()
        self.base, self.scale, self.gate = base, scale, gate
        like: dict[str, Any] = {"bias": False, "device": base.weight.device, "dtype": base.weight.dtype}
        self.draft_down = nn.Linear(base.in_features, rank, **like)
        self.draft_up = nn.Linear(rank, base.out_features, **like)
        nn.init.zeros_(self.draft_up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, in) -> (B, T, out)."""
        y = self.base(x)
        if (regular := x.shape[1] - self.gate.registers) == x.shape[1]:
            return y
        drafted = y[:, regular:] + self.scale * self.draft_up(self.draft_down(x[:, regular:]))
        return torch.cat([y[:, :regular], drafted], dim=1)


class TokenTable(nn.Module):
    """A token embedding whose last row, the register's, is a parameter of its own."""

    def __init__(self, base: nn.Embedding):
        super().__init__()
        self.base = base
        self.draft_row = nn.Parameter(base.weight[-1].detach().clone())

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, C)."""
        is_register = tokens == self.base.num_embeddings - 1
        return torch.where(is_register[..., None], self.draft_row, self.base(tokens))


def add_drafter(model: Any, rank: int, alpha: float) -> None:
    """Put a drafter into a Transformer, in place, scaled by alpha / rank; afterwards only the drafter takes
    gradients."""
    model.requires_grad_(False)
    model.gate = Gate()
    for block in model.blocks:
        for room in (block.attention, block.ffn):
            for name, layer in list(room.named_children()):
                if name in LINEAR_LAYERS:
                    setattr(room, name, GatedLinear(layer, rank, alpha / rank, model.gate))
    model.token_embedding = TokenTable(model.token_embedding)

"""Multi-token prediction by parallel heads (Gloeckle et al. 2024, arXiv 2404.19737), the rival of registers: each extra
head is a transformer block of its own on the trunk's output, and all share the unembedding. Head k predicts k tokens
ahead; head 1 is the transformer as it is, which is all that inference uses.

Legend: B batch, N slots, C width.
"""

from torch import Tensor, nn

from mutor_vision.config import TransformerConfig
from mutor_vision.model.attention import causal_attention
from mutor_vision.model.layers import Block, initialise


class ParallelHeads(nn.Module):
    """Heads 2..count. Where the paper takes layers from the trunk to pay for them, here they come on top, so that the
    transformer is the same with and without."""

    def __init__(self, config: TransformerConfig, count: int):
        super().__init__()
        self.blocks = nn.ModuleList(Block(config, config.drop_path) for _ in range(count - 1))
        self.norms = nn.ModuleList(nn.RMSNorm(config.dim, eps=1e-5) for _ in range(count - 1))
        self.apply(initialise)

    def forward(self, hidden: Tensor, rope: Tensor) -> list[Tensor]:
        """hidden (B, N, C) of the slots in order, from Transformer.hidden, with its rotary table -> for k = 2, 3, ...
        what the unembedding turns into logits of x_(t+k) at slot t: (B, N - k + 1, C), the slots that have one."""
        sin, cos = rope[:, None, None, : hidden.shape[1]]
        outputs = []
        for k, (block, norm) in enumerate(zip(self.blocks, self.norms, strict=True), start=2):
            ahead = norm(block(hidden, sin, cos, causal_attention))
            outputs.append(ahead[:, : hidden.shape[1] - k + 1])
        return outputs

    def num_targets(self, num_slots: int) -> int:
        """Targets an image over all extra heads."""
        return sum(num_slots - k + 1 for k in range(2, len(self.blocks) + 2))

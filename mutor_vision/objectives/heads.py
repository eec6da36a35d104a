"""Multi-token prediction by parallel heads (Gloeckle et al. 2024, arXiv 2404.19737), the rival of registers: each extra
head is a transformer block of its own on the trunk's output, and all share the unembedding. Head k predicts k tokens
ahead; head 1 is the transformer as it is, which is all that inference uses.

Legend: B batch, N slots, C width.
"""

import torch
from torch import Tensor, nn

from mutor_vision.auxiliary_config import ParallelHeadsConfig
from mutor_vision.config import TrainConfig
from mutor_vision.model.attention import causal_attention
from mutor_vision.model.layers import Block, initialise
from mutor_vision.model.transformer import Transformer
from mutor_vision.objectives.auxiliary import Auxiliary
from mutor_vision.objectives.cross_entropy import linear_cross_entropy
from mutor_vision.objectives.sequence import TrainingSequence


class ParallelHeads(Auxiliary):
    """Heads 2..count. Where the paper takes layers from the trunk to pay for them, here they come on top, so that the
    transformer is the same with and without."""

    name = "heads"

    def __init__(self, own: ParallelHeadsConfig, config: TrainConfig):
        super().__init__(own, config)
        model, extra = config.model, range(own.count - 1)
        self.blocks = nn.ModuleList(Block(model, model.drop_path) for _ in extra)
        self.norms = nn.ModuleList(nn.RMSNorm(model.dim, eps=1e-5) for _ in extra)
        self.apply(initialise)

    def ahead(self, hidden: Tensor, rope: Tensor) -> list[Tensor]:
        """hidden (B, N, C) of the slots in order, from Transformer.hidden, with its rotary table -> for k = 2, 3, ...
        what the unembedding turns into logits of x_(t+k) at slot t: (B, N - k + 1, C), the slots that have one."""
        sin, cos = rope[:, None, None, : hidden.shape[1]]
        outputs = []
        for k, (block, norm) in enumerate(zip(self.blocks, self.norms, strict=True), start=2):
            ahead = norm(block(hidden, sin, cos, causal_attention))
            outputs.append(ahead[:, : hidden.shape[1] - k + 1])
        return outputs

    def forward(self, states: dict[str, Tensor], sequence: TrainingSequence, transformer: Transformer) -> Tensor:
        n, head = sequence.num_regular, transformer.head.weight
        terms = [
            linear_cross_entropy(ahead.flatten(0, 1), head, sequence.targets[:, n - ahead.shape[1] : n].flatten())
            for ahead in self.ahead(states["last"][:, :n], transformer.rope)
        ]
        return torch.stack(terms).sum()

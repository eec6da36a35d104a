"""Private prediction blocks, MTAR's head (arXiv 2608.25386): from the last states, transformer blocks of its own and an
unembedding of its own predict another cell than the next, by default the one below. MTAR's token contrast, a second
loss, and its token drop, a choice of the cells that are trained on, are left out.

Legend: B batch, N slots, C width.
"""

from typing import cast

import torch
from torch import Tensor, nn

from mutor_vision.auxiliary_config import PrivateBlocksConfig
from mutor_vision.config import TrainConfig
from mutor_vision.model.attention import causal_attention
from mutor_vision.model.layers import Block, initialise
from mutor_vision.model.transformer import Transformer
from mutor_vision.objectives.auxiliary import Auxiliary, Places
from mutor_vision.objectives.cross_entropy import linear_cross_entropy
from mutor_vision.objectives.sequence import TrainingSequence
from mutor_vision.offsets import look_ahead


class PrivateBlocks(Auxiliary):
    """One head for each offset: blocks, without a norm after them, and an unembedding that is zero at the start. The
    class's state is not used."""

    name = "private_blocks"

    def __init__(self, own: PrivateBlocksConfig, config: TrainConfig):
        super().__init__(own, config)
        model, offsets = config.model, own.list_of_offsets()
        heads = [nn.Linear(model.dim, model.vocab_size, bias=False) for _ in offsets]
        self.heads = nn.ModuleList(heads)
        self.blocks = nn.ModuleList(
            nn.ModuleList(Block(model, model.drop_path) for _ in range(own.blocks)) for _ in offsets
        )
        self.apply(initialise)
        for head in heads:
            nn.init.zeros_(head.weight)
        pairs = [look_ahead(offset, model.grid, own.edge) for offset in offsets]
        self.slots = nn.ModuleList(Places(slots) for slots, _ in pairs)
        self.targets = nn.ModuleList(Places(cells - 1) for _, cells in pairs)  # token x_1 is the first target

    def forward(self, states: dict[str, Tensor], sequence: TrainingSequence, transformer: Transformer) -> Tensor:
        n, terms = sequence.num_regular, []
        sin, cos = transformer.rope[:, None, None, :n]
        for blocks, head, slots, targets in zip(self.blocks, self.heads, self.slots, self.targets, strict=True):
            hidden = states["last"][:, :n]
            for block in cast(nn.ModuleList, blocks):
                hidden = block(hidden, sin, cos, causal_attention)
            wanted = targets(sequence.targets).flatten()
            terms.append(linear_cross_entropy(slots(hidden).flatten(0, 1), cast(Tensor, head.weight), wanted))
        return torch.stack(terms).sum()

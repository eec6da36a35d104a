"""What Mirai's two losses (arXiv 2601.14671) share: the states of a middle layer, each taken through a projector for
every offset, are turned towards other vectors at those offsets. Everything here is dropped after training.

Legend: B batch, N slots, P pairs of an offset, C width of the model, F width of what the states are aligned with.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mutor_vision.auxiliary_config import AlignmentConfig
from mutor_vision.config import TrainConfig
from mutor_vision.objectives.auxiliary import Auxiliary, Places
from mutor_vision.objectives.sequence import TrainingSequence


class Projector(nn.Sequential):
    """(..., dim) -> (..., out) by two hidden layers. N(0, 0.02), biases 0."""

    def __init__(self, dim: int, hidden: int, out: int):
        super().__init__(nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
                         nn.Linear(hidden, out))  # fmt: skip
        for layer in self:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)


class Alignment(Auxiliary):
    """Loss of an image: over the offsets, the sum or mean of minus the mean cosine of its pairs."""

    def __init__(self, own: AlignmentConfig, config: TrainConfig, width: int, pairs: list[tuple[np.ndarray, ...]]):
        """width: F. pairs: for each offset, (P,) slots of states and (P,) places of what they are aligned with."""
        super().__init__(own, config)
        model, self.reduction = config.model, own.reduction
        self.blocks = own.tapped_blocks(model)
        self.taps = (f"blocks.{self.blocks - 1}",)
        self.projectors = nn.ModuleList(Projector(model.dim, own.hidden_width(model), width) for _ in pairs)
        self.slots, self.places = (nn.ModuleList(map(Places, each)) for each in zip(*pairs, strict=True))

    def count(self, sequence: TrainingSequence) -> int:
        """Images: each has the same pairs, and each offset's are averaged before offsets are summed."""
        return len(sequence.targets)

    def compare(self, states: dict[str, Tensor], others: Tensor) -> Tensor:
        """The tapped states (B, N or more, C) and what they are aligned with (B, N, F) -> the loss, summed over images,
        in float32 (float64 for float64)."""
        terms = []
        for projector, slots, places in zip(self.projectors, self.slots, self.places, strict=True):
            projected, target = projector(slots(states[self.taps[0]])), places(others)
            wide = torch.promote_types(projected.dtype, torch.float32)
            with torch.autocast(projected.device.type, enabled=False):
                terms.append(-F.cosine_similarity(projected.to(wide), target.to(wide), dim=-1).mean(1).sum())
        total = torch.stack(terms)
        return total.sum() if self.reduction == "sum" else total.mean()

"""The contract of an auxiliary loss: what is trained beside next-token prediction and dropped afterwards.

Legend: B batch, N slots, C width.
"""

from collections.abc import Collection, Sequence
from importlib import import_module

import numpy as np
import torch
from torch import Tensor, nn

from mutor_vision.auxiliary_config import AuxiliaryConfig
from mutor_vision.config import TrainConfig
from mutor_vision.model.transformer import Transformer
from mutor_vision.objectives.sequence import TrainingSequence


class Auxiliary(nn.Module):
    """One loss. Its parameters are trained with the transformer where they require a gradient, and they and its buffers
    are kept in a checkpoint as NAME.safetensors; a loss without any is also computed on held-out images."""

    name = ""  # of the loss in the log, and of the file of weights
    taps: Sequence[str] = ()  # states that it needs beside the last: names that Transformer.states takes

    part_names: Collection[str] = ()  # of the parts that its targets fall into; held-out losses are also by part

    def __init__(self, own: AuxiliaryConfig, config: TrainConfig):
        """own: its settings in config. Raises UserError for what the grid or the model cannot carry."""
        super().__init__()
        self.own, self.steps, self.epoch_steps = own, config.steps, config.epoch_images / config.batch_size
        self.targets_of_an_image = own.cost(config.model).targets

    def begin(self, transformer: Transformer) -> None:
        """Called once, with the weights that training starts from; a checkpoint is loaded afterwards."""

    def after_step(self, transformer: Transformer) -> None:
        """The optimizer has taken a step: what follows the model's weights without being trained moves on. Under FSDP
        the tensors of both are this process's shards."""

    def extend(
        self, sequence: TrainingSequence, codes: Tensor, *, seed: int, sample_index: np.ndarray, step: int | None
    ) -> TrainingSequence:
        """The sequence with the inputs that it adds, if any. codes (B, h, w) int64; seed, sample_index (B,) and the
        0-based step fix every draw, whatever the batch. step None: of held-out images, which follow no schedule."""
        return sequence

    def count(self, sequence: TrainingSequence) -> int:
        """Targets of `forward` in this sequence, known without waiting for the device. By default those of the
        configuration's cost; a loss that leaves some out counts the rest itself."""
        return len(sequence.targets) * self.targets_of_an_image

    def part(self, sequence: TrainingSequence, name: str) -> TrainingSequence:
        """The sequence with the targets of one part alone."""
        raise NotImplementedError

    def forward(self, states: dict[str, Tensor], sequence: TrainingSequence, transformer: Transformer) -> Tensor:
        """The loss summed over its targets, a scalar. states: 'last', the normalised last hidden states (B, T, C), of
        which the first N are the image's, and the taps."""
        raise NotImplementedError

    def weight(self, step: int) -> float:
        """Of the mean over the targets, at the 0-based optimizer step."""
        return self.own.weight_at(step, self.steps, self.epoch_steps)

    def share(self, step: int) -> float:
        """How much of the next token's weight, 1, it takes; 0 for a loss that is added."""
        return self.weight(step) if self.own.is_share else 0.0


class Places(nn.Module):
    """Some of the slots or cells of every image: x (B, N, ...) -> (B, P, ...). places (P,) int64, ascending."""

    places: Tensor

    def __init__(self, places: np.ndarray):
        super().__init__()
        first, last = int(places[0]), int(places[-1])
        # A view where they lie together: its gradient is no scatter.
        self.together = slice(first, last + 1) if last - first < len(places) else None
        self.register_buffer("places", torch.from_numpy(places), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.places if self.together is None else self.together]


def auxiliaries_of(config: TrainConfig) -> list[Auxiliary]:
    """Those that are on, made in the order of the configuration's fields."""
    found = []
    for own in config.auxiliaries.values():
        if own.active:
            module, name = own.implementation.split(":")
            found.append(getattr(import_module(module), name)(own, config))
    return found

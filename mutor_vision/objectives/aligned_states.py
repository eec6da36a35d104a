"""States aligned with their own average at neighbouring cells: Mirai-E (arXiv 2601.14671), as in the authors' code. A
state of the model's middle is turned towards what its average over training, the teacher, has at the same cell, at the
cell to the right, below, ...: a state that it has after reading further.

Legend: B batch, N slots, C width.
"""

import dataclasses

import numpy as np
import torch
from torch import Tensor, nn

from mutor_vision.auxiliary_config import AlignedStatesConfig
from mutor_vision.config import TrainConfig
from mutor_vision.model.transformer import Transformer
from mutor_vision.objectives.alignment import Alignment
from mutor_vision.objectives.sequence import TrainingSequence
from mutor_vision.offsets import look_ahead


class AlignedStates(Alignment):
    name = "aligned_states"
    own: AlignedStatesConfig

    def __init__(self, own: AlignedStatesConfig, config: TrainConfig):
        pairs = [_pairs(offset, own, config) for offset in own.list_of_offsets()]
        super().__init__(own, config, config.model.dim, pairs)
        # The teacher is the first blocks alone, and has no dropout, which a mode could switch on again.
        model = dataclasses.replace(config.model, layers=self.blocks, token_dropout=0.0, residual_dropout=0.0,
                                    ffn_dropout=0.0, drop_path=0.0)  # fmt: skip
        self.teacher = Transformer(model)
        self.teacher.norm = self.teacher.head = nn.Identity()  # type: ignore[assignment]  # states are compared before any norm
        self.teacher.requires_grad_(False)

    @torch.no_grad()
    def begin(self, transformer: Transformer) -> None:
        for own, parameter in self._averaged(transformer):
            own.copy_(parameter)

    @torch.no_grad()
    def after_step(self, transformer: Transformer) -> None:
        for own, parameter in self._averaged(transformer):
            own.lerp_(parameter, 1 - self.own.decay)

    def _averaged(self, transformer: Transformer) -> list[tuple[Tensor, Tensor]]:
        parameters = dict(transformer.named_parameters())
        return [(own, parameters[name]) for name, own in self.teacher.named_parameters()]

    def forward(self, states: dict[str, Tensor], sequence: TrainingSequence, transformer: Transformer) -> Tensor:
        return self.compare(states, self.teacher_states(sequence))

    @torch.no_grad()
    def teacher_states(self, sequence: TrainingSequence) -> Tensor:
        """(B, N, C): of the image's own inputs, after as many blocks as the model's, given its class where the model
        may have been given the null class."""
        n = sequence.num_regular
        with torch.autocast(sequence.tokens.device.type, enabled=False):
            return self.teacher.hidden(sequence.tokens[:, : n - 1], sequence.labels, sequence.positions[:, :n])


def _pairs(offset: tuple[int, int], own: AlignedStatesConfig, config: TrainConfig) -> tuple[np.ndarray, ...]:
    """Slots of states, and slots of the teacher's: token x_N is in no slot."""
    slots, others = look_ahead(offset, config.model.grid, own.edge)
    known = others < config.model.num_tokens
    first = np.zeros(int(own.class_slot), dtype=np.int64)
    return tuple(np.concatenate([first, each[known]]) for each in (slots, others))

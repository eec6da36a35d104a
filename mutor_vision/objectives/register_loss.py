"""The loss of MuToR's registers (arXiv 2505.10518, equation 4): L = (1 - a) L_next + a L_reg. What registers are is in
registers.py.

Legend: B batch, N slots, R registers.
"""

import dataclasses

import numpy as np
import torch
from torch import Tensor

from mutor_vision.auxiliary_config import RegisterConfig
from mutor_vision.config import TrainConfig
from mutor_vision.model.transformer import Transformer
from mutor_vision.objectives.auxiliary import Auxiliary
from mutor_vision.objectives.cross_entropy import linear_cross_entropy
from mutor_vision.objectives.registers import add_registers, offset_pairs, place_registers
from mutor_vision.objectives.sequence import TrainingSequence
from mutor_vision.runtime import to_device


class RegisterLoss(Auxiliary):
    name = "register"
    own: RegisterConfig

    def __init__(self, own: RegisterConfig, config: TrainConfig):
        super().__init__(own, config)
        self.register_token = config.model.vocab_size
        self.part_names = [f"{d_h - 1},{d_w - 1}" for d_h, d_w in offset_pairs(own).tolist()] if own.active else []
        place_registers(own, config.model.grid, seed=0, sample_index=np.zeros(1, dtype=np.int64))  # does the grid do?

    def extend(self, sequence, codes, *, seed, sample_index, step) -> TrainingSequence:
        own = self.own if step is None else self._at(self.own.max_offset_at(step, self.steps, self.epoch_steps))
        return add_registers(
            sequence, codes, own, register_token=self.register_token, seed=seed, sample_index=sample_index,
            step=step or 0,
        )  # fmt: skip

    def _at(self, max_offset: int) -> RegisterConfig:
        return self.own if max_offset == self.own.max_offset else dataclasses.replace(self.own, max_offset=max_offset)

    def count(self, sequence: TrainingSequence) -> int:
        return sequence.num_register_targets

    def part(self, sequence: TrainingSequence, name: str) -> TrainingSequence:
        """The registers of one offset, which is named as mutor_vision/offsets.py counts."""
        pair = [int(number) + 1 for number in name.split(",")]
        assert sequence.offsets is not None  # extend has set them
        rows = np.flatnonzero((sequence.offsets == pair).all(axis=1))
        kept = sequence.with_target[to_device(torch.from_numpy(rows), sequence.with_target.device)]
        return dataclasses.replace(sequence, with_target=kept, offsets=sequence.offsets[rows])

    def forward(self, states: dict[str, Tensor], sequence: TrainingSequence, transformer: Transformer) -> Tensor:
        """The unembedding sees only the registers that have a target."""
        n, rows = sequence.num_regular, sequence.with_target
        registers, targets = states["last"][:, n:].flatten(0, 1)[rows], sequence.targets[:, n:].flatten()[rows]
        return linear_cross_entropy(registers, transformer.head.weight, targets)

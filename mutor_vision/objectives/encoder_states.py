"""States aligned with the features that an image encoder has of the same part of the image: Mirai-I (arXiv 2601.14671).
The encoder is any of timm's; it ran once, when the token set was made.

Legend: B batch, N slots or cells, F width of the features.
"""

from torch import Tensor

from mutor_vision.auxiliary_config import EncoderStatesConfig
from mutor_vision.config import TrainConfig
from mutor_vision.model.transformer import Transformer
from mutor_vision.objectives.alignment import Alignment
from mutor_vision.objectives.sequence import TrainingSequence
from mutor_vision.offsets import look_ahead


class EncoderStates(Alignment):
    """The state of a cell's token with the features of that cell, or of one at an offset; the class is left out."""

    name = "encoder_states"

    def __init__(self, own: EncoderStatesConfig, config: TrainConfig):
        pairs = [look_ahead(offset, config.model.grid, own.edge) for offset in own.list_of_offsets()]
        super().__init__(own, config, own.features_width, [(slots, cells - 1) for slots, cells in pairs])

    def forward(self, states: dict[str, Tensor], sequence: TrainingSequence, transformer: Transformer) -> Tensor:
        assert sequence.features is not None  # the configuration says reads_features
        return self.compare(states, sequence.features)

"""An image completed from its first codes, by every decoder: they see a model that is certain of these codes."""

import dataclasses
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mutor_vision.data import images
from mutor_vision.errors import UserError
from mutor_vision.model.transformer import Transformer
from mutor_vision.sampling.load import LoadedModel

# Probability 1 for a kept code and 0 for the others, by whatever guidance, filter and temperature up to 80: both
# streams have the same logits, so guidance leaves them alone. Infinities would not survive their difference.
CERTAIN = 1e4


class Completing:
    """A Transformer, as decoders call it, whose first K tokens are `kept` in every image. The kept tokens go through
    the passes that drawn ones go through, so what follows has the bits it would have had after drawing them."""

    def __init__(self, model: Transformer, kept: Tensor):
        """kept (K,) int64 codes in raster order, on the model's device. Raises UserError when there are too many."""
        if not 0 < len(kept) < model.config.num_tokens:
            raise UserError(f"{len(kept)} codes are kept, expected 1 to {model.config.num_tokens - 1}")
        self._model, self._kept = model, kept

    def __getattr__(self, name: str):
        return getattr(self._model, name)

    def __call__(self, tokens, labels, positions, pattern=None, cache=None) -> Tensor:
        """As Transformer.forward: the input at slot p predicts token number p, also where it is a register."""
        logits = self._model(tokens, labels, positions, pattern, cache)
        codes = self._kept[positions.clamp(max=len(self._kept) - 1)]  # (B or 1, T)
        certain = torch.zeros_like(logits).scatter_(2, codes.expand(logits.shape[:2])[:, :, None], CERTAIN)
        return torch.where((positions < len(self._kept))[:, :, None], certain, logits)


def completing(loaded: LoadedModel, picture: Image.Image, rows: int) -> tuple[LoadedModel, Tensor]:
    """A model that completes `picture` from its first `rows` rows of codes, 0 = half of them; and the picture as the
    tokenizer gets it, cropped, uint8 (3, H, W). Raises UserError for a number of rows that leaves nothing to draw."""
    height, sides = loaded.config.model.grid[0], loaded.image_size
    if sides[0] != sides[1]:
        raise UserError(f"the model draws images of {sides[1]}x{sides[0]} pixels; only square images are completed")
    rows = rows or height // 2
    if not 1 <= rows < height:
        raise UserError(f"--keep-rows is {rows}, expected 1 to {height - 1}: the model draws {height} rows of codes")
    original = images.to_tensor(images.center_crop(picture, sides[0]))
    codes = loaded.tokenizer.encode(images.to_float(original[None]).to(loaded.runtime.device))
    model: Any = Completing(loaded.transformer, codes[0, :rows].flatten())
    return dataclasses.replace(loaded, transformer=model), original

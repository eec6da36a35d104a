"""Class labels -> codes. This module knows no pixels and no files.

Legend: B images, N = h * w tokens, V codebook size.
"""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mutor_vision.errors import UserError
from mutor_vision.model.transformer import Transformer
from mutor_vision.runtime import to_device
from mutor_vision.sampling.decode import Plain
from mutor_vision.sampling.draw import SampleSettings, guidance_scales, noise_keys


class Decoder(Protocol):
    """How codes are drawn. All decoders draw the codes that decode.Plain draws; they differ in how they get there."""

    @property
    def tokens_per_pass(self) -> float:
        """Over the images that this process has drawn so far; 1 before the first."""

    def decode(
        self, model: Transformer, labels: Tensor, keys: Tensor, scales: list[float], settings: SampleSettings,
        count: int,
    ) -> Tensor:  # fmt: skip
        """labels (B,), noise keys (B, N, 2) of draw.noise_keys, the guidance scale of each of N tokens -> the first
        `count` codes (B, count) int64."""


@torch.no_grad()
def generate(
    model: Transformer,
    labels: Tensor,
    settings: SampleSettings,
    *,
    seed: int,
    indices: np.ndarray,
    decoder: Decoder | None = None,
    num_tokens: int = 0,
) -> Tensor:
    """labels (B,) int64 in [0, num_classes) -> codes (B, h, w) int64 in [0, V).

    indices (B,): number of each image in the run. Image i is drawn from the noise of (seed, i) alone. That makes it the
    same in every batch, order and number of processes, and by every decoder, as far as the logits are: a model that
    prepare.prepare has packed for the CPU computes a row alike in every batch; any other may round differently (a batch
    of one takes another kernel than a batch of twelve, and then about 3 of 1,000 tokens differ at V = 16384).

    decoder: None = Plain. num_tokens above 0 stops after as many, for benchmarks, and gives codes (B, num_tokens).
    """
    config = model.config
    if settings.top_k > config.vocab_size:
        raise UserError(f"top_k is {settings.top_k}, expected at most the codebook's {config.vocab_size}; 0 = all")
    n = config.num_tokens
    keys = to_device(noise_keys(seed, np.asarray(indices), n), labels.device)
    codes = (decoder or Plain()).decode(model, labels, keys, guidance_scales(settings, n), settings, num_tokens or n)
    return codes if num_tokens else codes.unflatten(1, config.grid)

"""Class labels -> codes: one token after another over a key-value cache. Registers are not used here. This module knows
no pixels and no files.

Legend: B images, N = h * w tokens, V codebook size.
"""

import numpy as np
import torch
from torch import Tensor

from mutor_vision.errors import UserError
from mutor_vision.keyed_random import uniforms
from mutor_vision.model.cache import KVCache
from mutor_vision.model.transformer import Transformer, compute_dtype
from mutor_vision.runtime import float64_device, to_device
from mutor_vision.sampling.draw import SampleSettings, draw, filtered_probabilities, guidance_scales


@torch.no_grad()
def generate(
    model: Transformer,
    labels: Tensor,
    settings: SampleSettings,
    *,
    seed: int,
    indices: np.ndarray,
    static=None,
    num_tokens: int = 0,
) -> Tensor:
    """labels (B,) int64 in [0, num_classes) -> codes (B, h, w) int64 in [0, V).

    indices (B,): number of each image in the run. Image i is drawn from the uniforms of (seed, i) alone. That makes it
    the same in every batch, order and number of processes as far as the logits are: a model that prepare.prepare has
    packed for the CPU computes a row alike in every batch; any other may round differently (a batch of one takes
    another kernel than a batch of twelve, and then about 3 of 1,000 tokens differ at V = 16384).

    The two streams of guidance share a batch and part after the last guided token. static: steps of static shape made
    for this model. num_tokens above 0 stops after as many, for benchmarks, and gives codes (B, num_tokens).
    """
    config = model.config
    if settings.top_k > config.vocab_size:
        raise UserError(f"top_k is {settings.top_k}, expected at most the codebook's {config.vocab_size}; 0 = all")
    n = config.num_tokens
    uniform = to_device(torch.from_numpy(uniforms(seed, "sample", indices, n)), float64_device(labels.device))
    scales = guidance_scales(settings, n)
    decoder = decode if static is None else static.decode
    codes = decoder(model, labels, uniform, scales, settings, num_tokens or n)
    return codes if num_tokens else codes.unflatten(1, config.grid)


def decode(
    model: Transformer, labels: Tensor, uniform: Tensor, scales: list[float], settings: SampleSettings, count: int
) -> Tensor:
    """labels (B,), uniform (B, N) -> the first `count` codes (B, count), one after another in shapes that grow."""
    batch, num_guided = len(labels), num_guided_tokens(scales)
    rows = streams(model, labels, num_guided)
    cache = KVCache(model.config, len(rows), device=labels.device, dtype=compute_dtype(model.token_embedding.weight))
    slots = torch.arange(len(scales), device=labels.device)[None]
    codes = torch.empty(batch, count, dtype=torch.int64, device=labels.device)
    tokens, first_labels = rows.new_empty(len(rows), 0), rows
    for i in range(count):
        guided = i < num_guided
        if i == num_guided > 0:
            cache = cache.rows(batch)
        scale = scales[i] if guided else None
        slot = slots[:, i : i + 1]
        codes[:, i] = next_codes(model, tokens, first_labels, slot, cache, scale, uniform[:, i], settings)
        tokens, first_labels = codes[:, i : i + 1], None
        if i + 1 < num_guided:
            tokens = tokens.repeat(2, 1)
    return codes


def next_codes(model, tokens, labels, positions, cache, scale, uniform, settings) -> Tensor:
    """One step: the inputs of Transformer.forward, guidance `scale` or None, uniform (B,) -> codes (B,)."""
    logits = model(tokens, labels, positions, cache=cache)[:, -1]
    if scale is not None:
        conditional, unconditional = logits.chunk(2)
        logits = unconditional + scale * (conditional - unconditional)
    return draw(filtered_probabilities(logits, settings), uniform)


def num_guided_tokens(scales: list[float]) -> int:
    """The tokens up to the last guided one. The null class's stream must see all of them, so it ends only there."""
    return max((i + 1 for i, scale in enumerate(scales) if scale != 1), default=0)


def streams(model: Transformer, labels: Tensor, num_guided: int) -> Tensor:
    return torch.cat([labels, torch.full_like(labels, model.null_class)]) if num_guided else labels

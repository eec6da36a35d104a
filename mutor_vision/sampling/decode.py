"""The plain decoder, which the others are held to, and what they share with it.

Legend: B images, R rows (B, or 2 B with the null class's stream), N = h * w tokens, V codebook size.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mutor_vision.model.cache import KVCache
from mutor_vision.model.transformer import Transformer, compute_dtype
from mutor_vision.sampling.draw import SampleSettings, draw, filtered_probabilities


class Plain:
    """One token after another, in shapes that grow. A decoder: see generate.Decoder."""

    tokens_per_pass = 1.0

    def __init__(self, watch: Callable[[Tensor], None] | None = None):
        """watch: called with the codes so far (B, i) after each token."""
        self._watch = watch

    def decode(self, model: Transformer, labels: Tensor, keys: Tensor, scales: list[float], settings: SampleSettings,
               count: int) -> Tensor:  # fmt: skip
        batch, num_guided = len(labels), num_guided_tokens(scales)
        rows = streams(model, labels, num_guided)
        dtype = compute_dtype(model.token_embedding.weight)
        cache = KVCache(model.config, len(rows), device=labels.device, dtype=dtype)
        slots = torch.arange(len(scales), device=labels.device)[None]
        codes = torch.empty(batch, count, dtype=torch.int64, device=labels.device)
        tokens = rows.new_empty(len(rows), 0)
        first: Tensor | None = rows
        for i in range(count):
            if i == num_guided > 0:
                cache = cache.rows(batch)  # the null class's stream ends with the last guided token
            scale = scales[i] if i < num_guided else None
            codes[:, i] = next_codes(model, tokens, first, slots[:, i : i + 1], cache, scale, keys[:, i], settings)
            if self._watch:
                self._watch(codes[:, : i + 1])
            tokens, first = codes[:, i : i + 1], None
            if i + 1 < num_guided:
                tokens = both_streams(tokens)
        return codes


def next_codes(model, tokens, labels, positions, cache, scale, keys, settings) -> Tensor:
    """One step: the inputs of Transformer.forward, guidance `scale` or None, keys (B, 2) -> codes (B,)."""
    logits = model(tokens, labels, positions, cache=cache)[:, -1]
    return draw(filtered_probabilities(guided(logits, scale), settings), keys)


def guided(logits: Tensor, scale) -> Tensor:
    """logits (2 B, ..., V) of both streams -> null + scale * (class - null) (B, ..., V); scale None = no guidance, and
    logits (B, ..., V) of the class's stream."""
    if scale is None:
        return logits
    conditional, unconditional = logits.chunk(2)
    return unconditional + scale * (conditional - unconditional)


def num_guided_tokens(scales: list[float]) -> int:
    """The tokens up to the last guided one. The null class's stream must see all of them, so it ends only there."""
    return max((i + 1 for i, scale in enumerate(scales) if scale != 1), default=0)


def streams(model: Transformer, labels: Tensor, num_guided: int) -> Tensor:
    """labels (B,) -> (R,): followed by as many of the null class, where any token is guided."""
    return torch.cat([labels, torch.full_like(labels, model.null_class)]) if num_guided else labels


def both_streams(x: Tensor) -> Tensor:
    """(B, ...) -> (2 B, ...): the same inputs for the class's stream and the null class's."""
    return torch.cat([x, x])

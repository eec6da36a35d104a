"""Predictions ahead of time as drafts: with lossless speculative sampling (arXiv 2211.17192) a draft from q is kept by
the target p with probability sum_v min(p, q). Measured on given images: p is what the model says of a token when it has
seen all before it, q what a register, or a parallel head, said of it earlier.

Legend: B batch, R registers, N slots, V codebook size.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mutor_vision.config import RegisterConfig
from mutor_vision.model.transformer import Transformer
from mutor_vision.objectives.heads import ParallelHeads
from mutor_vision.objectives.registers import has_target, raster_offset, with_registers
from mutor_vision.objectives.sequence import next_token_sequence


class Drafts(NamedTuple):
    """Of every draft of one offset: B images, R slots in ascending order, those that have a target."""

    acceptance: Tensor  # (S, B, R) in [0, 1] at each of the S guidance scales
    loss: Tensor  # (B, R) nats: the draft's cross-entropy, without guidance
    next_token_loss: Tensor  # (B, R) nats: the model's own, of the same tokens


@torch.no_grad()
def register_drafts(
    model: Transformer, codes: Tensor, labels: Tensor, pair: tuple[int, int], config: RegisterConfig,
    cfg_scales: tuple[float, ...] = (1.0,),
) -> Drafts:  # fmt: skip
    """codes (B, h, w) int64, labels (B,): a register of offset `pair` at every slot with a target (by config.edge).
    With guidance s, p and q are each softmax(null + s (class - null)) of the two streams. The model is in evaluation
    mode."""
    slots = np.arange(int(not config.class_slot), model.config.num_tokens)
    slots = slots[has_target(slots, np.array(pair), config, model.config.grid)][None].repeat(len(codes), axis=0)
    pairs = np.broadcast_to(np.array(pair), (*slots.shape, 2))
    sequence = with_registers(next_token_sequence(codes), codes, slots, pairs, config,
                              register_token=model.register_token)  # fmt: skip
    n, later = sequence.num_regular, torch.from_numpy(slots[0] + raster_offset(pairs[0], codes.shape[2]) - 1)

    def both(labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(sequence.tokens, labels, sequence.positions, sequence.pattern)
        return logits[:, later.to(logits.device)], logits[:, n:]

    return _drafts(both, model, labels, sequence.targets[:, n:], cfg_scales)


@torch.no_grad()
def head_drafts(
    model: Transformer, heads: ParallelHeads, codes: Tensor, labels: Tensor, k: int,
    cfg_scales: tuple[float, ...] = (1.0,),
) -> Drafts:  # fmt: skip
    """The same for parallel head k = 2, 3, ..., which predicts x_(t+k) at slot t."""
    raster = codes.flatten(1)
    slots = torch.arange(raster.shape[1], device=codes.device)[None]

    def both(labels: Tensor) -> tuple[Tensor, Tensor]:
        hidden = model.hidden(raster[:, :-1], labels, slots)
        return model.logits(hidden[:, k - 1 :]), model.logits(heads.ahead(hidden, model.rope)[k - 2])

    return _drafts(both, model, labels, raster[:, k - 1 :], cfg_scales)


def _drafts(both, model: Transformer, labels: Tensor, targets: Tensor, cfg_scales: tuple[float, ...]) -> Drafts:
    target, draft = both(labels)  # logits (B, R, V) of the class's stream
    null_target, null_draft = both(torch.full_like(labels, model.null_class))

    def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        return (unconditional + scale * (conditional - unconditional)).softmax(-1)

    acceptance = [
        torch.minimum(guided(target, null_target, s), guided(draft, null_draft, s)).sum(-1) for s in cfg_scales
    ]
    losses = [-logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0] for logits in (draft, target)]
    return Drafts(torch.stack(acceptance), *losses)

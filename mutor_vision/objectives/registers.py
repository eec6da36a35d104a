"""The method: MuToR's registers with 2D offsets (arXiv 2505.10518, sections 3.2 and 3.4). Pure functions from codes to
a training sequence; no layer, no loss, and no knowledge of the transformer.

The transformer reads N = h * w inputs in slots 0..N-1: slot 0 is the class token, slot t >= 1 holds the t-th token
x_t in raster order, and slot t predicts x_(t+1). A register placed at slot t with offset d

    may attend to    slots 0..t and itself, never another register; nothing attends to it
    predicts         x_(t+d)
    has the position of slot t+d-1, which would normally predict x_(t+d)

In two dimensions the offset is a pair (d_h, d_w), where (1, 1) is the cell of x_t itself and
d = (d_h - 1) * w + (d_w - 1); in mutor_vision/offsets.py, for all losses, pairs count from 0. One dimension is the row
of pairs (1, 2), (1, 3), ...

Legend: B batch, N slots, R registers, V codebook size.
"""

import dataclasses

import numpy as np
import torch
from torch import Tensor

from mutor_vision.auxiliary_config import RegisterConfig
from mutor_vision.errors import UserError
from mutor_vision.keyed_random import uniforms
from mutor_vision.model.attention import AttentionPattern
from mutor_vision.objectives.sequence import NO_TARGET, TrainingSequence
from mutor_vision.offsets import parse_offsets
from mutor_vision.runtime import to_device


def offset_pairs(config: RegisterConfig) -> np.ndarray:
    """(K, 2) int64: the pairs (d_h, d_w) that an offset is drawn from, each as likely as `offset_shares` says."""
    if config.offsets:
        return np.array([(r + 1, c + 1) for r, c in parse_offsets(config.offsets, "registers.offsets")])
    if config.kind == "1d":
        pairs = [(1, d + 1) for d in range(1, config.max_offset + 1)]
    else:
        columns = range(config.min_offset_w, config.max_offset + 1)
        pairs = [(d_h, d_w) for d_h in range(1, config.max_offset + 1) for d_w in columns if d_h > 1 or d_w > 1]
    if not config.next_token:
        pairs.remove((1, 2))
    return np.array(pairs, dtype=np.int64)


def offset_shares(config: RegisterConfig) -> np.ndarray | None:
    """(K,) how likely each pair is, with sum 1; None = all equally."""
    shares = np.array(list(parse_offsets(config.offsets, "registers.offsets").values()))
    return None if len(set(shares.tolist())) < 2 else shares / shares.sum()


def raster_offset(pairs: np.ndarray, width: int) -> np.ndarray:
    """(..., 2) pairs (d_h, d_w) -> (...) offsets d in tokens."""
    return (pairs[..., 0] - 1) * width + pairs[..., 1] - 1


def crosses_edge(slots: np.ndarray, pairs: np.ndarray, width: int) -> np.ndarray:
    """Whether the cell d_w - 1 columns to the right of slot's cell lies outside the grid, so that x_(t+d) is in another
    row than the pair says. The class slot counts as column -1, the cell before the first."""
    column = np.where(slots > 0, (slots - 1) % width, -1) + pairs[..., 1] - 1
    return (column < 0) | (column >= width)


def add_registers(
    sequence: TrainingSequence,
    codes: Tensor,
    config: RegisterConfig,
    *,
    register_token: int,
    seed: int,
    sample_index: np.ndarray,
    step: int = 0,
) -> TrainingSequence:
    """next_token_sequence(codes), with codes (B, h, w) int64 in [0, V) -> the same with config's registers.

    register_token: id of the register's embedding, V. seed and sample_index (B,) fix every draw, whatever the batch;
    step does for offsets drawn per batch. Raises UserError when the grid cannot hold the registers.
    """
    _, h, w = codes.shape
    placed, pairs = place_registers(config, (h, w), seed=seed, sample_index=sample_index, step=step)
    return with_registers(sequence, codes, placed, pairs, config, register_token=register_token)


def with_registers(
    sequence: TrainingSequence, codes: Tensor, placed: np.ndarray, pairs: np.ndarray, config: RegisterConfig, *,
    register_token: int,
) -> TrainingSequence:  # fmt: skip
    """The same with registers at the slots `placed` (B, R) and offset pairs (B, R, 2) that the caller chose."""
    batch, height, width = codes.shape
    n = height * width
    raster = codes.flatten(1)
    target_index = placed + raster_offset(pairs, width) - 1  # 0-based; also the slot of the position
    valid = has_target(placed, pairs, config, (height, width))
    target_index = _to(np.minimum(target_index, n - 1), codes.device)
    register_targets = raster.gather(1, target_index).masked_fill(~_to(valid, codes.device), NO_TARGET)
    registers = raster.new_full(placed.shape, register_token)
    return dataclasses.replace(
        sequence,
        tokens=torch.cat([sequence.tokens, registers], dim=1),
        positions=torch.cat([sequence.positions.expand(batch, -1), target_index], dim=1),
        pattern=AttentionPattern(n, _to(placed, codes.device), config.self_attention),
        targets=torch.cat([sequence.targets, register_targets], dim=1),
        with_target=_to(np.flatnonzero(valid), codes.device),  # by numpy: nonzero() on a GPU would synchronise
        offsets=pairs[valid],
    )


def has_target(slots: np.ndarray, pairs: np.ndarray, config: RegisterConfig, grid: tuple[int, int]) -> np.ndarray:
    """Whether registers at `slots` with offset `pairs` (..., 2) have a token to predict."""
    height, width = grid
    inside = slots + raster_offset(pairs, width) <= height * width
    return inside if config.edge == "wrap" else inside & ~crosses_edge(slots, pairs, width)


def place_registers(
    config: RegisterConfig, grid: tuple[int, int], *, seed: int, sample_index: np.ndarray, step: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Draw slots (B, R), ascending, and offset pairs (B, R, 2).

    Slots are drawn uniformly without replacement; with placement 'valid' those without a target come only when the
    others do not suffice, as when there is one register at every slot.
    """
    n = grid[0] * grid[1]
    slots = np.arange(n)
    allowed = (slots > 0) | config.class_slot
    if config.count > allowed.sum():
        raise UserError(
            f"registers.count is {config.count}, but a {grid[0]}x{grid[1]} grid has {allowed.sum()} slots for them; "
            "use at most that many"
        )
    choices = offset_pairs(config)
    if raster_offset(choices, grid[1]).min() < 1:
        setting = f"offsets '{config.offsets}'" if config.offsets else f"min_offset_w {config.min_offset_w}"
        raise UserError(
            f"registers.{setting} points at or before the token itself on a grid {grid[1]} wide; use {2 - grid[1]} "
            "columns or more"
        )
    if config.offset_per == "batch":
        draws = uniforms(seed, "register offset", np.array([step]), 1).repeat(len(sample_index), axis=0)
    else:
        draws = uniforms(seed, "register offset", sample_index, n if config.offset_per == "register" else 1)
    if (shares := offset_shares(config)) is None:
        drawn = (draws * len(choices)).astype(np.int64)
    else:
        drawn = np.minimum(np.searchsorted(shares.cumsum(), draws, side="right"), len(choices) - 1)
    pairs = np.broadcast_to(choices[drawn], (len(sample_index), n, 2))

    order = uniforms(seed, "register slot", sample_index, n)
    if config.placement == "valid":
        order += ~has_target(slots, pairs, config, grid)
    order += 2.0 * ~allowed
    placed = np.sort(np.argsort(order, axis=1, kind="stable")[:, : config.count], axis=1)
    return placed, np.take_along_axis(pairs, placed[:, :, None], axis=1)


def _to(array: np.ndarray, device: torch.device) -> Tensor:
    return to_device(torch.from_numpy(np.ascontiguousarray(array)), device)

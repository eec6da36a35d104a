"""Logits -> a code: guidance, filtering and the draw. This module knows no model.

Legend: B images, N tokens, V codebook size, R rows: images, or images and positions."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mutor_vision.errors import UserError
from mutor_vision.keyed_random import bits

CFG_SCHEDULES = ("constant", "linear", "power-cosine")
MOST = 1e6  # of a scale or temperature: with more, float32 logits could become infinite, and their draws the code 0
LAW = "gumbel-max 1"  # of `draw`, for protocols: with another law or another noise a seed gives other images


@dataclass(frozen=True)
class SampleSettings:
    """How tokens are drawn. The defaults are the protocol of MuToR's and LlamaGen's published scores."""

    cfg_scale: float = 2.0  # classifier-free guidance s: null + s * (class - null); 1 = none
    cfg_schedule: str = "constant"  # constant | linear (1 to s over the tokens) | power-cosine (RAR)
    cfg_power: float = 2.75  # exponent of power-cosine
    cfg_interval: tuple[int, int] = (0, 0)  # tokens [first, end) that are guided; end 0 = to the last
    temperature: float = 1.0  # 0 = the most likely token
    top_k: int = 0  # keep the k most likely tokens, 0 = all
    top_p: float = 1.0  # keep the most likely tokens up to this share of probability, 1 = all

    def __post_init__(self) -> None:
        for name, value, valid, expected in (
            ("cfg_scale", self.cfg_scale, 0 <= self.cfg_scale <= MOST, "0 to 1e6 (1 = no guidance)"),
            ("cfg_power", self.cfg_power, 0 < self.cfg_power < math.inf, "more than 0"),
            ("temperature", self.temperature, self.temperature == 0 or 1 / MOST <= self.temperature <= MOST,
             "0 (greedy), or 1e-6 to 1e6"),
            ("top_k", self.top_k, self.top_k >= 0, "0 or more (0 = all)"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "more than 0 and at most 1 (1 = all)"),
            ("cfg_schedule", self.cfg_schedule, self.cfg_schedule in CFG_SCHEDULES, ", ".join(CFG_SCHEDULES)),
            ("cfg_interval", self.cfg_interval, _is_interval(self.cfg_interval), "first,end with 0 <= first < end"),
        ):  # fmt: skip
            if not valid:
                raise UserError(f"{name} is {value}, expected {expected}")


def guidance_scales(settings: SampleSettings, num_tokens: int) -> list[float]:
    """The scale at each of N tokens; 1 where guidance is off.

    Linear: 1 + (s - 1) i / (N - 1), as in MAR. Power-cosine: 1 + (s - 1) (1 - cos(pi (i / N)^power)) / 2, as in RAR
    (arXiv 2411.00776).
    """
    first, end = settings.cfg_interval
    end = end or num_tokens
    scales = []
    for i in range(num_tokens):
        if settings.cfg_schedule == "constant":
            ramp = 1.0
        elif settings.cfg_schedule == "linear":
            ramp = i / max(1, num_tokens - 1)
        else:
            ramp = (1 - math.cos(math.pi * (i / num_tokens) ** settings.cfg_power)) / 2
        scales.append(1 + (settings.cfg_scale - 1) * ramp if first <= i < end else 1.0)
    return scales


def filtered_probabilities(logits: Tensor, settings: SampleSettings) -> Tensor:
    """logits (R, V) -> float32 probabilities after temperature, top-k (ties kept) and top-p, in LlamaGen's order."""
    logits = logits.float()
    if settings.temperature == 0:
        return torch.zeros_like(logits).scatter_(1, logits.argmax(-1, keepdim=True), 1.0)
    logits = logits / settings.temperature
    if 0 < settings.top_k < logits.shape[-1]:
        smallest = logits.topk(settings.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if settings.top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # the token that crosses top_p stays
        drop = (before > settings.top_p).scatter(1, order, before > settings.top_p)
        logits = logits.masked_fill(drop, -math.inf)
    return logits.softmax(-1)


def noise_keys(seed: int, indices: np.ndarray, num_tokens: int) -> Tensor:
    """(B,) numbers of images -> (B, N, 2) int32 on the CPU: what the noise of each image and token is computed from."""
    keys = bits(seed, "sample", indices, num_tokens)
    return torch.from_numpy(keys.view(np.int32).reshape(len(indices), num_tokens, 2))


def draw(probabilities: Tensor, keys: Tensor) -> Tensor:
    """probabilities (R, V) float32, keys (R, 2) int32 of noise_keys -> (R,) int64: code v with its probability.

    The Gumbel-max draw, argmax(log p + g) with Gumbel noise g, as argmin(E / p) with E = exp(-g), which is exponential.
    Noise belongs to an image, a position and a code, so two nearly equal distributions at one position nearly always
    give the same code: that is what a forecast can hit (arXiv 2002.09928). A code of probability 0 is never drawn.
    """
    return (exponentials(keys, probabilities.shape[-1]) / probabilities).argmin(-1)


def exponentials(keys: Tensor, count: int) -> Tensor:
    """keys (R, 2) int32 -> (R, count) float32, independent and exponential with mean 1, by a hash of (key, column). Its
    steps of 2^-31 bias probabilities of less than about 1e-9."""
    # Multipliers of Wang's hash-prospector search; int32 products wrap, and & undoes the sign that >> copies.
    x = torch.arange(1, count + 1, dtype=torch.int32, device=keys.device).mul_(-1640531527) + keys[:, :1]
    x = x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(0x21F0AAAD)
    x = x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).add_(keys[:, 1:]).mul_(0x735A2D97)
    x = x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(0x2C1B3C6D)
    x = x.bitwise_xor_((x >> 12).bitwise_and_(0xFFFFF)).bitwise_and_(0x7FFFFFFF)
    uniform = x.float().add_(0.5).mul_(2**-31).clamp_(max=1 - 2**-24)
    return uniform.neg_().log1p_().neg_()


def _is_interval(interval: tuple[int, ...]) -> bool:
    return len(interval) == 2 and 0 <= interval[0] and (interval[1] == 0 or interval[0] < interval[1])

"""Logits -> a code: guidance, filtering and the draw. This module knows no model.

Legend: B images, N tokens, V codebook size."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mutor_vision.errors import UserError

CFG_SCHEDULES = ("constant", "linear", "power-cosine")


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
            ("cfg_scale", self.cfg_scale, 0 <= self.cfg_scale < math.inf, "0 or more (1 = no guidance)"),
            ("cfg_power", self.cfg_power, 0 < self.cfg_power < math.inf, "more than 0"),
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 or more (0 = greedy)"),
            ("top_k", self.top_k, self.top_k >= 0, "0 or more (0 = all)"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "more than 0 and at most 1 (1 = all)"),
            ("cfg_schedule", self.cfg_schedule, self.cfg_schedule in CFG_SCHEDULES, ", ".join(CFG_SCHEDULES)),
            ("cfg_interval", self.cfg_interval, _is_interval(self.cfg_interval), "first,end with 0 <= first < end"),
        ):
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
    """logits (B, V) -> float32 probabilities after temperature, top-k (ties kept) and top-p, in LlamaGen's order."""
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


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Invert the distribution function: probabilities (B, V), uniform (B,) float64 in [0, 1) -> (B,) int64. A token of
    probability 0 is never drawn. Computed where `uniform` is, since a device may lack float64."""
    cumulative = probabilities.to(uniform.device).double().cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return drawn.clamp(max=probabilities.shape[-1] - 1).to(probabilities.device)


def _is_interval(interval: tuple[int, ...]) -> bool:
    return len(interval) == 2 and 0 <= interval[0] and (interval[1] == 0 or interval[0] < interval[1])

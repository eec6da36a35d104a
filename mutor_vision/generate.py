"""Class labels -> codes: guidance, filtering, and one token after another over a static key-value cache. Registers are
not used here. This module knows no pixels and no files.

Legend: B images, N = h * w tokens, V codebook size.
"""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from mutor_vision.errors import UserError
from mutor_vision.keyed_random import uniforms
from mutor_vision.runtime import to_device
from mutor_vision.transformer import KVCache, StaticStep, Transformer

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
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
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
    probability 0 is never drawn."""
    cumulative = probabilities.double().cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return drawn.clamp(max=probabilities.shape[-1] - 1)


@torch.no_grad()
def generate(
    model: Transformer,
    labels: Tensor,
    settings: SampleSettings,
    *,
    seed: int,
    indices: np.ndarray,
    static: "StaticSteps | None" = None,
    num_tokens: int = 0,
) -> Tensor:
    """labels (B,) int64 in [0, num_classes) -> codes (B, h, w) int64 in [0, V).

    indices (B,): number of each image in the run. Image i is drawn from the uniforms of (seed, i) alone, so it depends
    on no batch size, order or number of processes. The two streams of guidance share a batch and part after the last
    guided token. static: steps of static shape made for this model. num_tokens above 0 stops after as many, for
    benchmarks, and gives codes (B, num_tokens).
    """
    config = model.config
    if settings.top_k > config.vocab_size:
        raise UserError(f"top_k is {settings.top_k}, expected at most the codebook's {config.vocab_size}; 0 = all")
    n = config.num_tokens
    uniform = to_device(torch.from_numpy(uniforms(seed, "sample", indices, n)), labels.device)
    scales = guidance_scales(settings, n)
    decode = _decode if static is None else static.decode
    codes = decode(model, labels, uniform, scales, settings, num_tokens or n)
    return codes if num_tokens else codes.unflatten(1, config.grid)


def _decode(
    model: Transformer, labels: Tensor, uniform: Tensor, scales: list[float], settings: SampleSettings, count: int
) -> Tensor:
    """labels (B,), uniform (B, N) -> the first `count` codes (B, count), one after another in shapes that grow."""
    batch, num_guided = len(labels), _num_guided(scales)
    rows = _streams(model, labels, num_guided)
    cache = KVCache(model.config, len(rows), device=labels.device, dtype=_compute_dtype(model))
    slots = torch.arange(len(scales), device=labels.device)[None]
    codes = torch.empty(batch, count, dtype=torch.int64, device=labels.device)
    tokens, first_labels = rows.new_empty(len(rows), 0), rows
    for i in range(count):
        guided = i < num_guided
        if i == num_guided > 0:
            cache = cache.rows(batch)
        scale = scales[i] if guided else None
        codes[:, i] = _next(model, tokens, first_labels, slots[:, i : i + 1], cache, scale, uniform[:, i], settings)
        tokens, first_labels = codes[:, i : i + 1], None
        if i + 1 < num_guided:
            tokens = tokens.repeat(2, 1)
    return codes


def _next(model, tokens, labels, positions, cache, scale, uniform, settings) -> Tensor:
    """One step: the inputs of Transformer.forward, guidance `scale` or None, uniform (B,) -> codes (B,)."""
    logits = model(tokens, labels, positions, cache=cache)[:, -1]
    if scale is not None:
        conditional, unconditional = logits.chunk(2)
        logits = unconditional + scale * (conditional - unconditional)
    return draw(filtered_probabilities(logits, settings), uniform)


class StaticSteps:
    """The same decoding in steps of static shape, on CUDA recorded as graphs and replayed without Python: one graph for
    each number of cache slots read (multiples of REACH) and of streams. Memory and graphs are kept for the batches that
    follow, smaller ones included; a larger batch or other settings replace them."""

    REACH = 64

    def __init__(self, backend: str = ""):
        """backend: torch.compile's for each step; '' = none; 'inductor' fuses the small kernels, at the price of some
        minutes of compilation."""
        self._step = _static_step
        if backend:
            import torch._dynamo

            # The default of 8 shapes would send those after it through Python again.
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
            self._step = torch.compile(_static_step, backend=backend, dynamic=False, fullgraph=True)
        self._made_for = None

    def decode(self, model, labels, uniform, scales, settings, count) -> Tensor:
        """As _decode."""
        batch, num_guided = len(labels), _num_guided(scales)
        self._prepare(model, batch, uniform, scales, settings)
        size = len(self._codes)
        self._uniform[:batch] = uniform
        rows = _streams(model, torch.nn.functional.pad(labels, (0, size - batch)), num_guided)
        self._cache.length = 0
        first, empty = self._position.zero_()[None], rows.new_empty(len(rows), 0)
        scale = scales[0] if num_guided else None
        self._codes[:, 0] = _next(model, empty, rows, first, self._cache, scale, self._uniform[:, 0], settings)
        for i in range(1, count):
            self._position.fill_(i)
            reach = min(len(scales), -(-(i + 1) // self.REACH) * self.REACH)
            self._recorded(model, settings, reach, i < num_guided)()
        return self._codes[:batch, :count].clone()

    def _prepare(self, model, batch: int, uniform: Tensor, scales: list[float], settings: SampleSettings) -> None:
        device, dtype = uniform.device, _compute_dtype(model)
        made_for = (model, settings, dtype)
        if self._made_for == made_for and batch <= len(self._codes):
            return
        self._made_for, self._steps = made_for, {}
        num_streams = 2 if _num_guided(scales) else 1
        self._cache = KVCache(model.config, num_streams * batch, device=device, dtype=dtype)
        self._codes = torch.zeros(batch, len(scales), dtype=torch.int64, device=device)
        self._uniform = torch.zeros(batch, len(scales), dtype=torch.float64, device=device)
        self._scales = torch.tensor(scales, device=device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)

    def _recorded(self, model, settings, reach: int, guided: bool):
        if (reach, guided) not in self._steps:
            cache = self._cache if guided else self._cache.rows(len(self._codes))
            scales = self._scales if guided else None
            tensors = self._codes, self._uniform, scales, self._position
            step = partial(self._step, model, cache, *tensors, reach, settings)
            self._steps[reach, guided] = _graph(step) if self._codes.device.type == "cuda" else step
        return self._steps[reach, guided]


def _static_step(model, cache, codes, uniform, scales, position, reach, settings) -> None:
    """Code `position` (1,) of codes (B, N) from the ones before it. Doing it twice changes nothing."""
    tokens = codes.index_select(1, position - 1)
    if scales is not None:
        tokens = tokens.repeat(2, 1)
    scale = None if scales is None else scales[position]
    drawn = _next(
        model, tokens, None, position[None], StaticStep(cache, position, reach), scale,
        uniform.index_select(1, position)[:, 0], settings,
    )  # fmt: skip
    codes.index_copy_(1, position, drawn[:, None])


def _graph(step):
    """A function on CUDA tensors that stay where they are -> the same as a graph to replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels are compiled, chosen and warmed up outside the recording
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _num_guided(scales: list[float]) -> int:
    """The tokens up to the last guided one. The null class's stream must see all of them, so it ends only there."""
    return max((i + 1 for i, scale in enumerate(scales) if scale != 1), default=0)


def _streams(model: Transformer, labels: Tensor, num_guided: int) -> Tensor:
    return torch.cat([labels, torch.full_like(labels, model.null_class)]) if num_guided else labels


def _compute_dtype(model: Transformer) -> torch.dtype:
    weight = model.token_embedding.weight
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


def _is_interval(interval: tuple[int, ...]) -> bool:
    return len(interval) == 2 and 0 <= interval[0] and (interval[1] == 0 or interval[0] < interval[1])

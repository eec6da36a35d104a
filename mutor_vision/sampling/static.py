"""Decoding in fixed shapes for CUDA graphs: one graph for each (number of cache slots read, guided or not), replayed
without Python for every token. `static_step` obeys the rules of such a recording: no allocation whose size depends on
data, no synchronisation, the same addresses every time. `record_graph` is the only code here that needs CUDA.

Legend: B images, N = h * w tokens.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mutor_vision.model.cache import KVCache, StaticStep
from mutor_vision.model.transformer import compute_dtype
from mutor_vision.sampling.decode import both_streams, next_codes, num_guided_tokens, streams
from mutor_vision.sampling.draw import SampleSettings

Step = Callable[[], object]


class StaticSteps:
    """A decoder: see generate.Decoder. The cache is read up to a multiple of REACH slots, so that a few graphs serve
    all tokens. Graphs and memory are kept for later batches of at most this size; they are rebuilt if the batch grows
    or the settings change."""

    REACH = 64
    tokens_per_pass = 1.0
    _made_for: tuple | None
    _cache: KVCache | Any  # None only while a new one is made
    _codes: Tensor
    _steps: dict[tuple[int, bool], Step]

    def __init__(self, backend: str = "", record: Callable[[Step], Step] | None = None):
        """backend: torch.compile's for each step; '' = none; 'inductor' fuses the small kernels, at the price of some
        minutes of compilation. record: a step -> what is called in its place; None = CUDA graphs on CUDA, else the step
        itself."""
        self._step = static_step
        if backend:
            import torch._dynamo

            # The default of 8 shapes would send those after it through Python again.
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
            self._step = torch.compile(static_step, backend=backend, dynamic=False, fullgraph=True)
        self._record = record
        self._made_for = None

    def decode(self, model, labels, keys, scales, settings, count) -> Tensor:
        """As decode.Plain.decode."""
        batch, num_guided = len(labels), num_guided_tokens(scales)
        self._prepare(model, batch, keys, scales, settings)
        size = len(self._codes)
        self._keys[:batch] = keys
        rows = streams(model, torch.nn.functional.pad(labels, (0, size - batch)), num_guided)
        self._cache.length = 0
        first, empty = self._position.zero_()[None], rows.new_empty(len(rows), 0)
        scale = scales[0] if num_guided else None
        self._codes[:, 0] = next_codes(model, empty, rows, first, self._cache, scale, self._keys[:, 0], settings)
        for i in range(1, count):
            self._position.fill_(i)
            reach = min(len(scales), -(-(i + 1) // self.REACH) * self.REACH)
            self._recorded(model, settings, reach, i < num_guided)()
        return self._codes[:batch, :count].clone()

    def _prepare(self, model, batch: int, keys: Tensor, scales: list[float], settings: SampleSettings) -> None:
        device, dtype = keys.device, compute_dtype(model.token_embedding.weight)
        made_for = (model, settings, dtype)
        if self._made_for == made_for and batch <= len(self._codes):
            return
        self._made_for, self._steps = made_for, {}
        self._cache = None  # the old one goes before the new one comes: a cache can be most of a GPU's memory
        num_streams = 2 if num_guided_tokens(scales) else 1
        self._cache = KVCache(model.config, num_streams * batch, device=device, dtype=dtype)
        self._codes = torch.zeros(batch, len(scales), dtype=torch.int64, device=device)
        self._keys = torch.zeros(batch, len(scales), 2, dtype=torch.int32, device=device)
        self._scales = torch.tensor(scales, device=device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._recorder = recorder_on(device, self._record) or (lambda step: step)

    def _recorded(self, model, settings, reach: int, guided: bool) -> Step:
        if (reach, guided) not in self._steps:
            cache = self._cache if guided else self._cache.rows(len(self._codes))
            scales = self._scales if guided else None
            tensors = self._codes, self._keys, scales, self._position
            step = partial(self._step, model, cache, *tensors, reach, settings)
            self._steps[reach, guided] = self._recorder(step)
        return self._steps[reach, guided]


def static_step(
    model, cache: KVCache, codes: Tensor, keys: Tensor, scales: Tensor | None, position: Tensor, reach: int,
    settings: SampleSettings,
) -> None:  # fmt: skip
    """Write code `position` (1,) of codes (B, N) from the ones before it. Doing it twice changes nothing."""
    tokens = codes.index_select(1, position - 1)
    if scales is not None:
        tokens = both_streams(tokens)
    scale = None if scales is None else scales.index_select(0, position)
    drawn = next_codes(
        model, tokens, None, position[None], StaticStep(cache, position, reach), scale,
        keys.index_select(1, position)[:, 0], settings,
    )  # fmt: skip
    codes.index_copy_(1, position, drawn[:, None])


def recorder_on(device: torch.device, record: Callable[[Step], Step] | None) -> Callable[[Step], Step] | None:
    """record if it is given; else what makes CUDA graphs, which share one pool of memory; None where there is no CUDA
    and steps are taken as they are."""
    if record is None and device.type == "cuda":
        return partial(record_graph, pool=torch.cuda.graph_pool_handle())
    return record


def record_graph(step: Step, pool) -> Step:
    """A step on CUDA tensors that stay where they are -> the same as a graph to replay. pool: the memory of what the
    step computes in between, shared by graphs that are replayed one after another."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels are compiled, chosen and warmed up outside the recording
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        step()
    return graph.replay

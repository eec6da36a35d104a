"""Forecast and check: several tokens in one pass, and the very codes that decoding one after another draws.

The noise of every token is fixed beforehand (draw.noise_keys), so token x_p = argmax(log P(. | x_<p) + g_p) is a
function of the tokens before it, and can be guessed. A pass reads the last exact token and W - 1 guesses behind it. The
draw at each input says what follows *if* the guesses up to there are right: those that agree are exact, and one more.
The other draws are the guesses of the next pass. Behind the window come m registers, which draft the tokens that enter
the window next; without registers a guess is the token above. Guesses decide how many passes it takes, never a code.

Sources: predictive sampling (Wiggers and Hoogeboom, arXiv 2002.09928: fixed noise, learned forecasts), speculative
coupled decoding (arXiv 2510.24211). Registers as forecasters are this project's.

Legend: B images, N = h * w tokens, M = W + m inputs of a pass, R rows (B, or 2 B with the null class's stream).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from einops import rearrange
from torch import Tensor

from mutor_vision.config import TrainConfig
from mutor_vision.errors import UserError
from mutor_vision.model.cache import KVCache, WindowStep
from mutor_vision.model.transformer import Transformer, compute_dtype
from mutor_vision.objectives.registers import offset_pairs, raster_offset
from mutor_vision.sampling.decode import both_streams, guided, next_codes, num_guided_tokens, streams
from mutor_vision.sampling.draw import SampleSettings, draw, filtered_probabilities
from mutor_vision.sampling.static import Step, recorder_on


@dataclass
class _Work:
    """A batch of images in the making; each advances on its own."""

    cache: KVCache
    tokens: Tensor  # (B, N + room) int64: token p at p; up to `start` exact, then guesses
    start: Tensor  # (B,) int64: number of exact tokens, also the slot of the last of them
    keys: Tensor  # (B, N, 2) int32, draw.noise_keys
    images: Tensor  # (B,) int64: which image of the batch a row is
    scales: Tensor  # (N,) float32
    steps: dict[tuple[int, bool], Step] = field(default_factory=dict)  # by (reach, whether the null stream is there)

    def rows(self, chosen: Tensor, num_streams: int) -> "_Work":
        """A copy of the chosen rows."""
        both = torch.cat([chosen + stream * len(self.start) for stream in range(num_streams)])
        tensors = (self.tokens[chosen], self.start[chosen], self.keys[chosen], self.images[chosen])
        return _Work(self.cache.selected(both), *tensors, self.scales)


class Forecast:
    """A decoder: see generate.Decoder. passes and tokens are summed over the images that it has drawn: the passes that
    an image took part in, and its tokens."""

    REACH = 64  # cache slots are read in multiples of it, so that a recorded step serves many passes
    _recorder: Callable[[Step], Step] | None
    _kept: _Work | None
    _made_for: tuple | None

    def __init__(self, window: int = 8, drafts: int = 0, record: Callable[[Step], Step] | None = None):
        """window: inputs W in a row, 1 or more. drafts: registers m behind them, see `most_drafts`. record: a step ->
        what is called in its place; None = CUDA graphs on CUDA, else the step itself."""
        if window < 1 or drafts < 0:
            raise UserError(f"window is {window} and drafts {drafts}, expected 1 or more, and 0 or more")
        self.window, self.drafts = window, drafts
        self.passes = self.tokens = 0
        self._record, self._recorder = record, None
        self._kept, self._made_for = None, None

    def decode(self, model, labels, keys, scales, settings, count) -> Tensor:
        """As decode.Plain.decode."""
        self._recorder = record = self._recorder or recorder_on(labels.device, self._record)
        batch, guided_until = len(labels), num_guided_tokens(scales)
        work = self._begin(model, labels, keys, scales, settings, keep=record is not None)
        cache, slots = work.cache, work.cache.keys[0].shape[2]
        codes = labels.new_empty(len(work.start), count)
        self.passes, self.tokens = self.passes + batch, self.tokens + batch * count
        while min(starts := work.start.tolist()) < count:
            going = sum(start < count for start in starts)
            if guided_until and min(starts) >= guided_until:
                guided_until, cache = 0, cache.rows(len(starts))
            if record is None and 4 * going <= 3 * len(starts):  # finished rows would cost as much as the others
                codes[work.images] = work.tokens[:, 1 : count + 1]
                work = replace(work, cache=cache).rows((work.start < count).nonzero()[:, 0], 2 if guided_until else 1)
                cache = work.cache
                continue
            reach = min(slots, -(-(max(starts) + self.window + self.drafts) // self.REACH) * self.REACH)
            if (reach, bool(guided_until)) not in work.steps:
                step: Step = partial(
                    forecast_step, model, cache, work.tokens, work.start, work.keys, work.scales, guided_until, reach,
                    settings, self.window, self.drafts,
                )  # fmt: skip
                if record:  # takes the step a few times, and a step moves on
                    tokens, start = work.tokens.clone(), work.start.clone()
                    step = record(step)
                    work.tokens.copy_(tokens)
                    work.start.copy_(start)
                work.steps[reach, bool(guided_until)] = step
            work.steps[reach, bool(guided_until)]()
            self.passes += going
        codes[work.images] = work.tokens[:, 1 : count + 1]
        return codes[:batch]

    @property
    def tokens_per_pass(self) -> float:
        return self.tokens / self.passes if self.passes else 1.0

    def _begin(self, model: Transformer, labels, keys, scales, settings: SampleSettings, keep: bool) -> _Work:
        """After the first pass, of the class token: one exact token, whose copies are the first guesses. keep: in the
        memory of the batch before, if it was as large, so that what was recorded there can be replayed."""
        n, num_guided, batch = model.config.num_tokens, num_guided_tokens(scales), len(labels)
        dtype = compute_dtype(model.token_embedding.weight)
        made_for, kept = (model, settings, dtype), self._kept
        if not keep or kept is None or made_for != self._made_for or batch > len(kept.start):
            kept = self._kept = None  # the old memory goes before the new comes
            cache = KVCache(model.config, len(streams(model, labels, num_guided)), device=labels.device, dtype=dtype,
                            slots=n + self.window + self.drafts)  # fmt: skip
            kept = _Work(
                cache, labels.new_empty(batch, n + 2 * (self.window + self.drafts) + 1), torch.empty_like(labels),
                torch.empty_like(keys), torch.arange(batch, device=labels.device),
                torch.tensor(scales, device=labels.device),
            )  # fmt: skip
            if keep:
                self._kept, self._made_for = kept, made_for
        kept.keys[:batch] = keys
        padded = torch.nn.functional.pad(labels, (0, len(kept.start) - batch))
        rows = streams(model, padded, num_guided)
        first, scale = labels.new_zeros(1, 1), scales[0] if num_guided else None
        kept.cache.length = 0
        drawn = next_codes(
            model, rows.new_empty(len(rows), 0), rows, first, kept.cache, scale, kept.keys[:, 0], settings
        )
        kept.tokens.copy_(drawn[:, None].expand_as(kept.tokens))
        kept.start.fill_(n)
        kept.start[:batch] = 1
        return kept


def forecast_step(
    model: Transformer, cache: KVCache, tokens: Tensor, start: Tensor, keys: Tensor, scales: Tensor, guided_until: int,
    reach: int, settings: SampleSettings, window: int, drafts: int,
) -> None:  # fmt: skip
    """One pass: moves `start` (B,) and writes what was drawn into `tokens`. It obeys the rules of static.static_step.
    guided_until: the null class's stream is there, and tokens before this one are guided; 0 = there is none."""
    n, width, count = model.config.num_tokens, model.config.grid[1], window + drafts
    slots = start[:, None] + torch.arange(count, device=start.device)  # (B, M)
    registers = torch.full_like(slots[:, window:], model.register_token)
    inputs = torch.cat([tokens.gather(1, slots[:, :window]), registers], dim=1)
    where, starts = slots.clamp(max=n), start
    if guided_until:
        inputs, where, starts = both_streams(inputs), both_streams(where), both_streams(start)
    logits = model(inputs, None, where, cache=WindowStep(cache, starts, count, window, reach))  # (R, M, V)
    token = slots.clamp(max=n - 1)  # the input at slot p draws token p + 1, whose noise and guidance are number p
    if guided_until:
        steered = guided(logits, scales[token][:, :, None])
        logits = torch.where((token < guided_until)[:, :, None], steered, logits[: len(start)])
    row_keys = keys.gather(1, token[:, :, None].expand(-1, -1, 2))
    drawn = draw(
        filtered_probabilities(rearrange(logits, "b m v -> (b m) v"), settings), rearrange(row_keys, "b m k -> (b m) k")
    )
    drawn = rearrange(drawn, "(b m) -> b m", m=count)
    agreeing = (drawn[:, : window - 1] == inputs[: len(start), 1:window]).cumprod(1).sum(1)
    tokens.scatter_(1, slots + 1, drawn)
    # What comes after the last draft enters the window at the next pass: guess the token above.
    entering = slots[:, -1:] + 2 + torch.arange(window, device=start.device)
    tokens.scatter_(1, entering, tokens.gather(1, (entering - width).clamp(min=1)))
    start.add_(agreeing + 1).clamp_(max=n)


class Either:
    """A decoder: see generate.Decoder. Forecasts for up to `up_to` images at once, else another decoder."""

    def __init__(self, forecast: Forecast, other, up_to: int):
        self._forecast, self._other, self._up_to = forecast, other, up_to

    def decode(self, model, labels, keys, scales, settings, count) -> Tensor:
        """As decode.Plain.decode."""
        chosen = self._forecast if len(labels) <= self._up_to else self._other
        return chosen.decode(model, labels, keys, scales, settings, count)

    @property
    def tokens_per_pass(self) -> float:
        return self._forecast.tokens_per_pass


def most_drafts(config: TrainConfig) -> int:
    """How many registers may stand behind the window: the model was trained with offsets 2, 3, ..., m + 1."""
    if not config.registers.active:
        return 0
    trained = set(raster_offset(offset_pairs(config.registers), config.model.grid[1]).tolist())
    return next(d for d in range(2, config.model.num_tokens + 2) if d not in trained) - 2

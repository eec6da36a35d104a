"""Train the class-conditional transformer on a token set: next-token prediction, MuToR-1D or MuToR-2D by preset.

    torchrun --nproc-per-node=8 train/imagenet.py --preset imagenet256-B-mutor-2d-80 --codes CODES --out runs/B-80
    mutor train --preset tiny-imagenet-mutor-2d --codes CODES --out runs/tiny

Fine-tuning: --init RUN starts from any checkpoint and takes its sizes, --set lora_rank=8 trains an adapter on it.

A new run of 5,000 steps or more is tried for half a minute first: what it reads, whether it learns, whether it fits and
how long it will take. Run the same command again to continue.

Any setting can be changed with --set name=value, for example --set registers.count=128 --set lr=1e-4; --dry-run prints
them all. A flag and a --set that contradict each other are an error. Presets, their hardware and their scores are in
mutor_vision/presets.py.
"""

import argparse
import json
from pathlib import Path

from mutor_vision.cli import choose_settings
from mutor_vision.commands.training_flags import add_training
from mutor_vision.presets import TRANSFORMERS
from mutor_vision.settings import to_dict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_training(parser, TRANSFORMERS)
    parser.add_argument("--codes", required=True, help="token set made by tokenizers/encode.py")
    parser.add_argument("--val-codes", help="held-out token set; without it the preset's share is held out")
    parser.add_argument("--skip-preflight", action="store_true", help="begin a long run without trying it first")
    parser.add_argument("--init", help="run to start from instead of random weights; decides the sizes")


def main(arguments: argparse.Namespace) -> None:
    config = choose_settings(
        TRANSFORMERS, arguments.preset, arguments.set, codes=arguments.codes, val_codes=arguments.val_codes,
        init=arguments.init, steps=arguments.steps,
    )  # fmt: skip

    from mutor_vision.data.token_set import TokenSet
    from mutor_vision.runtime import finish, start
    from mutor_vision.storage.outputs import check_out_folder
    from mutor_vision.training.inputs import resolve
    from mutor_vision.training.loop import train
    from mutor_vision.training.preflight import LONG, preflight

    if arguments.dry_run:
        print(json.dumps(to_dict(resolve(config, TokenSet.open(config.codes))), indent=1))
        return
    out = Path(arguments.out)
    if config.steps >= LONG and not arguments.skip_preflight and not (out / "config.json").exists():
        check_out_folder(out)
        preflight(config, out, start(config.precision))
    train(config, out, arguments.track)
    finish()

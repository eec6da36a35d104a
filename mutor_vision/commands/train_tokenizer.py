"""Train a VQ tokenizer on a folder of images.

    mutor train-tokenizer --preset tiny-imagenet --data train/ --val-data val/ --out runs/vq
    torchrun --nproc-per-node=8 tokenizers/train_vq.py --preset vq-16 --data train/ --out runs/vq --set lpips_weights=F

Run the same command again to resume. --dry-run prints the resolved configuration; every name in it is a --set name. A
flag and a --set that contradict each other are an error.
"""

import argparse
import json

from mutor_vision import runtime
from mutor_vision.cli import choose_settings
from mutor_vision.commands.training_flags import add_training
from mutor_vision.presets import TOKENIZERS
from mutor_vision.settings import to_dict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_training(parser, TOKENIZERS)
    parser.add_argument("--data", required=True, help="folder with one sub-folder of images per class")
    parser.add_argument("--val-data", help="the same, held out; default: a share of --data is held out")


def main(arguments: argparse.Namespace) -> None:
    config = choose_settings(
        TOKENIZERS, arguments.preset, arguments.set, data=arguments.data, val_data=arguments.val_data,
        steps=arguments.steps,
    )  # fmt: skip
    if arguments.dry_run:
        print(json.dumps(to_dict(config), indent=1))
        return

    from mutor_vision.tokenizer.train import train_tokenizer

    train_tokenizer(config, arguments.out, arguments.track)
    runtime.finish()

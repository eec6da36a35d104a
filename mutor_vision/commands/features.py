"""Train a small classifier on one's own images, to be used as `--features OUT` by eval/fid.py.

    mutor features --data DIR --image-size 64 --out runs/features [--val-data DIR] [--epochs 20]

DIR has one sub-folder of images for each class. The accuracy on held-out images goes into every result.
Images are held in memory as uint8: 100,000 of 64 pixels are 1.2 GB.
"""

import argparse
import dataclasses
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mutor_vision.commands.flags import LARGEST
from mutor_vision.data.folder import batched, check_apart
from mutor_vision.data.images import center
from mutor_vision.data.reading import Views, open_source, read_batches
from mutor_vision.data.source import Source
from mutor_vision.errors import MismatchError, UserError
from mutor_vision.features.train import FeatureTraining, train
from mutor_vision.keyed_random import check_seed, permutation
from mutor_vision.metrics.evaluate import check_outputs
from mutor_vision.runtime import start


def add_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = FeatureTraining()
    parser.add_argument("--data", required=True, help="folder with one sub-folder of images for each class")
    parser.add_argument("--val-data", help="the same classes, held out; default: a tenth of --data")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--image-size", type=int, default=64, help="pixels, ADM's centre crop (default 64)")
    parser.add_argument(
        "--architecture", default=defaults.architecture, help="any timm model (default resnet10t, slim)"
    )
    parser.add_argument("--epochs", type=int, default=defaults.epochs)
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size)
    parser.add_argument("--lr", type=float, default=defaults.lr)
    parser.add_argument("--shift", type=int, default=defaults.shift, help="pixels of random translation, 0 = off")
    parser.add_argument("--no-flip", action="store_true", help="no mirror images: for digits and letters")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--workers", type=int, default=2, help="image-reading processes (default 2)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")


def main(arguments: argparse.Namespace) -> None:
    if not 8 <= arguments.image_size <= LARGEST or arguments.shift < 0 or not 0 < arguments.lr < math.inf:
        raise UserError(f"--image-size must be 8 to {LARGEST}, --shift 0 or more, and --lr a number of more than 0")
    check_seed(arguments.seed)
    check_apart(arguments.data, arguments.out)
    runtime = start("float32", arguments.device)
    if runtime.world_size > 1:
        raise UserError("features are trained by one process; start it without torchrun")
    check_outputs(runtime, folders=(arguments.out,))
    defaults = FeatureTraining()
    slim = arguments.architecture == defaults.architecture
    config = dataclasses.replace(
        defaults, architecture=arguments.architecture, epochs=arguments.epochs, batch_size=arguments.batch_size,
        lr=arguments.lr, shift=arguments.shift, flip=not arguments.no_flip, seed=arguments.seed,
        channels=defaults.channels if slim else (), stem_width=defaults.stem_width if slim else 0,
    )  # fmt: skip
    folder = open_source(arguments.data)
    if arguments.val_data:
        held_out = open_source(arguments.val_data)
        if held_out.class_names != folder.class_names:
            raise MismatchError(f"{arguments.val_data} has other class folders than {arguments.data}; give the same")
        parts = [(folder, np.arange(len(folder))), (held_out, np.arange(len(held_out)))]
    else:
        order = permutation(arguments.seed, "held out", 0, len(folder))
        count = max(1, len(folder) // 10)
        parts = [(folder, order[count:]), (folder, order[:count])]
    tensors = [tensor for part in parts for tensor in _read(*part, arguments.image_size, arguments.workers)]
    accuracy = train(
        tensors[0], tensors[1], tensors[2], tensors[3], list(folder.class_names), config, arguments.out,
        device=runtime.device, data=Path(arguments.data).name,
    )
    chance = 1 / len(folder.class_names)
    print(f"{arguments.out}: accuracy {accuracy:.1%} on {len(tensors[2]):,} held-out images of "
          f"{len(folder.class_names)} classes (chance {chance:.1%}); use it as --features {arguments.out}")  # fmt: skip


def _read(folder: Source, chosen: np.ndarray, size: int, workers: int) -> tuple[Tensor, Tensor]:
    """uint8 (N, 3, size, size) and int64 (N,) of the chosen images."""
    from mutor_vision.progress import progress

    batches = list(batched(chosen.tolist(), 64))
    views = read_batches(Views(folder, size, center), batches, workers)
    pictures = [batch[:, 0] for batch in progress(views, total=len(batches), desc="reading", unit="batch")]
    return torch.cat(pictures), torch.tensor(folder.labels)[torch.from_numpy(chosen)]

"""Reference statistics of one's own images, in the keys of ADM's reference files.

    mutor reference --data DIR --image-size 256 --out reference.npz
    torchrun --nproc-per-node=8 eval/reference.py --data IMAGENET/train --image-size 256 --out imagenet256.npz

DIR: images at any depth; sub-folders are classes. They are cut by ADM's centre crop. The originals may be JPEG: what
samples are compared with is the data as it is.
"""

import argparse
from pathlib import Path

from mutor_vision.commands.flags import add_extractor
from mutor_vision.errors import UserError
from mutor_vision.features.extractors import load_extractor
from mutor_vision.features.reference import write_reference
from mutor_vision.features.sources import SourceImages
from mutor_vision.metrics.evaluate import check_outputs
from mutor_vision.runtime import finish, start


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help="folder of images")
    parser.add_argument("--out", required=True, type=Path, help="FILE.npz")
    add_extractor(parser)
    parser.add_argument("--allow-unknown-weights", action="store_true", help="accept another Inception; marked")
    parser.add_argument("--keep-images", type=int, default=10_000, help="stored for precision and recall, 0 = none")
    parser.add_argument("--batch-size", type=int, default=50, help="images per forward pass and process (default 50)")
    parser.add_argument("--work", type=Path, help="folder for snapshots, so that a killed run goes on")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")


def main(arguments: argparse.Namespace) -> None:
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size is {arguments.batch_size}, expected 1 or more")
    if arguments.out.suffix != ".npz":
        raise UserError(f"--out is {arguments.out}, expected FILE.npz")
    runtime = start(device=arguments.device)
    check_outputs(runtime, files=(arguments.out,), folders=(arguments.work,))
    source = SourceImages(arguments.data, image_size=arguments.image_size, allow_lossy=True)
    extractor = load_extractor(arguments.features, arguments.weights, arguments.allow_unknown_weights)
    protocol = write_reference(
        source, extractor, runtime, arguments.out, batch=arguments.batch_size, keep_images=arguments.keep_images,
        work=arguments.work,
    )  # fmt: skip
    if runtime.is_main:
        width = extractor.layers["pool"]
        print(f"{arguments.out}: {protocol['n']:,} images of {source.width}x{source.height}, {width} features of "
              f"{extractor.identity['name']} ({extractor.identity['weights']} weights)")  # fmt: skip
        if protocol["n"] <= width:
            print(f"warning: fewer images than the {width} features: distances from this reference compare with "
                  "nothing")  # fmt: skip
    finish()

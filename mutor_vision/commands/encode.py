"""Images -> token set: the codes of every view of every image, for training the transformer.

    mutor encode --tokenizer runs/vq --data train/ --out codes/train
    mutor encode ... --features timm:vit_base_patch14_dinov2.lvd142m@224  # and what a network has of every cell
    torchrun --nproc-per-node=8 tokenizers/encode.py --tokenizer runs/vq --data train/ --out codes/train

Run the same command again to continue after an interruption. The result does not depend on the number of processes.
"""

import argparse

from mutor_vision import runtime


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", required=True, help="tokenizer run, checkpoint or exported folder")
    parser.add_argument("--data", required=True, help="folder with one sub-folder of images per class")
    parser.add_argument("--out", required=True, help="folder of the token set")
    parser.add_argument("--views", default="center-flip", help="center-flip (2 views, default) or ten-crop (10)")
    parser.add_argument("--image-size", type=int, default=0, help="pixels; default: what the tokenizer was trained on")
    parser.add_argument("--batch-size", type=int, default=0, help="crops per forward pass, 0 = by device (default)")
    parser.add_argument(
        "--precision", default="float32", help="float32 (default) or bfloat16: faster, other codes; recorded"
    )
    parser.add_argument("--shard-size", type=int, default=10_000, help="images per file (default 10000)")
    parser.add_argument("--workers", type=int, default=2, help="image-reading processes per rank (default 2)")
    parser.add_argument("--skip-bad", type=int, default=0, metavar="N", help="leave out up to N images that cannot be "
                        "used, and list them in the manifest (default 0: stop)")  # fmt: skip
    parser.add_argument("--verify", action="store_true", help="decode every image first, not its header alone")
    parser.add_argument("--features", default="", help="timm:NAME[@SIZE]: also keep this network's features of each "
                        "cell, for training with encoder_states; 2 bytes a number")  # fmt: skip
    parser.add_argument("--features-weights", default="", help="file of its weights; default: timm's, downloaded")
    parser.add_argument("--weights", default="best", help="best (EMA where there is one, default), ema or model")


def main(arguments: argparse.Namespace) -> None:
    from mutor_vision.tokenizer.encode import EncodeSettings, encode_folder

    settings = EncodeSettings(
        views=arguments.views, image_size=arguments.image_size, batch_size=arguments.batch_size,
        shard_size=arguments.shard_size, weights=arguments.weights, precision=arguments.precision,
    )  # fmt: skip
    where = runtime.start()
    tokens = encode_folder(arguments.tokenizer, arguments.data, arguments.out, settings, where, arguments.workers,
                           arguments.skip_bad, arguments.verify)  # fmt: skip
    if arguments.features:
        from mutor_vision.tokenizer.features import encode_features

        tokens = encode_features(arguments.data, arguments.out, arguments.features, arguments.features_weights, where,
                                 arguments.batch_size, arguments.workers)  # fmt: skip
    if where.is_main:
        height, width = tokens.grid
        print(
            f"{arguments.out}: {tokens.num_images} images of {len(tokens.class_names)} classes, {tokens.num_views} "
            f"views, {height}x{width} codes of {tokens.codebook_size}"
            + (f", features of {tokens.features['name']}" if tokens.features else "")
        )
    runtime.finish()

"""How well a tokenizer reconstructs images: a side-by-side grid, PSNR, SSIM, codebook usage and perplexity.

    mutor reconstruct --tokenizer runs/vq --data val/ --out runs/vq/val

writes grid.png and metrics.json. With --save-images the centre crops and their reconstructions are written as PNG,
in a folder for each class, for reconstruction FID: mutor fid --samples OUT/reconstructions --reference OUT/originals
Run again with the same --out, a new set takes the old one's place when it is complete.
"""

import argparse
import re
import time
from contextlib import ExitStack
from pathlib import Path

import torch

import mutor_vision
from mutor_vision import runtime
from mutor_vision.data.folder import batched, check_apart
from mutor_vision.data.images import center, save_png, to_pil
from mutor_vision.data.reading import Views, open_source, read_batches
from mutor_vision.data.source import Source
from mutor_vision.errors import UserError
from mutor_vision.keyed_random import check_seed, permutation
from mutor_vision.names import title
from mutor_vision.storage.files import write_json, written_folder
from mutor_vision.storage.outputs import check_out_folder

SAVED = ("originals", "reconstructions")  # folders of --save-images


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", required=True, help="tokenizer run, checkpoint or exported folder")
    parser.add_argument("--data", required=True, help="folder with one sub-folder of images per class")
    parser.add_argument("--out", required=True, help="folder for grid.png and metrics.json")
    parser.add_argument("--num", type=int, default=0, help="score this many images, chosen by --seed; default: all")
    parser.add_argument("--grid", type=int, default=32, help="images in the grid (default 32)")
    parser.add_argument("--image-size", type=int, default=0, help="pixels; default: what the tokenizer was trained on")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2, help="image-reading processes (default 2)")
    parser.add_argument("--weights", default="best", help="best (EMA where there is one, default), ema or model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-images", action="store_true", help="also write every image and its reconstruction")


def main(arguments: argparse.Namespace) -> None:
    if arguments.num < 0 or arguments.grid < 1 or arguments.batch_size < 1:
        raise UserError("--num, --grid and --batch-size must be positive")
    check_seed(arguments.seed)

    from mutor_vision.tokenizer.model import load_tokenizer, tokenizer_identity
    from mutor_vision.tokenizer.reconstruction import reconstruct, score_reconstructions, side_by_side

    where, begun, out = runtime.start(), time.monotonic(), Path(arguments.out)
    if where.world_size > 1:
        raise UserError("reconstruct.py runs in one process; start it without torchrun")
    check_apart(arguments.data, out)
    check_out_folder(out)
    if arguments.save_images:
        check_replaceable(out)
    folder = open_source(arguments.data)
    tokenizer = load_tokenizer(arguments.tokenizer, where.device, arguments.weights)
    size = arguments.image_size or tokenizer.config.image_size
    views = Views(folder, size, center)
    order = permutation(arguments.seed, "reconstruct", 0, len(folder))
    chosen = sorted(order[: arguments.num or len(folder)].tolist())
    folder.check(sorted({*chosen, *order[: arguments.grid].tolist()}))
    batches = read_batches(views, list(batched(chosen, arguments.batch_size)), arguments.workers)
    with ExitStack() as sets:
        if arguments.save_images:
            folders = [sets.enter_context(written_folder(out / name)) for name in SAVED]
            batches = saved(batches, chosen, folder, tokenizer, folders, reconstruct)
        scores = score_reconstructions(tokenizer, batches, where)

    in_grid = order[: arguments.grid].tolist()
    shown = torch.cat([views[i] for i in in_grid])
    out.mkdir(parents=True, exist_ok=True)
    names = None if folder.labels is None else [title(folder.class_names[folder.labels[i]]) for i in in_grid]
    save_png(side_by_side(shown, reconstruct(tokenizer, shown)[0], names=names), out / "grid.png")
    protocol = {
        "tokenizer_sha256": tokenizer_identity(tokenizer), "weights": arguments.weights, "image_size": size,
        "crop": "ADM centre crop", "codebook_size": tokenizer.config.codebook_size,
        "psnr": "mean over images of the PSNR in dB of uint8 RGB",
        "ssim": "mean over images of SSIM of uint8 RGB, Gaussian window 11, sigma 1.5",
        "source": folder.name, "files_sha256": folder.fingerprint(), "images_in_source": len(folder),
        "seed": arguments.seed, "mutor_vision": mutor_vision.__version__, "torch": torch.__version__,
    }  # fmt: skip
    write_json(out / "metrics.json", {**scores, "protocol": protocol})
    print(
        f"{scores['images']} images: PSNR {scores['psnr']:.2f} dB, SSIM {scores['ssim']:.3f}, {scores['usage']:.1%} of "
        f"{tokenizer.config.codebook_size} codes used, perplexity {scores['perplexity']:.0f}; "
        f"{time.monotonic() - begun:.0f} s; look at {out / 'grid.png'}"
    )


def check_replaceable(out: Path) -> None:
    """Raise UserError when a folder that would be replaced holds anything that this command did not write."""
    for folder in (out / name for name in SAVED):
        found = [path for path in folder.rglob("*") if not path.is_dir()] if folder.is_dir() else []
        others = [path.name for path in found if not re.fullmatch(r"\d{8}\.png", path.name)]
        if others or (folder.exists() and not folder.is_dir()):
            raise UserError(f"{folder} holds something else ({', '.join(others[:3])}); give another --out")


def saved(batches, chosen, source: Source, tokenizer, folders, reconstruct):
    """Pass the batches on, after writing each image and its reconstruction as PNG into the two folders, by class."""
    numbers = iter(chosen)
    for images in batches:
        images = images.flatten(0, 1)
        for original, copy in zip(images, reconstruct(tokenizer, images)[0], strict=True):
            number = next(numbers)
            for picture, folder in zip((original, copy), folders, strict=True):
                path = folder / _class_folder(source, number) / f"{number:08d}.png"
                path.parent.mkdir(exist_ok=True)
                to_pil(picture).save(path)
        yield images


def _class_folder(source: Source, number: int) -> str:
    """The class's name; its id where the name cannot be a folder's, as that of a source without folders."""
    assert source.labels is not None
    label = source.labels[number]
    name = source.class_names[label]
    return name if name == Path(name).name and name not in (".", "..") else f"class {label}"

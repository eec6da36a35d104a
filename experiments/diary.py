"""What a training looks like on its way, and how it goes wrong: grids of a tokenizer and of a transformer at 1, 3, 10,
30 and 100 % of their steps, and of failures that are made on purpose. For docs/training-diary.md.

    python experiments/diary.py --data FOLDER --out runs/diary [--tokenizer RUN]

FOLDER has train/WNID and val/WNID, as for experiments/pictures.py. Every stage is a command of this project, printed
before it runs, and goes on where it was stopped.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from pictures import CLASSES, ROOT, mutor, select
from PIL import Image, ImageDraw

from mutor_vision.cli import Parser, run_command
from mutor_vision.data.images import read_image
from mutor_vision.storage.run_log import read_log

SHARES = (1, 3, 10, 30, 100)  # per cent of the steps
CONSTANT = {"schedule": "constant", "warmup_steps": 0, "sample_every": 0, "log_every": 10}
TOKENIZER = {**CONSTANT, "val_every": 0, "perceptual_weight": 0, "quantize_after": 0}
# Failure -> the share of the steps at which it is looked at, and the settings that make it.
BAD_TOKENIZERS = {
    "learning rate 50 times too high": (10, {"lr": 0.1}),
    "clipping off, learning rate 10 times too high": (10, {"lr": 0.02, "clip": 0}),
    "dead codes are not revived": (30, {"dead_code_steps": 0}),
}
BAD_TRANSFORMERS = {
    "learning rate 30 times too high": (10, {"lr": 0.02, "clip": 0}),
    "labels dropped in 99 of 100 images": (100, {"label_dropout": 0.99}),
}
DRAWN = {
    "guidance 1": ("--cfg-scale", 1), "guidance 2": ("--cfg-scale", 2), "guidance 4": ("--cfg-scale", 4),
    "guidance 20": ("--cfg-scale", 20), "temperature 0.3": ("--cfg-scale", 2, "--temperature", 0.3),
    "temperature 2": ("--cfg-scale", 2, "--temperature", 2),
}  # fmt: skip
CELL, EDGE = 64, 4  # pixels


def main() -> None:
    parser = Parser(prog="experiments/diary.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", type=Path, required=True, help="folder with train/WNID and val/WNID")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "diary")
    parser.add_argument("--tokenizer", default="", help="a finished one for the transformer; default: the diary's own")
    parser.add_argument("--tokenizer-steps", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=2000, help="of the transformer")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="of every transformer")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        select(arguments.data / split, out / "images" / split)

    rows, told = {}, {}
    stages = [("tokenizer", share, {}) for share in SHARES]
    stages += [(name, share, changes) for name, (share, changes) in BAD_TOKENIZERS.items()]
    for name, share, changes in stages:
        run, steps = out / name.replace(" ", "-"), steps_of(share, arguments.tokenizer_steps)
        seen = out / "seen" / f"{run.name}-{share}"
        if not (seen / "metrics.json").exists():
            mutor("train-tokenizer", "--preset", "tiny-imagenet-8x8", "--data", out / "images" / "train", "--out", run,
                  *settings(TOKENIZER | changes | {"steps": steps, "save_every": steps}))  # fmt: skip
            mutor("reconstruct", "--tokenizer", run, "--data", out / "images" / "val", "--out", seen, "--num", 120,
                  "--weights", "model", "--save-images")  # fmt: skip
        metrics = json.loads((seen / "metrics.json").read_text())
        label = f"{share} %" if name == "tokenizer" else name
        told[label] = {key: metrics[key] for key in ("psnr", "usage", "perplexity")} | {"steps": steps}
        paths = sorted((seen / "reconstructions").rglob("*.png"))
        rows["originals"] = row_of(sorted((seen / "originals").rglob("*.png")))
        rows[label] = row_of(paths)
    save(rows, out / "tokenizer.png")

    tokenizer, codes = arguments.tokenizer or out / "tokenizer", out / "codes"
    mutor("encode", "--tokenizer", tokenizer, "--data", out / "images" / "train", "--views", "center", "--out", codes)
    rows, drawn = {}, {}
    stages = [("transformer", share, {}) for share in SHARES]
    stages += [(name, share, changes) for name, (share, changes) in BAD_TRANSFORMERS.items()]
    for name, share, changes in stages:
        run, steps = out / name.replace(" ", "-"), steps_of(share, arguments.steps)
        grid, label = out / f"{run.name}-{share}.png", f"{share} %" if name == "transformer" else name
        if not grid.exists():
            changes = CONSTANT | {"val_fraction": 0.05, "val_every": steps, "val_images": 300} | changes
            mutor("train", "--preset", "pictures-next-token", "--codes", codes, "--out", run, "--skip-preflight",
                  *settings(changes | {"steps": steps, "save_every": steps}),
                  *(word for setting in arguments.set for word in ("--set", setting)))  # fmt: skip
            draw(run, grid, "--cfg-scale", 2)
        losses = {line["step"]: line["val_next_token_ema"] for line in read_log(run) if "val_next_token_ema" in line}
        told[f"transformer, {label}"] = {"steps": steps, "held-out loss": losses[steps]}
        rows[label] = read_image(grid)
    save(rows, out / "transformer.png")
    for name, flags in DRAWN.items():
        if not (path := out / f"{name.replace(' ', '-')}.png").exists():
            draw(out / "transformer", path, *flags)
        drawn[name] = read_image(path)
    save(drawn, out / "drawn.png")
    (out / "told.json").write_text(json.dumps(told, indent=1))
    print(json.dumps(told, indent=1), f"done; look at {out}/tokenizer.png, transformer.png and drawn.png", sep="\n")


def steps_of(share: int, steps: int) -> int:
    return max(1, round(share / 100 * steps))


def settings(values: dict) -> list[str]:
    return [word for name, value in values.items() for word in ("--set", f"{name}={value}")]


def draw(run: Path, grid: Path, *flags: object) -> None:
    """One sample of each class, side by side, without titles."""
    samples = grid.with_suffix(".npz")
    mutor("sample", run, "--num", len(CLASSES), "--seed", 1, "--out", samples, *flags)
    with np.load(samples) as file:
        images = file["arr_0"]
    labels = json.loads(samples.with_name(samples.name + ".json").read_text())["labels_of_images"]
    Image.fromarray(np.concatenate([images[labels.index(label)] for label in range(len(CLASSES))], 1)).save(grid)


def row_of(paths: list[Path]) -> Image.Image:
    """An image of each class folder, side by side."""
    first = {path.parent.name: path for path in reversed(paths)}
    images = [np.asarray(read_image(path)) for _, path in sorted(first.items())]
    return Image.fromarray(np.concatenate(images, 1))


def save(rows: dict[str, Image.Image], path: Path) -> None:
    """The rows below each other, each under its name."""
    height, width = CELL + 18, max(row.width for row in rows.values())
    page = Image.new("RGB", (width + 2 * EDGE, len(rows) * height + EDGE), "white")
    for number, (name, row) in enumerate(rows.items()):
        ImageDraw.Draw(page).text((EDGE, number * height + 3), name, fill="black", font_size=12)
        page.paste(row, (EDGE, number * height + 18))
    page.save(path)


if __name__ == "__main__":
    run_command(main)

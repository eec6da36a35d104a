"""Does fine-tuning with registers help where images are few? Pretrain a small next-token model on 20 classes of Tiny
ImageNet, then fine-tune it on 10 others with 20 images a class: next-token or MuToR-2D, everything or LoRA.

    python experiments/fine_tuning.py --zips DIR --work /tmp/fine-tuning     # run again to continue where it stopped
    python experiments/fine_tuning.py --table                                # results -> docs/fine-tuning.md

DIR holds tiny-imagenet-a.zip and tiny-imagenet-b.zip (train/<class>/*.JPEG, val/<class>/*.JPEG). Images are cut to 32
pixels, 8x8 tokens. Settings were fixed before the first result; nothing was chosen by the held-out images.
"""

import dataclasses
import json
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
from comparison import t_interval
from subset import subset

from mutor_vision.cli import Parser, run_command
from mutor_vision.config import RegisterConfig, TokenizerConfig, TokenizerTrainConfig, TrainConfig, TransformerConfig
from mutor_vision.data.token_set import TokenSet
from mutor_vision.errors import UserError
from mutor_vision.keyed_random import choose
from mutor_vision.storage.files import write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_suffix(".json")
PAGE = ROOT / "docs" / "fine-tuning.md"
SEEDS = (0, 1, 2)  # each with 20 images a class of its own, disjoint
PER_CLASS = 20
SAMPLES = 500  # images behind a Fréchet distance
TOKENIZER = TokenizerTrainConfig(
    model=TokenizerConfig(image_size=32, channels=(16, 32, 32), layers_per_block=1, latent_channels=32, code_dim=8,
                          codebook_size=512, norm_groups=8, attention=False),
    steps=800, batch_size=32, lr=2e-3, schedule="cosine", warmup_steps=50, min_crop_scale=0.8, dead_code_steps=20,
    val_every=400, sample_every=0, save_every=200, workers=0,
)  # fmt: skip
PRETRAINING = TrainConfig(
    model=TransformerConfig(4, 4, 128), steps=300, batch_size=64, lr=1e-3, warmup_steps=20, ema_decay=0.98,
    log_every=50, val_every=150, val_images=500, sample_every=0, save_every=50,
)  # fmt: skip
FINE_TUNING = TrainConfig(
    model=PRETRAINING.model, steps=100, batch_size=20, warmup_steps=10, ema_decay=0.0, log_every=25, val_every=25,
    val_images=500, sample_every=0, save_every=0,
)  # fmt: skip
OBJECTIVES = {"next-token": RegisterConfig(), "MuToR-2D": RegisterConfig("2d", 20)}  # 20 registers over 64 slots
METHODS = {"full": dict(lr=5e-4), "LoRA": dict(lr=2e-3, lora_rank=8, lora_alpha=16.0)}


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--zips", type=Path, help="folder with tiny-imagenet-a.zip and -b.zip")
    parser.add_argument("--work", type=Path, help="folder for images, codes and runs")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no further stage after this long")
    parser.add_argument("--table", action="store_true", help="only write the table into docs/fine-tuning.md")
    arguments = parser.parse_args()
    if not arguments.table:
        begun = time.monotonic()
        for done, stage in stages(arguments.zips, arguments.work):
            if time.monotonic() - begun > arguments.seconds:
                return print("stopped for now; run again to continue", flush=True)
            if not done():
                stage()
    if not results():
        raise UserError(f"{RESULTS} has no results yet; run without --table first")
    write_table(results())


def stages(zips: Path, work: Path):
    """(is it done?, do it) in order."""
    images, codes = work / "images", work / "codes"
    yield lambda: (images / "done").exists(), lambda: unzip(zips, images)
    yield lambda: (work / "vq/checkpoints/step-0000800").exists(), lambda: train_vq(images, work / "vq")
    for name, folder in (("pretrain", "pretrain/train"), ("pretrain-val", "pretrain/val"), ("pool", "target/pool"),
                         ("val", "target/val")):  # fmt: skip
        views = "center-flip" if name == "pool" else "center"
        encode = ["tokenizers/encode.py", "--tokenizer", work / "vq", "--data", images / folder, "--out", codes / name,
                  "--views", views]  # fmt: skip
        yield (
            lambda name=name: (codes / name / "manifest.json").exists(),
            lambda encode=encode: run([*encode, "--batch-size", "100", "--workers", "0"]),
        )
    for seed in SEEDS:
        out = codes / f"few-{seed}"
        yield (
            lambda out=out: (out / "manifest.json").exists(),
            lambda seed=seed, out=out: subset(codes / "pool", slice(seed * PER_CLASS, (seed + 1) * PER_CLASS), out),
        )
    features = ["eval/train_features.py", "--data", images / "target/reference", "--val-data", images / "target/val",
                "--image-size", "32", "--epochs", "4", "--workers", "0", "--out", work / "features"]  # fmt: skip
    yield lambda: (work / "features/config.json").exists(), lambda: run(features)
    reference = ["eval/reference.py", "--data", images / "target/reference", "--image-size", "32", "--features",
                 work / "features", "--keep-images", "0", "--out", work / "reference.npz"]  # fmt: skip
    yield lambda: (work / "reference.npz").exists(), lambda: run(reference)
    base = dataclasses.replace(PRETRAINING, codes=str(codes / "pretrain"), val_codes=str(codes / "pretrain-val"))
    yield lambda: (work / "base/checkpoints/step-0000300").exists(), lambda: pretrain(base, work / "base")
    for seed in SEEDS:
        for objective, registers in OBJECTIVES.items():
            for method, settings in METHODS.items():
                key = f"{objective}, {method}, seed {seed}"
                config = dataclasses.replace(
                    FINE_TUNING, registers=registers, **settings, seed=seed, init=str(work / "base"),
                    codes=str(codes / f"few-{seed}"), val_codes=str(codes / "val"),
                )  # fmt: skip
                yield (
                    lambda key=key: key in results(),
                    lambda key=key, config=config: fine_tune(key, config, work),
                )
    yield lambda: "reconstructions" in results(), lambda: floor(work)


def train_vq(images: Path, out: Path) -> None:
    from mutor_vision.tokenizer.train import train_tokenizer

    data = {"data": str(images / "pretrain/train"), "val_data": str(images / "pretrain/val")}
    train_tokenizer(dataclasses.replace(TOKENIZER, **data), out)


def pretrain(config: TrainConfig, out: Path) -> None:
    from mutor_vision.training.loop import train

    train(config, out)


def run(command: list) -> None:
    subprocess.run([sys.executable, *map(str, command)], check=True, cwd=ROOT)


def unzip(zips: Path, images: Path) -> None:
    """20 classes of the first file to pretrain; 10 of the second, the target: 60 images a class for the few, the other
    440 as reference of the Fréchet distance, and 50 held out for the loss."""
    for letter, part, count in (("a", "pretrain", 20), ("b", "target", 10)):
        with zipfile.ZipFile(zips / f"tiny-imagenet-{letter}.zip") as archive:
            paths = [re.match(r"(train|val)/(n\d+)/([\w.]+)$", name) for name in sorted(archive.namelist())]
            paths = [match for match in paths if match]
            classes = sorted({match[2] for match in paths})[:count]
            taken = dict.fromkeys(classes, 0)  # training images so far
            for match in paths:
                split, name, file = match.groups()
                if name not in classes:
                    continue
                if split == "train":
                    taken[name] += 1
                    if part == "target":
                        split = "pool" if taken[name] <= len(SEEDS) * PER_CLASS else "reference"
                path = images / part / split / name / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.read(match[0]))
    (images / "done").touch()


def fine_tune(key: str, config: TrainConfig, work: Path) -> None:
    """One run, its held-out loss along the way, and the Fréchet distance of its samples."""
    from mutor_vision.runtime import start
    from mutor_vision.sampling.draw import SampleSettings
    from mutor_vision.sampling.load import load
    from mutor_vision.sampling.stream import label_plan, sample_in_order
    from mutor_vision.storage.run_log import read_log
    from mutor_vision.training.loop import train

    out = work / "runs" / re.sub(r"[ ,]+", "-", key)
    begun = time.monotonic()
    train(config, out)
    seconds = time.monotonic() - begun
    runtime = start("float32", "cpu")
    adapter = {"adapter": out} if config.lora_rank else {}
    loaded = load(work / "base" if adapter else out, runtime, **adapter)
    labels = label_plan(SAMPLES, 10, "balanced", 0)
    stream = sample_in_order(loaded, labels, SampleSettings(cfg_scale=2.0), 0, 125)
    weights = out / "checkpoints" / f"step-{config.steps:07d}" / "model.safetensors"
    keep(key, {
        "held_out": {line["step"]: line["val_next_token"] for line in read_log(out) if "val_next_token" in line},
        "train": [line["next_token"] for line in read_log(out) if "next_token" in line][-1],
        "fd": distance(work, stream), "megabytes": round(weights.stat().st_size / 1e6, 2), "seconds": round(seconds),
    })  # fmt: skip


def floor(work: Path) -> None:
    """The distance of real held-out images that went through the tokenizer: what no model here can beat by much."""
    from mutor_vision.data.images import to_uint8
    from mutor_vision.tokenizer.model import load_tokenizer

    tokens, tokenizer = TokenSet.open(work / "codes/val"), load_tokenizer(work / "vq")
    chosen = choose(0, "floor", tokens.num_images, SAMPLES)
    codes = tokens.codes()[chosen, 0].long().unflatten(1, tokens.grid)
    keep("reconstructions", {"fd": distance(work, (to_uint8(tokenizer.decode(part)) for part in codes.split(125)))})


def distance(work: Path, batches) -> float:
    from mutor_vision.features.extractors import load_extractor
    from mutor_vision.runtime import start
    from mutor_vision.training import distance as in_training

    runtime, extractor = start("float32", "cpu"), load_extractor(str(work / "features"))
    reference = in_training.load_reference(work / "reference.npz", extractor, runtime)
    return in_training.distance(extractor, reference, batches, runtime)["fd"]


def results() -> dict:
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}


def keep(key: str, values: dict) -> None:
    write_json(RESULTS, {**results(), key: values})
    print(key, values, flush=True)


def write_table(found: dict) -> None:
    """Mean and standard deviation over seeds, between the markers of docs/fine-tuning.md."""
    lines = ["| fine-tuned | objective | held-out loss, step 25 | 50 | 75 | 100 | lowest | training loss | FD | kept |",
             "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for method in METHODS:
        for objective in OBJECTIVES:
            rows = [found[f"{objective}, {method}, seed {seed}"] for seed in SEEDS
                    if f"{objective}, {method}, seed {seed}" in found]  # fmt: skip
            if rows:
                losses = [[row["held_out"][step] for row in rows] for step in rows[0]["held_out"]]
                columns = [*losses, [min(row["held_out"].values()) for row in rows], [row["train"] for row in rows]]
                cells = [_spread(column, 3) for column in columns] + [_spread([row["fd"] for row in rows], 3)]
                lines.append(f"| {method} | {objective} | {' | '.join(cells)} | {rows[0]['megabytes']} MB |")
    text = "\n".join(lines) + "\n\nMuToR-2D minus next-token, seed by seed, with the 95 % t-interval:\n"
    for method in METHODS:
        pairs = [[found.get(f"{objective}, {method}, seed {seed}") for objective in OBJECTIVES] for seed in SEEDS]
        pairs = [pair for pair in pairs if None not in pair]
        if len(pairs) > 1:
            lowest = [min(b["held_out"].values()) - min(a["held_out"].values()) for a, b in pairs]
            distance = [b["fd"] - a["fd"] for a, b in pairs]
            text += f"{method}: lowest held-out loss {_interval(lowest)}, FD {_interval(distance)}.\n"
    text = text.rstrip()
    if "reconstructions" in found:
        distance_of_real = found["reconstructions"]["fd"]
        text += f"\n\nFD of {SAMPLES} real held-out images after the tokenizer: {distance_of_real:.3f}."
    begin, end = "<!-- table: python experiments/fine_tuning.py --table -->", "<!-- end of table -->"
    page = PAGE.read_text()
    PAGE.write_text(page[: page.index(begin) + len(begin)] + f"\n{text}\n" + page[page.index(end) :])


def _spread(values: list[float], digits: int) -> str:
    deviation = np.std(values, ddof=1) if len(values) > 1 else float("nan")
    return f"{np.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def _interval(values: list[float]) -> str:
    return "{:+.3f} ± {:.3f}".format(*t_interval(values))


if __name__ == "__main__":
    run_command(main)

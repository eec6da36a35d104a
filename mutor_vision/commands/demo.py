"""The whole pipeline on real handwritten digits, in minutes on two CPU cores.

    mutor demo --out runs/demo

scikit-learn's digits (1,797 images of 8x8, in its wheel) are enlarged to 28x28. Every stage runs a command of this
project, printed before it runs, so that it can be repeated by hand: tokenizer, token sets, a next-token baseline and
MuToR-2D at equal steps under torchrun, grids, a Frechet distance, and a page that shows it all.
"""

import argparse
import html
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from mutor_vision.errors import UserError
from mutor_vision.storage.outputs import check_out_folder

OBJECTIVES = {"next-token": "digits-next-token", "MuToR-2D": "digits-mutor-2d-15"}
NUM_SAMPLES = 500
GUIDANCE = "2.0"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder (default runs/demo)")
    parser.add_argument("--tokenizer-steps", type=int, help="instead of the preset's")
    parser.add_argument("--steps", type=int, help="optimizer steps of each transformer, instead of the preset's")
    parser.add_argument("--samples", type=int, default=NUM_SAMPLES, help="images that each model is scored on")


def main(arguments: argparse.Namespace) -> None:
    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise UserError(f"the demo needs {error.name}; pip install 'mutor-vision[demo]'") from None
    check_out_folder(arguments.out)
    out: Path = arguments.out.resolve()
    started = time.perf_counter()
    stages: list[tuple[str, float]] = []

    def stage(title: str, *commands: list[str | Path]) -> None:
        print(f"\n=== {title}", flush=True)
        begun = time.perf_counter()
        for command in commands:
            run(command)
        stages.append((title, time.perf_counter() - begun))

    images, codes, val_codes = out / "images", out / "codes", out / "codes-held-out"
    begun = time.perf_counter()
    write_digits(images)
    stages.append(("Images", time.perf_counter() - begun))

    mutor = [sys.executable, "-m", "mutor_vision"]
    ranks = f"--nproc-per-node={min(2, os.cpu_count() or 1)}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", ranks, *mutor[1:]]
    steps = ["--steps", str(arguments.steps)] if arguments.steps else []
    tokenizer_steps = ["--steps", str(arguments.tokenizer_steps)] if arguments.tokenizer_steps else []
    stage(
        "Tokenizer",
        [*mutor, "train-tokenizer", "--preset", "digits", "--data", images / "train",
         "--val-data", images / "held-out", "--out", out / "tokenizer", *tokenizer_steps],
    )  # fmt: skip
    encode: list[str | Path] = [*mutor, "encode", "--tokenizer", out / "tokenizer", "--batch-size", "64"]
    # The mirror image of a digit is not a digit: one view.
    encode += ["--views", "center"]
    stage(
        "Token sets",
        [*encode, "--data", images / "train", "--out", codes],
        [*encode, "--data", images / "held-out", "--out", val_codes],
    )
    for name, preset in OBJECTIVES.items():
        stage(
            f"Training, {name}",
            [*torchrun, "train", "--preset", preset, "--codes", codes, "--val-codes", val_codes,
             "--out", out / name, *steps],
        )  # fmt: skip
    for name in OBJECTIVES:
        stage(
            f"Samples, {name}",
            [*mutor, "sample", out / name, "--classes", "0,1,2,3,4,5,6,7,8,9",
             "--per-class", "8", "--cfg-scale", GUIDANCE, "--seed", "0", "--out", out / f"samples-{name}.png"],
        )  # fmt: skip
    for name in OBJECTIVES:
        (out / f"forecasts-{name}.npz").unlink(missing_ok=True)  # of an earlier demo: a set is never written over
        stage(
            f"Forecasts, {name}",
            [*mutor, "sample", out / name, "--num", "60", "--cfg-scale", GUIDANCE,
             "--decode", "forecast", "--out", out / f"forecasts-{name}.npz"],
        )  # fmt: skip
    stage(
        "Feature network",
        [*mutor, "features", "--data", images / "train", "--val-data", images / "held-out",
         "--out", out / "features", "--image-size", "28", "--no-flip"],
    )  # fmt: skip
    for name in OBJECTIVES:
        stage(
            f"Metrics, {name}",
            [*mutor, "fid", "--run", out / name, "--num", str(arguments.samples), "--cfg-scale", GUIDANCE,
             "--reference", images / "held-out", "--features", out / "features",
             "--json", out / f"metrics-{name}.json"],
        )  # fmt: skip
    total = time.perf_counter() - started
    page = write_report(out, stages, total, arguments.samples)
    print(f"\nDone in {total / 60:.1f} minutes. Open the report:\n  {page}", flush=True)


def run(command: list[str | Path]) -> None:
    """Run a command of the project, shown as a person would type it; stop the demo where it fails."""
    words = [str(word) for word in command]
    shown = shlex.join("python" if word == sys.executable else os.path.relpath(word) if word[0] == "/" else word
                       for word in words)  # fmt: skip
    print(f"$ {shown.replace('python -m mutor_vision', 'mutor')}", flush=True)
    if subprocess.run(words).returncode:
        raise UserError(f"this command failed; see above: {shown}")


def write_digits(folder: Path) -> None:
    """scikit-learn's digits as 28x28 PNGs in class folders; every fifth image is held out."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for index, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = "held-out" if index % 5 == 0 else "train"
        path = folder / split / str(label) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels * (255 / 16)).clip(0, 255).astype("uint8"))
        image.resize((28, 28), Image.Resampling.BICUBIC).convert("RGB").save(path)


def write_report(out: Path, stages: list[tuple[str, float]], total: float, num_samples: int) -> Path:
    """report.html and the pictures beside it."""
    import torch

    from mutor_vision.commands.plot import PANELS, plot_runs
    from mutor_vision.data.folder import ImageFolder
    from mutor_vision.data.images import grid, read_image, save_png, to_tensor
    from mutor_vision.storage.run_log import read_log

    folder = ImageFolder(out / "images" / "train")
    assert folder.labels is not None
    labelled = list(zip(folder.paths, folder.labels, strict=True))
    rows = [[folder.root / path for path, label in labelled if label == digit][:8] for digit in range(10)]
    inputs = torch.stack([to_tensor(read_image(path)) for row in rows for path in row])
    save_png(grid(inputs, 8, list(folder.class_names), min_cell=64), out / "inputs.png")
    plot_runs({name: out / name for name in OBJECTIVES}, out / "losses.png", PANELS[:1])
    reconstruction = [line for line in read_log(out / "tokenizer") if "val/ema/psnr" in line][-1]
    shutil.copy(sorted((out / "tokenizer" / "samples").glob("*.png"))[-1], out / "reconstructions.png")
    features = json.loads((out / "features" / "config.json").read_text())

    columns = {name: measured(out, name) for name in OBJECTIVES}
    accuracies = {name: column.pop("class accuracy") for name, column in columns.items()}
    record = {"stages": dict(stages), "total_seconds": total, "results": columns, "class_accuracy": accuracies}
    (out / "demo.json").write_text(json.dumps(record, indent=1) + "\n")
    page = out / "report.html"
    page.write_text(render(columns, accuracies, stages, total, num_samples, reconstruction, features))
    return page


def measured(out: Path, name: str) -> dict:
    """The rows of the results table of one model."""
    from mutor_vision.storage.run_log import read_log

    metrics = json.loads((out / f"metrics-{name}.json").read_text())
    forecasts = json.loads((out / f"forecasts-{name}.npz.json").read_text())
    log = read_log(out / name)
    held_out = [line["val_next_token"] for line in log if "val_next_token" in line]
    speeds = sorted(line["images_per_second"] for line in log if "images_per_second" in line)
    values = {entry["name"]: entry["value"] for entry in metrics["metrics"].values()}
    return {
        "held-out next-token loss, last step (nats per token)": held_out[-1],
        "held-out next-token loss, best (nats per token)": min(held_out),
        **values,
        "training speed, median (images/s)": speeds[len(speeds) // 2],
        "tokens in one pass of forecast decoding": forecasts["tokens_per_pass"],
        "class accuracy": metrics["classes"]["class_accuracy"],
    }


def render(columns: dict, accuracies: dict, stages, total: float, num_samples: int, reconstruction, features) -> str:
    """The page. Everything in it comes from this run's files."""

    def table(header: list[str], rows: list[list]) -> str:
        head = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in header)
        body = "".join("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        return f"<table><tr>{head}</tr>{body}</table>"

    names = list(columns)
    results = [[row, *(columns[name].get(row) for name in names)] for row in columns[names[0]]]
    by_class = [[digit, *(f"{accuracies[name][digit]:.0%}" for name in names)] for digit in range(10)]
    times = [[title, f"{seconds:.0f} s"] for title, seconds in stages] + [["All", f"{total / 60:.1f} min"]]
    samples = "".join(
        f'<figure><figcaption>{html.escape(name)}</figcaption><img src="samples-{html.escape(name)}.png" '
        f'alt="samples of {html.escape(name)}, a row per class"></figure>'
        for name in names
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>mutor_vision demo</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 68rem; margin: 2rem auto;
       padding: 0 1rem; }}
h1 {{ margin-bottom: 0; }} h2 {{ margin-top: 2.5rem; border-bottom: 1px solid #ddd; }}
img {{ max-width: 100%; }} figure {{ margin: 0; }} figcaption {{ font-weight: 600; margin-bottom: .3rem; }}
.pair {{ display: grid; grid-template-columns: 1fr 1fr; gap: 1.5rem; align-items: start; }}
table {{ border-collapse: collapse; margin: 1rem 0; }} th {{ text-align: left; border-bottom: 2px solid #999; }}
td, th {{ padding: .2rem 1.2rem .2rem 0; }} td + td {{ font-variant-numeric: tabular-nums; }}
.note {{ color: #555; }}
</style></head><body>
<h1>Handwritten digits, from pixels to samples</h1>
<p class="note">Next-token prediction against MuToR-2D (15 registers at random slots of a 7x7 grid) at equal steps,
data order and seeds: one run each, so differences of this size say little about the method. {total / 60:.1f}
minutes in all.</p>
<h2>Samples</h2>
<p class="note">Eight of each class, none selected, guidance {GUIDANCE}, the same seeds for both.</p>
<div class="pair">{samples}</div>
<h2>Results</h2>
{table(["", *names], results)}
<p class="note">The Fr&eacute;chet distance (FD), precision, recall and accuracy use the features of a small network
that this demo trained itself on the training images ({features["held_out_accuracy"]:.1%} accuracy on held-out ones).
They compare {num_samples} samples with the held-out images and cannot be compared with Inception's FID. Accuracy is the
share of samples that the network takes for the class that was asked for. Forecast decoding draws the same images with
several tokens in one pass (docs/drafts.md), here of 60 images. Classes:</p>
{table(["class", *names], by_class)}
<h2>Loss</h2>
<img src="losses.png" alt="loss curves of both models" width="700">
<h2>Tokenizer</h2>
<p class="note">Real images, eight of each class, and reconstructions of held-out images
({reconstruction["val/ema/psnr"]:.1f} dB PSNR, {reconstruction["val/ema/usage"]:.0%} of the codes in use).</p>
<div class="pair"><figure><figcaption>Training images</figcaption><img src="inputs.png" alt="training images"></figure>
<figure><figcaption>Held-out images above their reconstructions</figcaption>
<img src="reconstructions.png" alt="images and reconstructions"></figure></div>
<h2>Time</h2>
{table(["stage", "time"], times)}
</body></html>
"""


def _cell(value) -> str:
    return html.escape(f"{value:.3f}" if isinstance(value, float) else str(value))

"""Does MuToR-2D work, and what decides it? A grid of small runs on real photographs -> JSON, one file a run.

    python experiments/run.py --zips DIR --work /tmp/grid                     # everything; docs/first-grid.md's numbers
    python experiments/run.py --grid small --images FOLDER --work /tmp/small  # 2 objectives x 2 seeds, and their page

Run it again to continue where it stopped, and start it several times with the same --work to share the runs out.
--zips: folder with tiny-imagenet-a.zip (train/<class>/*.JPEG, val/<class>/*.JPEG); --images: a folder of one's own with
train/ and val/, each with one sub-folder for each class.
"""

import dataclasses
import fcntl
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from comparison import relative_compute
from grid import CFG_SCALE, CLASSES, FEATURE_EPOCHS, FEATURE_SIZE, GRIDS, TEST_SAMPLES, TOKENIZER, Run
from subset import subset

from mutor_vision.cli import Parser, run_command
from mutor_vision.config import TrainConfig
from mutor_vision.data.token_set import TokenSet
from mutor_vision.errors import UserError
from mutor_vision.settings import preset
from mutor_vision.storage import checkpoint
from mutor_vision.storage.files import read_json, write_json
from mutor_vision.training.cost import flops

ROOT = Path(__file__).resolve().parents[1]
DRAFT_IMAGES = 100  # held-out images behind the figures of each offset
PANEL_COLUMNS = 10


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--grid", default="main", help=", ".join(GRIDS))
    parser.add_argument("--zips", type=Path, help="folder with tiny-imagenet-a.zip")
    parser.add_argument("--images", type=Path, help="in place of --zips: a folder with train/ and val/")
    parser.add_argument("--work", type=Path, required=True, help="folder for images, codes and runs")
    parser.add_argument("--results", type=Path, help="of JSON; default experiments/first_grid, for small WORK/json")
    parser.add_argument("--only", default="", help="only runs whose name has this part")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no further run after this long")
    arguments = parser.parse_args()
    runs = [run for run in preset(GRIDS, arguments.grid) if arguments.only in run.name]
    work, begun = arguments.work, time.monotonic()
    results = arguments.results or (ROOT / "experiments/first_grid" if arguments.grid == "main" else work / "json")
    results.mkdir(parents=True, exist_ok=True)
    with lock(work / "prepare", wait=True):
        prepare(arguments, results)
    for run in runs:
        if time.monotonic() - begun > arguments.seconds:
            print("stopped for now; run again to continue", flush=True)
            break
        with lock(work / run.name, wait=False) as mine:
            if mine and not (results / f"{run.name}.json").exists():
                result = measure(run, train(run, work), work)
                write_json(results / f"{run.name}.json", result)
                print(f"{run.name}: done", flush=True)
    page = ROOT / "docs/first-grid.md" if arguments.grid == "main" else work / "results.md"
    if any((results / f"{run.name}.json").exists() for run in runs):
        save_panel(preset(GRIDS, arguments.grid), work / "panel", page.with_suffix("") / "samples.png")
        command("experiments/results.py", "--results", results, "--page", page)


@contextmanager
def lock(path: Path, *, wait: bool):
    """Whether this process may work on `path` now; the system gives it back when the process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f"{path.name}.lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


# --- what all runs share ----------------------------------------------------------------------------------------------


def prepare(arguments, results: Path) -> None:
    """Images, tokenizer, codes, features, reference: each where it is missing."""
    work, codes = arguments.work, arguments.work / "codes"
    images = arguments.images or work / "images"
    if arguments.images is None and not (images / "done").exists():
        if arguments.zips is None:
            raise UserError("neither --zips nor --images is given, and --work has no images yet; give one of them")
        unzip(arguments.zips, images)
    if not (work / f"tokenizer/checkpoints/step-{TOKENIZER.steps:07d}").exists():
        from mutor_vision.tokenizer.train import train_tokenizer

        data = {"data": str(images / "train"), "val_data": str(images / "val")}
        train_tokenizer(dataclasses.replace(TOKENIZER, **data), work / "tokenizer")
    for name in ("train", "val"):
        if not (codes / name / "manifest.json").exists():
            views = "center-flip" if name == "train" else "center"
            command("tokenizers/encode.py", "--tokenizer", work / "tokenizer", "--data", images / name,
                    "--out", codes / name, "--views", views, "--workers", "0")  # fmt: skip
    # Checkpoints are chosen by 10 of 50 held-out images of a class; everything is reported on the others.
    per_class = np.bincount(TokenSet.open(codes / "val").labels).min()
    subset(codes / "val", slice(0, per_class // 5), codes / "validation")
    subset(codes / "val", slice(per_class // 5, None), codes / "test")
    # Features and reference are of images as the tokenizer shows them: what is compared are transformers.
    for name in ("train", "val"):
        decode(codes / name, work / "decoded" / name)
    if not (work / "features/config.json").exists():
        command("eval/train_features.py", "--data", work / "decoded/train", "--val-data", work / "decoded/val",
                "--image-size", FEATURE_SIZE, "--epochs", FEATURE_EPOCHS, "--workers", "0",
                "--out", work / "features")  # fmt: skip
    if not (work / "reference.npz").exists():
        command("eval/reference.py", "--data", work / "decoded/train", "--image-size", TOKENIZER.model.image_size,
                "--features", work / "features", "--keep-images", "0", "--out", work / "reference.npz")  # fmt: skip
    if not (results / "setup.json").exists():
        write_json(results / "setup.json", describe(work))


def command(*parts) -> None:
    subprocess.run([sys.executable, *map(str, parts)], check=True, cwd=ROOT)


def unzip(zips: Path, images: Path) -> None:
    with zipfile.ZipFile(zips / "tiny-imagenet-a.zip") as archive:
        paths = [re.match(r"(train|val)/(n\d+)/([\w.]+)$", name) for name in sorted(archive.namelist())]
        classes = sorted({match[2] for match in paths if match})[:CLASSES]
        for match in paths:
            if match and match[2] in classes:
                path = images / match[1] / match[2] / match[3]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.read(match[0]))
    (images / "done").touch()


def decode(source: Path, out: Path) -> None:
    """The first view of every image of a token set as OUT/<class>/<number>.png, where they are not there yet."""
    import torch

    from mutor_vision.data.images import to_pil, to_uint8
    from mutor_vision.tokenizer.model import load_tokenizer

    if (out / "done").exists():
        return
    tokens, tokenizer = TokenSet.open(source), load_tokenizer(source / "tokenizer")
    for name in tokens.class_names:
        (out / name).mkdir(parents=True, exist_ok=True)
    for part in torch.arange(tokens.num_images).split(100):
        pictures = to_uint8(tokenizer.decode(tokens.codes()[part, 0].long().unflatten(1, tokens.grid)))
        for i, picture in zip(part.tolist(), pictures, strict=True):
            to_pil(picture).save(out / tokens.class_names[tokens.labels[i]] / f"{i:06d}.png")
    (out / "done").touch()


def describe(work: Path) -> dict:
    """What a reader must know of the set-up, and what real images score after the tokenizer."""
    import torch

    from mutor_vision.data.images import to_uint8
    from mutor_vision.storage.run_log import read_log
    from mutor_vision.tokenizer.model import load_tokenizer

    training, validation, test = (TokenSet.open(work / "codes" / name) for name in ("train", "validation", "test"))
    tokenizer = load_tokenizer(work / "tokenizer")
    chosen = np.random.default_rng(0).permutation(test.num_images)[:TEST_SAMPLES]
    codes = test.codes()[chosen, 0].long().unflatten(1, test.grid)
    pictures = [to_uint8(tokenizer.decode(part)) for part in codes.split(100)]
    features = read_json(work / "features/config.json")
    scored = [line for line in read_log(work / "tokenizer") if any("psnr" in name for name in line)][-1]
    return {
        "classes": len(training.class_names), "train_images": training.num_images, "views": training.num_views,
        "validation_images": validation.num_images, "test_images": test.num_images, "image_size": training.image_size,
        "grid": list(training.grid), "codebook_size": training.codebook_size,
        "tokenizer": {name: round(value, 4) for name, value in scored.items() if isinstance(value, float | int)},
        "features": {name: features[name] for name in ("architecture", "image_size", "epochs", "held_out_accuracy")},
        "reconstructions": fidelity(work, pictures, test.labels[chosen]), "samples": TEST_SAMPLES,
        "draft_images": DRAFT_IMAGES, "cfg_scale": CFG_SCALE, "torch": torch.__version__.split("+")[0],
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, threads a run: {torch.get_num_threads()}",
    }  # fmt: skip


# --- one run ----------------------------------------------------------------------------------------------------------


def train(run: Run, work: Path) -> Path:
    """Train, or go on; every validation leaves a checkpoint."""
    from mutor_vision.training.loop import train as train_transformer

    codes = work / "codes/train"
    if run.per_class:
        seed = run.config.seed
        codes = work / f"codes/train-{run.per_class}-{seed}"
        with lock(codes, wait=True):
            subset(work / "codes/train", slice(seed * run.per_class, (seed + 1) * run.per_class), codes)
    config = dataclasses.replace(run.config, codes=str(codes), val_codes=str(work / "codes/validation"))
    out = work / "runs" / run.name
    train_transformer(config, out)
    return out


def measure(run: Run, out: Path, work: Path) -> dict:
    """Curves, and the scores of the checkpoints that count; afterwards only those checkpoints are kept."""
    from mutor_vision.model.transformer import Transformer, num_parameters
    from mutor_vision.storage.run_log import read_log

    log = read_log(out)
    validation = {line["step"]: round(line["val_next_token"], 4) for line in log if "val_next_token" in line}
    best = min(validation, key=validation.get)
    scored = sorted({best, run.config.steps, *run.also_score}) if run.sampled else []
    config = checkpoint.read_config(out, "transformer", TrainConfig)
    result = {
        "block": run.block, "method": run.method, "seed": config.seed, "per_class": run.per_class,
        "dropout": config.model.ffn_dropout, "batch_size": config.batch_size, "lr": config.lr, "steps": config.steps,
        "registers": dataclasses.asdict(config.registers), "parallel_heads": config.parallel_heads.count,
        "model": dataclasses.asdict(config.model), "flops_per_image": flops(config).training,
        "relative_compute": relative_compute(config),
        "parameters": num_parameters(Transformer(config.model)), "best": best, "validation": validation,
        "seconds": round(sum(config.log_every * config.batch_size / line["images_per_second"]
                             for line in log if "images_per_second" in line)),
        "train": {line["step"]: round(line["next_token"], 4) for line in log if "next_token" in line},
        "other": {line["step"]: round(line[name], 4) for line in log for name in ("register", "heads")
                  if name in line and "next_token" in line},
        "scores": {}, "command": f"python experiments/run.py --only {run.name}",
    }  # fmt: skip
    for step in scored:
        result["scores"][step] = score(out / "checkpoints" / f"step-{step:07d}", work, panel=run)
    if run.drafts:
        result["drafts"] = drafts(run, out / "checkpoints" / f"step-{config.steps:07d}", work)
    for folder in (out / "checkpoints").iterdir():
        if checkpoint.step_of(folder) not in scored:
            shutil.rmtree(folder)
    return result


def score(folder: Path, work: Path, panel: Run) -> dict:
    """Loss on the test images, and how good and how right in class its samples are."""
    import torch

    from mutor_vision.runtime import start
    from mutor_vision.sampling.draw import SampleSettings
    from mutor_vision.sampling.load import load
    from mutor_vision.sampling.stream import label_plan, sample_images, sample_stream

    runtime = start("float32", "cpu")
    loaded = load(folder, runtime)
    losses = position_losses(loaded.transformer, TokenSet.open(work / "codes/test"))
    labels = label_plan(TEST_SAMPLES, len(loaded.class_names), "balanced", 0)
    settings = SampleSettings(cfg_scale=CFG_SCALE)
    pictures = [batch for _, batch in sample_stream(loaded, labels, settings, 0, 125)]
    if panel.block in ("headline", "longest") and panel.config.seed == 0:
        from mutor_vision.data.images import to_pil

        chosen = torch.arange(PANEL_COLUMNS) % len(loaded.class_names)
        row = sample_images(loaded, chosen, np.arange(PANEL_COLUMNS), settings, 1)
        (work / "panel").mkdir(exist_ok=True)
        to_pil(torch.cat(list(row), 2)).save(work / "panel" / f"{panel.name}-{checkpoint.step_of(folder)}.png")
    return {"loss": round(losses.mean().item(), 4), **fidelity(work, pictures, labels),
            "loss_by_position": [round(x, 3) for x in losses.tolist()]}  # fmt: skip


def save_panel(runs: list[Run], strips: Path, path: Path) -> None:
    """The samples of every objective below each other; the baseline at each step where it is compared."""
    import torch
    from PIL import Image

    from mutor_vision.data.images import grid, save_png

    rows, labels = [], []
    for run in runs:
        for step in sorted({run.config.steps, *run.also_score}):
            strip = strips / f"{run.name}-{step}.png"
            if strip.exists():
                rows += torch.from_numpy(np.array(Image.open(strip))).permute(2, 0, 1).chunk(PANEL_COLUMNS, 2)
                labels.append(f"{run.method}, {step} steps")
    if rows:
        # 128 colours are a third of the bytes, and the pictures are no finer.
        save_png(grid(torch.stack(rows), PANEL_COLUMNS, labels, min_cell=64).quantize(128), path)


def position_losses(model, tokens: TokenSet):
    """(N,) mean next-token cross-entropy in nats at each position."""
    import torch
    from torch.nn.functional import cross_entropy

    codes, slots = tokens.codes()[:, 0].long(), torch.arange(model.config.num_tokens)[None]
    with torch.no_grad():
        parts = [
            cross_entropy(model(part[:, :-1], labels, slots).transpose(1, 2), part, reduction="none")
            for part, labels in zip(codes.split(50), tokens.labels.split(50), strict=True)
        ]
    return torch.cat(parts).mean(0)


def fidelity(work: Path, pictures: list, labels) -> dict:
    """Fréchet distance from the training images, and the share of pictures that the features' network takes for the
    class that was asked for."""
    import torch

    from mutor_vision.features.extractors import load_extractor
    from mutor_vision.runtime import start
    from mutor_vision.training import distance as in_training

    runtime, extractor = start("float32", "cpu"), load_extractor(str(work / "features"))
    reference = in_training.load_reference(work / "reference.npz", extractor, runtime)
    distance = in_training.distance(extractor, reference, pictures, runtime)["fd"]
    with torch.no_grad():
        said = torch.cat([extractor(batch)["logits"].argmax(1) for batch in pictures])
    return {"fd": round(distance, 4), "accuracy": round((said == labels).double().mean().item(), 4)}


def drafts(run: Run, folder: Path, work: Path) -> dict:
    """Offset or head -> acceptance with and without guidance, and losses in nats, over some test images."""
    from drafts import head_drafts, register_drafts

    from mutor_vision.objectives.heads import ParallelHeads
    from mutor_vision.objectives.registers import offset_pairs
    from mutor_vision.runtime import start
    from mutor_vision.sampling.load import load

    model = load(folder, start("float32", "cpu")).transformer
    tokens = TokenSet.open(work / "codes/test")
    chosen = np.random.default_rng(1).permutation(tokens.num_images)[:DRAFT_IMAGES]
    codes, labels = tokens.codes()[chosen, 0].long().unflatten(1, tokens.grid), tokens.labels[chosen]
    scales, registers, found = (1.0, CFG_SCALE), run.config.registers, {}
    if run.config.parallel_heads.active:
        config = dataclasses.replace(run.config, model=model.config)
        heads = ParallelHeads(config.parallel_heads, config).eval()
        checkpoint.load_strictly(heads, checkpoint.read_weights(folder, "heads"), folder)
        for k in range(2, run.config.parallel_heads.count + 1):
            found[f"head {k}"] = head_drafts(model, heads, codes, labels, k, scales)
    else:
        for pair in offset_pairs(registers).tolist():
            found[f"{pair[0]},{pair[1]}"] = register_drafts(model, codes, labels, tuple(pair), registers, scales)
    return {
        name: {"acceptance": round(d.acceptance[0].mean().item(), 4),
               "acceptance_guided": round(d.acceptance[1].mean().item(), 4),
               "loss": round(d.loss.mean().item(), 4), "next_token_loss": round(d.next_token_loss.mean().item(), 4)}
        for name, d in found.items()
    }  # fmt: skip


if __name__ == "__main__":
    run_command(main)

"""The stages of first_hour.py. Each takes its options and returns {'rows': [{'what': name, figure: number, ...}], ...};
the rows go into the table, the rest is for a person who reads results.json."""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from report import machine, measure, medians

ROOT = Path(__file__).resolve().parents[1]


def tests(options) -> dict:
    """The tests marked gpu; without a GPU they are skipped."""
    files = "tests/test_gpu.py" if options.tiny else "tests"
    # Straight into the stage's log: if the time runs out, it names the tests that ended and the one that did not.
    subprocess.run([sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-rfs", "--durations=8", files], cwd=ROOT)
    lines = (options.out / "tests.log").read_text().strip().splitlines()
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"rows": [{"what": "tests marked gpu", "outcome": lines[-1].strip("= ")}], "failures": failures}


def train(options) -> dict:
    """A step of GPT-B, next-token, 80 and 256 registers: bfloat16, compiled blocks; MFU of the published peak."""
    import train_step

    from mutor_vision.config import RegisterConfig, TrainConfig, TransformerConfig
    from mutor_vision.training.cost import flops

    device, cuda = _device(options)
    size, batch, grid, vocab = ((2, 2, 64), 4, 4, 64) if options.tiny else ((12, 12, 768), 128, 16, 16384)
    counts = (0, 5, 16) if options.tiny else (0, 80, 256)
    peak = _peak(device)
    rows, kernels = [], {}
    for registers in counts:
        arguments = argparse.Namespace(
            size=size, grid=grid, vocab=vocab, batch=batch, dropout=0.1, precision="auto", device=device.type,
            compile=cuda,
        )  # fmt: skip
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        step = train_step.our_step(arguments, registers)
        five = lambda step=step: [step() for _ in range(5)]  # noqa: E731
        seconds = medians(measure({"step": five}, 3, device, warmup=2))["step"] / 5
        config = TrainConfig(
            model=TransformerConfig(*size, vocab, 1000, (grid, grid)),
            registers=RegisterConfig("2d", registers) if registers else RegisterConfig(),
        )  # fmt: skip
        work = flops(config).training * batch / seconds
        rows.append({
            "what": f"training step, GPT-B, batch {batch}, {registers or 'no'} registers", "ms": 1000 * seconds,
            "images/s": batch / seconds, "TFLOP/s": work / 1e12, "MFU": work / peak if peak else 0.0,
            "times next-token": seconds / rows[0]["ms"] * 1000 if rows else 1.0,
            "GB": torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0,
        })  # fmt: skip
        kernels[f"{registers} registers"] = _kernels(step) if cuda else []
        del step, five
        if cuda:
            torch.cuda.empty_cache()
    return {"rows": rows, "kernels": kernels, "machine": machine(device), "peak": peak,
            "product": _product(device, options.tiny)}  # fmt: skip


def sample(options) -> dict:
    """GPT-B with guidance 2: codes of 1, 16, 64 and 256 images by CUDA graphs, and by shapes that grow."""
    from sampling import load, random_weights

    from mutor_vision.config import TransformerConfig
    from mutor_vision.model.prepare import prepare
    from mutor_vision.runtime import start
    from mutor_vision.sampling.draw import SampleSettings
    from mutor_vision.sampling.forecast import Forecast
    from mutor_vision.sampling.generate import generate
    from mutor_vision.sampling.static import StaticSteps

    device, cuda = _device(options)
    runtime = start("auto", options.device)
    config = TransformerConfig(2, 2, 64, 64, 5, (4, 4)) if options.tiny else TransformerConfig(
        12, 12, 768, 16384, 1000, (16, 16)
    )  # fmt: skip
    model = prepare(load(config, random_weights(config), runtime), runtime.autocast_dtype)
    rows, kernels, static, forecast = [], [], StaticSteps(), Forecast(8, 2)

    def draw(images: int, steps) -> None:
        labels = (torch.arange(images) % config.num_classes).to(device)
        with runtime.autocast():
            generate(model, labels, SampleSettings(), seed=0, indices=np.arange(images), decoder=steps)

    for images in (1, 3) if options.tiny else (1, 16, 64, 256):
        for name, steps in (("graphs", static), ("forecast, 8 and 2", forecast), ("growing shapes", None)):
            if images == 256 and steps is None:
                continue
            seconds = medians(measure({"draw": lambda n=images, s=steps: draw(n, s)}, 3, device))["draw"]
            rows.append({
                "what": f"sampling, GPT-B, guidance 2, batch {images}, {name}", "s": seconds,
                "images/s": images / seconds, "ms per token": 1000 * seconds / config.num_tokens,
            })  # fmt: skip
            if steps is forecast:  # with random weights few guesses hit: what a pass costs is what tells
                forecast.passes = forecast.tokens = 0
                draw(images, forecast)
                rows[-1] |= {"tokens a pass": forecast.tokens / forecast.passes}
                rows[-1] |= {"ms per pass": 1000 * seconds * images / forecast.passes}
    if cuda:
        kernels = _kernels(lambda: draw(64, static))
    return {"rows": rows, "kernels": kernels, "machine": machine(device)}


def encode(options) -> dict:
    """VQ-16 with random weights at 256 pixels: both views' codes, and decoding, of images that are in memory."""
    from mutor_vision.config import TokenizerConfig
    from mutor_vision.runtime import start
    from mutor_vision.tokenizer.encode import _encode
    from mutor_vision.tokenizer.model import VQTokenizer

    device, _ = _device(options)
    runtime = start("float32", options.device)
    small = TokenizerConfig(16, (8, 8), 1, 8, 4, 32, False, 4)
    config, batch = (small, 4) if options.tiny else (TokenizerConfig(), 32)
    torch.manual_seed(0)
    tokenizer = VQTokenizer(config).to(device).eval().requires_grad_(False)
    crops = torch.randint(0, 256, (batch, 3, config.image_size, config.image_size), dtype=torch.uint8)
    codes = torch.randint(config.codebook_size, (batch, *config.grid), device=device)
    rows = []
    for name, layout in (("", torch.contiguous_format), (", channels last", torch.channels_last)):
        tokenizer.to(memory_format=layout)
        for precision in ("float32", "bfloat16"):
            work = {
                f"encoding, VQ-16, {config.image_size} pixels, {precision}{name}":
                    lambda precision=precision: _encode(tokenizer, crops, precision, runtime),
            }  # fmt: skip
            if precision == "float32":
                work[f"decoding, VQ-16, {config.image_size} pixels, float32{name}"] = lambda: tokenizer.decode(codes)
            for what, seconds in medians(measure(work, 3, device)).items():
                rows.append({"what": what, "images/s": batch / seconds})
    return {"rows": rows, "machine": machine(device)}


def score(options) -> dict:
    """Inception features (random weights) of 299-pixel images, FID's statistics, precision and recall."""
    from mutor_vision.features.extractors import load_extractor
    from mutor_vision.features.moments import Moments
    from mutor_vision.metrics import frechet, scores
    from mutor_vision.runtime import exact_float32, start

    device, _ = _device(options)
    runtime = start("float32", options.device)
    extractor = load_extractor("inception", "random").to(device)
    batch, count, width = (2, 40, 32) if options.tiny else (50, 10_000, 2048)
    images = torch.randint(0, 256, (batch, 3, 256, 256), dtype=torch.uint8).to(device)
    features = torch.randn(2, count, width, generator=torch.Generator().manual_seed(0))

    def extract() -> None:
        with torch.no_grad(), exact_float32():
            extractor(images)

    def distance() -> None:
        moments = [Moments(width, device=device) for _ in features]
        for which, rows in zip(moments, features, strict=True):
            which.update(rows, 0)
        frechet.distance(moments[0].total(), frechet.root(moments[1].total()))

    def precision_recall() -> None:
        with exact_float32():
            scores.precision_recall(*features, runtime, 3)

    times = medians(measure({"features": extract, "distance": distance, "pr": precision_recall}, 2, device))
    return {
        "rows": [
            {"what": "Inception features, float32, batch 50", "images/s": batch / times["features"]},
            {"what": f"Frechet distance of 2 x {count} features of {width}", "s": times["distance"]},
            {"what": f"precision and recall of 2 x {count} features", "s": times["pr"]},
        ],
        "machine": machine(device),
    }


def photographs(options) -> dict:
    """Images to grid by the commands of the README: tokenizer, codes, transformer with registers, samples, distance."""
    out = options.out.absolute() / "photographs"
    for earlier in ("vq", "codes", "run"):  # those of an earlier try would be finished, and their times none
        shutil.rmtree(out / earlier, ignore_errors=True)
    images = options.images.absolute() if options.images else _digits(out / "images", 200 if options.tiny else None)
    steps = ("3", "20") if options.tiny else ("1500", "3000")
    quiet = ["--set", "val_every=0", "--set", "sample_every=0", "--set", "save_every=0"]
    rows = []

    def command(what: str, *words) -> None:
        begun = time.perf_counter()
        done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
        print(done.stdout[-2000:], done.stderr[-4000:], flush=True)
        if done.returncode:
            sys.exit(f"{what}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
        rows.append({"what": f"from photographs to grid: {what}", "s": time.perf_counter() - begun})

    tokenizer = "tiny-imagenet" if options.images else "digits"
    command(f"tokenizer, {steps[0]} steps", "tokenizers/train_vq.py", "--preset", tokenizer, "--data", images,
            "--out", out / "vq", "--steps", steps[0], *quiet)  # fmt: skip
    command("codes", "tokenizers/encode.py", "--tokenizer", out / "vq", "--data", images, "--out", out / "codes")
    transformer = "tiny-imagenet-mutor-2d-80" if options.images else "digits-mutor-2d-15"
    command(f"transformer, {steps[1]} steps", "train/imagenet.py", "--preset", transformer, "--codes", out / "codes",
            "--out", out / "run", "--steps", steps[1], *quiet,
            *(["--set", "batch_size=20"] if options.tiny else []))  # fmt: skip
    command("grid", "-m", "mutor_vision", "sample", out / "run", "--out", out / "grid.png", "--per-class", "8")
    network = "timm:resnet18@32" if options.tiny else "timm:resnet18"
    command("distance", "eval/fid.py", "--model", out / "run", "--num-images", "40" if options.tiny else "1000",
            "--reference", images, "--allow-lossy", "--image-size", "24" if options.images is None else "64",
            "--features", network, "--weights", "random", "--json", out / "metrics.json",
            "--report", out / "report.html")  # fmt: skip
    return {"rows": rows}


def _digits(folder: Path, count: int | None) -> Path:
    """scikit-learn's digits (the first count; None = all) as PNG files of 24 pixels, one folder a class."""
    from PIL import Image
    from sklearn.datasets import load_digits

    found = load_digits()
    for number, (pixels, label) in enumerate(zip(found.images[:count], found.target[:count], strict=True)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels * 255 / 16).astype(np.uint8)).resize((24, 24), Image.Resampling.BICUBIC)
        image.convert("RGB").save(folder / str(label) / f"{number:04d}.png")
    return folder


def _device(options) -> tuple[torch.device, bool]:
    from mutor_vision.runtime import start

    device = start("auto", options.device).device
    return device, device.type == "cuda"


def _peak(device: torch.device) -> float:
    """Published dense bfloat16 FLOP/s of the card; 0 = not known."""
    from mutor_vision.training.cost import ACCELERATORS

    name = torch.cuda.get_device_name(device).lower().replace(" ", "") if device.type == "cuda" else ""
    return next((1e12 * card.bfloat16 for key, card in ACCELERATORS.items() if key in name), 0.0)


def _product(device: torch.device, tiny: bool) -> float:
    """Measured FLOP/s of one large bfloat16 product: what a step could reach at most."""
    side = 256 if tiny else 8192
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = medians(measure({"product": lambda: [a @ b for _ in range(5)]}, 5, device))["product"] / 5
    return 2 * side**3 / seconds


def _kernels(work) -> list[tuple[str, float, int]]:
    """(kernel, milliseconds, calls) of the 25 that take longest."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        work()
        torch.cuda.synchronize()
    events = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)[:25]
    return [(event.key[:90], round(event.self_device_time_total / 1000, 3), event.count) for event in events]

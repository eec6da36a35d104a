"""Find the guidance scale with the lowest FID: samples at each scale, measured on the fly, and the curve as a plot.

    torchrun --nproc-per-node=8 eval/cfg_sweep.py --model RUN --reference reference.npz --num-images 10000 --out sweep
    mutor sweep --model RUN --reference DIR --scales 1,1.5,2,3 --features runs/features --out sweep

Without --scales: golden section between --low and --high. Run the same command again to go on after a kill; scales
that were measured are not sampled again.
"""

import argparse
import dataclasses
import json
import math
import shutil
from pathlib import Path

import torch

from mutor_vision.commands.flags import add_extractor, add_sampled_run, add_settings, decoding_from, settings_from
from mutor_vision.errors import UserError
from mutor_vision.features.extract import forget
from mutor_vision.features.extractors import load_extractor
from mutor_vision.features.sources import RunImages
from mutor_vision.metrics import sweep
from mutor_vision.metrics.evaluate import ImageSet, Options, check_outputs, evaluate, open_set
from mutor_vision.runtime import finish, start
from mutor_vision.sampling import stream as sample
from mutor_vision.sampling.load import load
from mutor_vision.storage.files import write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # torchrun takes --run and --num for abbreviations of its own options, so the flags have other names as well.
    parser.add_argument("--model", "--run", dest="run", required=True, help="run directory or checkpoint")
    parser.add_argument("--reference", required=True, help="folder, npz of images, or statistics")
    parser.add_argument("--out", required=True, type=Path, help="folder for sweep.json and sweep.png")
    parser.add_argument("--num-images", "--num", type=int, default=10_000, dest="num", help="samples at each scale")
    parser.add_argument("--scales", help="a grid, with commas; default: golden section")
    parser.add_argument("--low", type=float, default=1.0)
    parser.add_argument("--high", type=float, default=4.0)
    parser.add_argument("--tolerance", type=float, default=0.1, help="width of the interval at the end (default 0.1)")
    add_extractor(parser)
    parser.add_argument("--allow-lossy", action="store_true", help="accept a reference of JPEG files; recorded")
    parser.add_argument("--batch-size", type=int, default=50, help="images at once per process (default 50)")
    parser.add_argument("--groups", type=int, default=20, help="jackknife groups, 0 = no error bars (default 20)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    add_sampled_run(parser)
    add_settings(parser)


def main(arguments: argparse.Namespace) -> None:
    scales = [] if arguments.scales is None else _parse_scales(arguments.scales)
    try:
        import matplotlib  # noqa: F401
    except ImportError:  # before hours of sampling, not after
        raise UserError("the plot needs matplotlib; pip install 'mutor-vision[demo]'") from None
    if arguments.num < 2 or not 0 <= arguments.seed < 2**63:
        raise UserError("--num-images must be 2 or more, and --seed 0 to 2^63 - 1")
    base, decoding = settings_from(arguments), decoding_from(arguments)
    runtime = start(arguments.precision, arguments.device)
    record, work = arguments.out / "sweep.json", arguments.out / "work"
    check_outputs(runtime, files=(record,), folders=(work,))
    reference = open_set(arguments.reference, image_size=arguments.image_size, allow_lossy=arguments.allow_lossy)
    loaded = load(arguments.run, runtime, arguments.run_weights, quantize=arguments.quantize, decoding=decoding)
    if not loaded.config.label_dropout:
        raise UserError("the model was trained with label_dropout 0 and has no null class, so there is no guidance")
    extractor = load_extractor(arguments.features, arguments.weights)
    binding = {
        "model": loaded.identity, "extractor": extractor.identity, "reference": reference.name,
        # Of an npz the hash of its bytes; of a folder that of its names, sizes and times.
        "reference_sha256": reference.record.get("sha256") or reference.images.key(),
        "num": arguments.num, "image_size": arguments.image_size, "seed": arguments.seed, "labels": arguments.labels,
        "precision": str(runtime.autocast_dtype or torch.float32), "device": runtime.device.type,
        "decoding": loaded.decoding, "groups": arguments.groups,
        "settings": dataclasses.asdict(base) | {"cfg_scale": None},
    }  # fmt: skip
    binding = json.loads(json.dumps(binding))  # as it is read back
    done = sweep.read_record(record, binding)
    metrics = ("fid", "is") if "spatial" in extractor.layers else ("fid",)
    options = Options(metrics=metrics, batch=arguments.batch_size, groups=arguments.groups, work=work)

    batch = sample.default_batch_size(loaded)  # once: the memory of one scale's sampler is used again by the next

    def value(scale: float) -> float:
        for point in done["points"]:
            if point["cfg_scale"] == scale:
                return point["value"]
        settings = dataclasses.replace(base, cfg_scale=scale)
        source = RunImages(
            loaded, arguments.num, settings, plan=arguments.labels, seed=arguments.seed,
            image_size=arguments.image_size, batch=batch,
        )  # fmt: skip
        samples = ImageSet(source, None, {"path": loaded.identity["run"]} | source.describe())
        result = evaluate(samples, reference, extractor, runtime, options)
        measured = result["metrics"].get("fid") or result["metrics"]["fd"]
        # From rank 0, so that no rounding can send the ranks different ways.
        shared = torch.tensor([measured["value"] * runtime.is_main], dtype=torch.float64, device=runtime.device)
        point = {"cfg_scale": scale, "value": runtime.all_reduce(shared).item(), "name": measured["name"]}
        point |= {"standard_error": measured.get("standard_error"), "result": result}
        point |= {"is": result["metrics"]["is"]["value"]} if "is" in result["metrics"] else {}
        done["points"].append(point)
        if runtime.is_main:
            arguments.out.mkdir(parents=True, exist_ok=True)
            write_json(record, done)
            forget(work, source, extractor)
            print(f"cfg scale {scale:g}: {point['name']} {point['value']:.4g}", flush=True)
        runtime.barrier()
        return point["value"]

    if scales:
        for scale in scales:
            value(scale)
    else:
        sweep.golden_section(value, arguments.low, arguments.high, arguments.tolerance)
    if runtime.is_main:
        name = done["points"][0]["name"]
        sweep.plot(done["points"], name, arguments.out / "sweep.png")
        shutil.rmtree(work, ignore_errors=True)
        print(sweep.table(done["points"], name))
        for text in done["points"][-1]["result"]["warnings"]:
            print(f"warning: {text}")
        best = sweep.best_of(done["points"])
        print(f"best cfg scale {best['cfg_scale']:g}; written: {record} and {arguments.out / 'sweep.png'}")
    finish()


def _parse_scales(text: str) -> list[float]:
    try:
        scales = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        scales = []
    if not scales or not all(0 <= scale < math.inf for scale in scales):
        raise UserError(f"--scales is '{text}', expected numbers of 0 or more with commas, such as 1,1.5,2")
    return scales

"""FID, sFID, Inception Score, precision, recall and KID by ADM's protocol, without TensorFlow.

    mutor fid --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz --json metrics.json
    mutor fid --samples FOLDER --reference FOLDER --features timm:vit_large_patch14_dinov2.lvd142m@224
    torchrun --nproc-per-node=8 eval/fid.py --model RUN --num-images 50000 --reference reference.npz --json metrics.json

Samples and reference: a folder of PNGs (sub-folders are classes), an npz of images (arr_0), or statistics (mu, sigma,
mu_s, sigma_s; made by eval/reference.py, or ADM's own). --model (or --run) samples
from a trained run and keeps no image.
"""

import argparse
import dataclasses
import shutil
from pathlib import Path

from mutor_vision.commands.flags import add_extractor, add_sampled_run, add_settings, decoding_from, settings_from
from mutor_vision.data.images import save_png
from mutor_vision.errors import UserError
from mutor_vision.features.extractors import load_extractor
from mutor_vision.features.sources import RunImages
from mutor_vision.keyed_random import check_seed
from mutor_vision.metrics import report
from mutor_vision.metrics.evaluate import METRICS, ImageSet, Options, check_outputs, evaluate, open_set
from mutor_vision.metrics.several import IN_EVERY_NETWORK, combine
from mutor_vision.runtime import finish, start
from mutor_vision.sampling.load import load
from mutor_vision.storage.files import write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", help="folder, npz of images, or statistics")
    # torchrun takes --run and --num for abbreviations of its own options, so the flags have other names as well.
    parser.add_argument(
        "--model", "--run", dest="run", help="sample from this run or checkpoint instead; needs --num-images"
    )
    parser.add_argument("--num-images", "--num", type=int, default=0, dest="num", help="samples to draw, or to expect")
    parser.add_argument("--reference", required=True, help="folder, npz of images, or statistics; the training images, "
                        "where --held-out is given")  # fmt: skip
    parser.add_argument("--held-out", help="real images that the model has not seen, in any of these forms: what they "
                        "measure against the reference stands beside the samples")  # fmt: skip
    add_extractor(parser)
    parser.add_argument(
        "--also", action="append", default=[], metavar="FEATURES[=WEIGHTS]", help="a further network for the Fréchet "
        "distance and FDr, such as timm:tf_efficientnet_lite0=package; may be repeated",
    )  # fmt: skip
    parser.add_argument("--metrics", default="", help=f"of {','.join(METRICS)}; default: all that are possible")
    parser.add_argument("--json", type=Path, help="write values, warnings and the protocol here")
    parser.add_argument("--report", type=Path, help="write a page with the worst and best classes here (.html)")
    parser.add_argument("--copies-grid", type=Path, help="write the samples closest to the reference beside their "
                        "nearest images here (.png)")  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=50, help="images per forward pass and process (default 50)")
    parser.add_argument("--splits", type=int, default=10, help="parts of the Inception Score (default 10)")
    parser.add_argument("--neighbours", type=int, default=3, help="k of precision and recall (default 3)")
    parser.add_argument("--groups", type=int, default=20, help="jackknife groups, 0 = no error bars (default 20)")
    parser.add_argument("--work", type=Path, help="folder for features of finished images, so that a killed run goes "
                        "on; default: beside --json")  # fmt: skip
    parser.add_argument("--keep-features", action="store_true", help="leave them there for a later run")
    parser.add_argument("--sample-labels", help=".npy of class ids, one for each sample")
    parser.add_argument("--allow-lossy", action="store_true", help="accept JPEG, WEBP and palette files; recorded")
    parser.add_argument("--allow-unknown-weights", action="store_true", help="accept another Inception; marked")
    parser.add_argument("--nchw", action="store_true", help="the samples' npz holds (N, 3, H, W)")
    parser.add_argument("--strict", action="store_true", help="stop with an error at the first warning")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    sampling = parser.add_argument_group("sampling with --model")
    sampling.add_argument("--sample-batch-size", type=int, default=0, help="images sampled at once, 0 = by free memory")
    add_sampled_run(sampling)
    add_settings(parser)


def main(arguments: argparse.Namespace) -> None:
    if (arguments.samples is None) == (arguments.run is None):
        raise UserError("give either --samples or --model")
    if arguments.run and arguments.num < 2:
        raise UserError(f"--model needs --num-images, 2 or more; got {arguments.num}")
    if min(arguments.num, arguments.sample_batch_size) < 0:
        raise UserError("--num-images and --sample-batch-size must not be negative")
    check_seed(arguments.seed)
    work = arguments.work or (arguments.json.with_name(arguments.json.name + ".work") if arguments.json else None)
    options = Options(
        metrics=tuple(name.strip() for name in arguments.metrics.split(",") if name.strip()),
        batch=arguments.batch_size, splits=arguments.splits, k=arguments.neighbours, groups=arguments.groups,
        work=work, strict=arguments.strict,
    )  # fmt: skip
    if arguments.copies_grid and options.metrics and "copies" not in options.metrics:
        raise UserError("--copies-grid needs the metric 'copies'; add it to --metrics")
    if arguments.also and arguments.run:
        raise UserError("--also would draw every image once more; draw them with mutor sample, and give --samples")
    if arguments.also and options.metrics and not set(options.metrics) & set(IN_EVERY_NETWORK):
        raise UserError(f"--also measures {' and '.join(IN_EVERY_NETWORK)}; add one of them to --metrics")
    settings, decoding = settings_from(arguments), decoding_from(arguments)
    runtime = start(arguments.precision, arguments.device)
    check_outputs(runtime, files=(arguments.json, arguments.report, arguments.copies_grid), folders=(work,))
    reference = open_set(
        arguments.reference, image_size=arguments.image_size, allow_lossy=arguments.allow_lossy
    )  # cheap checks first: nothing heavy is loaded before both sides are known to be readable
    held_out = None
    if arguments.held_out:
        held_out = open_set(arguments.held_out, image_size=arguments.image_size, allow_lossy=arguments.allow_lossy)
    if arguments.run:
        loaded = load(arguments.run, runtime, arguments.run_weights, quantize=arguments.quantize, decoding=decoding)
        if settings.cfg_scale != 1 and not loaded.config.label_dropout:
            raise UserError("the model was trained with label_dropout 0 and has no null class; use --cfg-scale 1")
        source = RunImages(
            loaded, arguments.num, settings, plan=arguments.labels, seed=arguments.seed,
            image_size=arguments.image_size, batch=arguments.sample_batch_size,
        )  # fmt: skip
        samples = ImageSet(source, None, {"path": loaded.identity["run"]} | source.describe())
    else:
        samples = open_set(
            arguments.samples, image_size=arguments.image_size, allow_lossy=arguments.allow_lossy,
            nchw=arguments.nchw, labels=arguments.sample_labels, count=arguments.num,
        )  # fmt: skip
    if arguments.copies_grid and (samples.images is None or reference.images is None):
        raise UserError("--copies-grid needs images on both sides; these are statistics")
    extractor = load_extractor(arguments.features, arguments.weights, arguments.allow_unknown_weights)
    further = [load_extractor(features, weights or None, arguments.allow_unknown_weights)
               for features, _, weights in (also.partition("=") for also in arguments.also)]  # fmt: skip
    names = [one.identity["name"] for one in (extractor, *further)]
    if len(set(names)) < len(names):
        raise UserError(
            f"{max(names, key=names.count)} is given twice by --features and --also; give each network once"
        )
    results = [evaluate(samples, reference, extractor, runtime, options, held_out)]
    possible = IN_EVERY_NETWORK if held_out is not None else IN_EVERY_NETWORK[:1]
    few = dataclasses.replace(options, metrics=tuple(set(possible) & set(options.metrics or possible)))
    results += [evaluate(samples, reference, other, runtime, few, held_out) for other in further]
    result = combine(results) if further else results[0]
    if runtime.is_main:
        # Everything is written before anything is printed: whoever reads the output may have gone.
        if arguments.json:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            write_json(arguments.json, result)
        if arguments.report:
            report.write_page(arguments.report, report.page(result, samples.images, reference.images))
        if arguments.copies_grid:
            save_png(report.copies_picture(result, samples.images, reference.images), arguments.copies_grid)
        if work is not None and not arguments.keep_features and arguments.work is None:
            shutil.rmtree(work, ignore_errors=True)
        print(report.table(result))
        for path in filter(None, (arguments.json, arguments.report, arguments.copies_grid)):
            print(f"written: {path}")
    finish()

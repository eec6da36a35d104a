"""Samples, a reference and an extractor -> every metric with its protocol."""

import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

import mutor_vision
from mutor_vision.errors import IntegrityError, UserError
from mutor_vision.features.extract import extract
from mutor_vision.features.moments import Moments, Statistics, read_protocol, read_statistics
from mutor_vision.features.sources import FolderImages, NpzImages, check_count, check_labels, read_labels
from mutor_vision.metrics import frechet, guards, per_class, scores
from mutor_vision.runtime import Runtime, exact_float32
from mutor_vision.storage.files import read_json, sha256
from mutor_vision.storage.npz import Npz, is_statistics
from mutor_vision.storage.outputs import check_out_file, check_out_folder

METRICS = ("fid", "sfid", "is", "pr", "kid")


@dataclass(frozen=True)
class Options:
    """How to measure. Defaults: ADM's protocol."""

    metrics: tuple[str, ...] = ()  # of METRICS; () = all that the extractor and the reference allow
    batch: int = 50  # images per forward pass and process
    splits: int = 10  # parts of the Inception Score
    k: int = 3  # neighbours of precision and recall
    groups: int = 20  # of the jackknife, 0 = no error bars
    kid_subsets: int = 100
    kid_subset_size: int = 1000  # at most; smaller sets use all of the smaller one
    work: Path | None = None  # keeps features of finished chunks there, None = nowhere
    strict: bool = False  # a warning stops the evaluation

    def __post_init__(self) -> None:
        unknown = set(self.metrics) - set(METRICS)
        if unknown:
            raise UserError(f"metric '{min(unknown)}' does not exist; expected some of {', '.join(METRICS)}")
        for name in ("batch", "splits", "k", "kid_subsets"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, expected 1 or more")
        if self.groups < 0 or self.groups == 1:
            raise UserError(f"groups is {self.groups}, expected 2 or more, or 0 for no error bars")


@dataclass
class ImageSet:
    """One side of a comparison: images, statistics, or (ADM's reference files) both."""

    images: object | None  # a source of features.sources
    statistics: Npz | None
    record: dict  # for the protocol

    def __post_init__(self) -> None:
        both = self.images is not None and self.statistics is not None
        self.record["distance_from"] = "images" if self.statistics is None else "statistics in the file"
        if both:  # as ADM's evaluator does: its file has statistics of 1.28 M images and 10,000 images
            self.record["distance_from"] += "; its images serve precision, recall and KID"

    @property
    def name(self) -> str:
        return str(self.record["path"])


def open_set(
    path: str | Path,
    *,
    image_size: int = 0,
    allow_lossy: bool = False,
    nchw: bool = False,
    labels: str | None = None,
    count: int = 0,
) -> ImageSet:
    """A folder or an npz -> ImageSet. count > 0: how many images it must have. Where the sampler left PATH.json beside
    its set, the labels and the protocol of sampling come from there."""
    path = Path(path)
    if path.is_dir():
        source, statistics = FolderImages(path, image_size=image_size, allow_lossy=allow_lossy), None
        record = {"path": path.name}
    else:
        npz = Npz(path)
        npz.check_crc()
        statistics = npz if is_statistics(npz) else None
        has_images = statistics is None or "arr_0" in npz.arrays
        source = NpzImages(npz, nchw=nchw, image_size=image_size) if has_images else None
        record = {"path": path.name, "sha256": sha256(path)}
    if source is None:
        if count:
            raise UserError(f"{path} holds statistics, which have no count of images to check; drop --num")
        return ImageSet(None, statistics, record)
    beside = path.with_name(path.name + ".json")
    if beside.is_file():
        _take_sampling_record(source, record, beside)
    check_count(source, count)
    if source.count < 2:
        raise IntegrityError(f"{path} has {source.count} image(s), expected 2 or more; a covariance needs them")
    if labels is not None:
        source.labels = read_labels(labels, source.count)
    return ImageSet(source, statistics, record | source.describe())


def check_outputs(runtime: Runtime, *, files: tuple = (), folders: tuple = ()) -> None:
    """Collective: UserError on every rank unless the first can write these paths (None is left out). To be called
    before the work, which would be lost. Nothing is left behind."""
    error = None
    if runtime.is_main:
        given = [Path(path).absolute() for path in (*files, *folders) if path is not None]
        try:
            if len(set(given)) < len(given):
                raise UserError(f"two results are to be written to {max(given, key=given.count)}; give each its own")
            for path in files:
                if path is not None:
                    check_out_file(path)
            for path in folders:
                if path is not None:
                    check_out_folder(path)
        except UserError as caught:
            error = caught
    runtime.raise_together(error)


def evaluate(samples: ImageSet, reference: ImageSet, extractor: nn.Module, runtime: Runtime, options: Options) -> dict:
    """Collective. Returns a JSON-ready dict: 'metrics' (each with its own protocol), 'marks', 'warnings', 'protocol',
    and, where both sides have labels, 'classes'."""
    extractor.to(runtime.device)
    metrics = _choose_metrics(samples, reference, extractor, options)
    warnings = guards.extractor_weights(extractor)
    if reference.images is not None:
        guards.image_sizes(samples.images, reference.images.height, reference.images.width, "the reference")
    warnings += guards.lossy(samples.images, reference.images)

    # ---- the reference
    roots, n_reference, by_image = {}, None, None
    if reference.statistics is not None:
        protocol = read_protocol(reference.statistics)
        warnings += guards.recorded_extractor(protocol, extractor, reference.name)
        warnings += guards.statistics_file(reference.statistics)
        if protocol is not None and samples.images is not None:
            guards.image_sizes(samples.images, *protocol["image_size"], "the reference's images")
        n_reference = protocol["n"] if protocol else None
        found = read_statistics(reference.statistics, extractor.layers)
        roots = {layer: frechet.root(to_device(statistics, runtime)) for layer, statistics in found.items()}
    if reference.images is not None and (reference.statistics is None or {"pr", "kid"} & set(metrics)):
        by_image = extract(
            reference.images, extractor, runtime, batch=options.batch, keep=("pool",), work=options.work,
            title="reference",
        )  # fmt: skip
        reference.record["images_sha256"] = by_image.images_sha256
        if reference.statistics is None:
            n_reference = reference.images.count
            roots = {layer: frechet.root(moments.total()) for layer, moments in by_image.moments.items()}

    # ---- the samples
    ours = None
    if samples.images is None:
        ours_statistics = {
            layer: to_device(statistics, runtime)
            for layer, statistics in read_statistics(samples.statistics, extractor.layers).items()
        }
        n = next(iter(ours_statistics.values())).n
    else:
        n = samples.images.count
        keep = tuple(layer for layer in ("pool", "logits") if layer in extractor.layers)
        ours = extract(
            samples.images, extractor, runtime, batch=options.batch, groups=_groups(n, extractor, options), keep=keep,
            work=options.work, title="samples",
        )  # fmt: skip
        samples.record["images_sha256"] = ours.images_sha256
        warnings += guards.pixels(ours, samples.images.labels)
        warnings += guards.class_histogram(samples.images.labels) if samples.record.get("labels") != "random" else []
        ours_statistics = {layer: moments.total() for layer, moments in ours.moments.items()}
        if by_image is not None:
            warnings += guards.same_images(ours, by_image) + guards.channel_order(ours, by_image)
    warnings += guards.counts(n or 0, n_reference, extractor.layers["pool"]) if n else []

    # ---- the numbers
    results = {}
    short = "FID" if extractor.identity["name"] == "inception" else f"FD-{extractor.identity['name']}"
    at = f"@{n}" if n else ""
    for metric, layer, name in (("fid", "pool", short), ("sfid", "spatial", "sFID")):
        if metric in metrics:
            key = metric if metric == "sfid" or short == "FID" else "fd"
            results[key] = {"name": f"{name}{at}"} | _distance(
                ours_statistics[layer], ours.moments[layer] if ours else None, roots[layer], runtime
            )
            results[key]["protocol"] = {"layer": layer, "features": extractor.layers[layer], "n_reference": n_reference}
    if "is" in metrics:
        score = scores.inception_score(ours.rows["logits"], options.splits)
        results["is"] = {"name": f"IS{at}", "value": score.mean, "standard_deviation": score.std}
        results["is"]["protocol"] = {"splits": options.splits, "shuffle_seed": scores.SHUFFLE_SEED}
        if n < guards.ADM_SPLIT * options.splits:
            text = f"Inception Score over splits of {n // options.splits:,} images, published: {guards.ADM_SPLIT:,}"
            warnings.append(guards.Warning("small-is-splits", text))
    if "pr" in metrics:
        pool, reference_pool = ours.rows["pool"], by_image.rows["pool"]
        with exact_float32():
            values = scores.precision_recall(pool, reference_pool, runtime, options.k)
        for key, value in zip(("precision", "recall"), values, strict=True):
            results[key] = {"name": f"{key.capitalize()}{at}", "value": value}
            results[key]["protocol"] = {"k": options.k, "n_reference": reference.images.count, "distances": "float32"}
    if "kid" in metrics:
        size = min(options.kid_subset_size, n, reference.images.count)
        score = scores.kernel_distance(
            ours.rows["pool"], by_image.rows["pool"], options.kid_subsets, size, runtime.device
        )
        results["kid"] = {"name": f"KID{at}", "value": score.mean, "standard_deviation": score.std}
        results["kid"]["protocol"] = {
            "subsets": options.kid_subsets, "subset_size": size, "seed": scores.SHUFFLE_SEED,
            "n_reference": reference.images.count, "kernel_dtype": "float64",
        }  # fmt: skip
    classes = per_class.measure(samples.images, reference.images, ours, by_image, extractor)
    if classes is not None and classes["accuracy"] is not None:
        results["accuracy"] = {"name": f"Accuracy{at}", "value": classes["accuracy"]}
        results["accuracy"]["protocol"] = {"classifier": extractor.identity["name"], "classes": classes["matched_by"]}
    if options.strict and warnings:
        raise IntegrityError(f"--strict: {warnings[0].text}")

    protocol = _protocol(samples, reference, extractor, n, n_reference, warnings, options)
    shared = {
        "extractor": extractor.identity["name"], "extractor_sha256": extractor.identity["state_sha256"], "n": n,
        "reference": reference.name, "reference_sha256": protocol["reference"].get("sha256")
        or protocol["reference"].get("images_sha256"),
    }  # fmt: skip
    for result in results.values():
        result["protocol"] = shared | result["protocol"]
    found = {"format": 1, "metrics": results, "marks": [warning.mark for warning in warnings]}
    found |= {"warnings": [warning.text for warning in warnings], "protocol": protocol}
    return found | ({"classes": classes} if classes is not None else {})


def _choose_metrics(samples: ImageSet, reference: ImageSet, extractor, options: Options) -> tuple[str, ...]:
    """The metrics asked for, or all possible ones; everything that would fail later fails here."""
    impossible = {}
    if "spatial" not in extractor.layers:
        impossible["sfid"] = "needs --features inception"
        impossible["is"] = "needs --features inception"
    if reference.images is None:
        impossible["pr"] = impossible["kid"] = "needs reference images; these are statistics only"
    if reference.statistics is not None and "mu_s" not in reference.statistics.arrays:
        impossible["sfid"] = "needs mu_s and sigma_s in the reference"
    if samples.images is None:
        impossible |= {name: "needs sample images; these are statistics" for name in ("is", "pr", "kid")}
        if "mu_s" not in samples.statistics.arrays:
            impossible["sfid"] = "needs mu_s and sigma_s in the samples' statistics"
    for metric in options.metrics:
        if metric in impossible:
            raise UserError(f"metric '{metric}' {impossible[metric]}; drop it from --metrics")
    chosen = options.metrics or tuple(metric for metric in METRICS if metric not in impossible)
    if samples.images is not None:
        n = samples.images.count
        if "is" in chosen and n < options.splits:
            raise UserError(f"Inception Score of {n} samples in {options.splits} splits; use --splits {n} or fewer")
        if "pr" in chosen:
            smaller = min(n, reference.images.count)
            if options.k >= smaller:
                raise UserError(f"precision and recall with k {options.k} and {smaller} images; k must be less")
    return chosen


def _groups(n: int, extractor: nn.Module, options: Options) -> int:
    """Jackknife groups, or 1 for no error bars: while a covariance is singular, the bias does not fall as 1/n and the
    jackknife would correct it by a wrong amount."""
    if not options.groups or n * (options.groups - 1) / options.groups <= extractor.layers["pool"]:
        return 1
    return options.groups


def _distance(statistics: Statistics, moments: Moments | None, root: frechet.Root, runtime: Runtime) -> dict:
    if moments is None or len(moments.n) == 1:
        return {"value": frechet.distance(statistics, root)}
    estimate = frechet.jackknife(moments, root, runtime)
    return {
        "value": estimate.value, "bias_corrected": estimate.bias_corrected,
        "standard_error": estimate.standard_error, "interval_95": list(estimate.interval_95),
        "jackknife_groups": estimate.groups,
    }  # fmt: skip


def _protocol(samples, reference, extractor, n, n_reference, warnings, options) -> dict:
    marks = {warning.mark for warning in warnings}
    breaking = {"unknown-weights", "random-weights", "lossy-samples", "lossy-reference"}
    is_adm = extractor.identity["name"] == "inception" and not marks & breaking and options.splits == 10
    return {
        "protocol": "adm" if is_adm and options.k == 3 else "custom",
        "n": n, "n_reference": n_reference, "samples": samples.record, "reference": reference.record,
        "extractor": extractor.identity, "features_dtype": "float32", "tf32": False, "moments_dtype": "float64",
        "labels": samples.record.get("labels"), "sampler": samples.record.get("settings"),
        "versions": {
            "mutor_vision": mutor_vision.__version__, "torch": torch.__version__, "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }  # fmt: skip


def _take_sampling_record(source, record: dict, beside: Path) -> None:
    """Labels and protocol that `mutor sample --num` wrote beside a set."""
    made = read_json(beside)
    if not isinstance(made, dict) or "labels_of_images" not in made:
        return  # some other JSON file
    if type(made.get("num")) is not int or not isinstance(made["labels_of_images"], list):
        raise IntegrityError(f"{beside} is not the record that `mutor sample` wrote; restore it, or remove it")
    check_count(source, made["num"])
    if source.labels is None:
        try:
            labels = np.array(made["labels_of_images"])
        except ValueError:  # lists of unequal lengths
            raise IntegrityError(f"{beside}: labels_of_images are not class ids; restore it, or remove it") from None
        source.labels = check_labels(labels, source.count, f"{beside}: labels_of_images")
    record |= {name: made[name] for name in ("labels", "seed", "model", "decoding") if name in made}
    record["settings"] = made.get("sampler")


def to_device(statistics: Statistics, runtime: Runtime) -> Statistics:
    """The same statistics on runtime.device."""
    return Statistics(statistics.mu.to(runtime.device), statistics.sigma.to(runtime.device), statistics.n)

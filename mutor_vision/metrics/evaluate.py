"""Samples, a reference and an extractor -> every metric with its protocol."""

import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mutor_vision
from mutor_vision.data.reading import source_kind
from mutor_vision.errors import IntegrityError, UserError
from mutor_vision.features.extract import extract
from mutor_vision.features.extractors import Extractor
from mutor_vision.features.moments import Statistics, read_protocol, read_statistics
from mutor_vision.features.sources import NpzImages, SourceImages, check_count, check_labels, read_labels
from mutor_vision.metrics import guards
from mutor_vision.metrics.class_accuracy import ClassAccuracy
from mutor_vision.metrics.copies import Copies
from mutor_vision.metrics.density import DensityCoverage
from mutor_vision.metrics.frechet import FrechetDistance
from mutor_vision.metrics.metric import ImageSet, Measured, Metric, MetricSettings, Side, impossible
from mutor_vision.metrics.mind import Mind
from mutor_vision.metrics.per_class import PerClass
from mutor_vision.metrics.ratio import FrechetRatio
from mutor_vision.metrics.scores import InceptionScore, KernelDistance, PrecisionRecall
from mutor_vision.runtime import Runtime
from mutor_vision.storage.files import read_json, sha256
from mutor_vision.storage.npz import Npz, is_statistics
from mutor_vision.storage.outputs import check_out_file, check_out_folder

FID = FrechetDistance("fid", "FID", "pool")
# What --metrics offers, in the order of the results. A new metric is a class in a file of its own, and a line here.
METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        FID,
        FrechetDistance("sfid", "sFID", "spatial", extractors=("inception",)),
        InceptionScore(),
        PrecisionRecall(),
        KernelDistance(),
        Mind(),
        DensityCoverage(),
        FrechetRatio(FID),
        Copies(),
    )
}
# Computed whatever is asked for, as far as samples and reference allow.
ALWAYS: tuple[Metric, ...] = (PerClass(), ClassAccuracy())


@dataclass(frozen=True)
class Options(MetricSettings):
    """How to measure. Defaults: ADM's protocol."""

    metrics: tuple[str, ...] = ()  # of METRICS; () = all that the extractor and the reference allow
    batch: int = 50  # images per forward pass and process
    work: Path | None = None  # keeps features of finished chunks there, None = nowhere
    strict: bool = False  # a warning stops the evaluation

    def __post_init__(self) -> None:
        unknown = set(self.metrics) - set(METRICS)
        if unknown:
            raise UserError(f"metric '{min(unknown)}' does not exist; expected some of {', '.join(METRICS)}")
        self._require_positive("batch")
        super().__post_init__()


def open_set(
    path: str | Path,
    *,
    image_size: int = 0,
    allow_lossy: bool = False,
    nchw: bool = False,
    labels: str | None = None,
    count: int = 0,
) -> ImageSet:
    """A folder (or another data source) or an npz -> ImageSet. count > 0: how many images it must have. Where the
    sampler left PATH.json beside its set, the labels and the protocol of sampling come from there."""
    claimed, path = source_kind(path) is not None, Path(path)
    if claimed or path.is_dir():
        source: SourceImages | NpzImages | None = SourceImages(path, image_size=image_size, allow_lossy=allow_lossy)
        statistics = None
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
    """Collective: raise UserError on every rank unless rank 0 can write these paths (None = no path). Called before the
    work, which would be lost otherwise. Leaves nothing behind."""
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


def evaluate(
    samples: ImageSet, reference: ImageSet, extractor: Extractor, runtime: Runtime, options: Options,
    held_out: ImageSet | None = None,
) -> dict:  # fmt: skip
    """Collective. Returns a JSON-ready dict: 'metrics' (each with its own protocol), 'marks', 'warnings', 'protocol',
    and, where both sides have labels, 'classes'. held_out: real images that the model has not seen; what they measure
    against the reference stands beside what the samples measure."""
    sides = {"samples": samples.record, "reference": reference.record, "held_out": held_out and held_out.record}
    runtime.check_same(asdict(options) | sides | {"work": "", "extractor": extractor.identity})
    extractor.to(runtime.device)
    chosen = _choose(samples, reference, held_out, extractor, options)
    warnings = guards.extractor_weights(extractor)
    for side, what in ((reference, "the reference"), (held_out, "the held-out images")):
        if side is not None and side.images is not None:
            guards.image_sizes(samples.images, side.images.height, side.images.width, what)
    warnings += guards.lossy(samples.images, reference.images)

    needed = {layer for metric in chosen for layer in metric.reference_rows}
    always = {layer for metric in ALWAYS for layer in metric.reference_rows}
    theirs, found = _measure_real(samples, reference, needed, always, extractor, runtime, options)
    warnings += found
    prepared = {metric.name: metric.prepare(theirs) for metric in chosen}
    real = None
    if held_out is not None:
        needed = {layer for metric in chosen for layer in metric.held_out_rows}
        from_images = held_out.statistics is None
        groups = _groups(held_out.images.count, extractor, options) if from_images else 1
        useful = {layer for metric in ALWAYS for layer in metric.held_out_rows}
        real, found = _measure_real(samples, held_out, needed, useful, extractor, runtime, options, groups)
        warnings += found + guards.held_out(real.extracted, theirs.extracted)
    ours, found = _measure_samples(samples, chosen, extractor, runtime, options)
    warnings += found
    if ours.extracted is not None and theirs.extracted is not None:
        warnings += guards.same_images(ours.extracted, theirs.extracted)
        warnings += guards.channel_order(ours.extracted, theirs.extracted)
    warnings += guards.counts(ours.n or 0, theirs.n, extractor.layers["pool"]) if ours.n else []

    measured = Measured(ours, theirs, extractor, runtime, options, real)
    results: dict[str, Any] = {}
    sections: dict[str, Any] = {}
    for metric in (*chosen, *ALWAYS):
        of_metric = metric.compute(measured, prepared.get(metric.name))
        results |= of_metric.results
        sections |= of_metric.sections
        warnings += of_metric.warnings
    if options.strict and warnings:
        raise IntegrityError(f"--strict: {warnings[0].text}")

    protocol = _protocol(measured, warnings)
    of_all = {
        "extractor": extractor.identity["name"], "extractor_sha256": extractor.identity["state_sha256"], "n": ours.n,
        "reference": reference.name, "reference_sha256": protocol["reference"].get("sha256")
        or protocol["reference"].get("images_sha256"),
    }  # fmt: skip
    for result in results.values():
        result["protocol"] = of_all | result["protocol"]
    return {
        "format": 1, "metrics": results, "marks": [warning.mark for warning in warnings],
        "warnings": [warning.text for warning in warnings], "protocol": protocol,
    } | sections  # fmt: skip


def _choose(
    samples: ImageSet, reference: ImageSet, held_out: ImageSet | None, extractor: Extractor, options: Options
) -> list[Metric]:
    """The metrics asked for, or all that are possible. Raises UserError for one that is not, before any feature is
    computed."""
    reasons = {name: impossible(metric, samples, reference, held_out, extractor) for name, metric in METRICS.items()}
    for name in options.metrics:
        if reasons[name]:
            raise UserError(f"metric '{name}' {reasons[name]}; drop it from --metrics")
    wanted = options.metrics or [name for name, reason in reasons.items() if not reason]
    chosen = [metric for name, metric in METRICS.items() if name in wanted]
    if samples.images is not None:
        for metric in chosen:
            metric.check(samples.images.count, reference.images.count if reference.images else None, options)
    return chosen


def _measure_real(
    samples: ImageSet, real: ImageSet, needed: set[str], useful: set[str], extractor: Extractor, runtime: Runtime,
    options: Options, groups: int = 1,
) -> tuple[Side, list[guards.Caveat]]:  # fmt: skip
    """Collective. The statistics of the reference or of held-out images, from their file where it has them, else from
    the images; features of the images where they give the statistics, or a metric needs rows of a layer. Rows of
    `useful` layers are kept when features are computed anyway. groups: of the moments of the images."""
    warnings, n, statistics, extracted = [], None, {}, None
    if real.statistics is not None:
        protocol = read_protocol(real.statistics)
        warnings += guards.recorded_extractor(protocol, extractor, real.name)
        warnings += guards.statistics_file(real.statistics)
        if protocol is not None and samples.images is not None:
            height, width = protocol["image_size"]
            guards.image_sizes(samples.images, height, width, f"images behind {real.name}")
        n = protocol["n"] if protocol else None
        statistics = _read_statistics(real, extractor, runtime)
    if real.images is not None and (real.statistics is None or needed):
        extracted = extract(
            real.images, extractor, runtime, batch=options.batch, groups=groups,
            keep=_in_order(needed | useful, extractor), work=options.work, title=real.name,
        )  # fmt: skip
        real.record["images_sha256"] = extracted.images_sha256
        if real.statistics is None:
            n = real.images.count
            statistics = {layer: moments.total() for layer, moments in extracted.moments.items()}
    return Side(real, n, statistics, extracted), warnings


def _measure_samples(
    samples: ImageSet, chosen: list[Metric], extractor: Extractor, runtime: Runtime, options: Options
) -> tuple[Side, list[guards.Caveat]]:
    """Collective. Features and statistics of the samples, or the statistics that were given in their place."""
    if samples.images is None:
        statistics = _read_statistics(samples, extractor, runtime)
        return Side(samples, next(iter(statistics.values())).n, statistics, None), []
    n = samples.images.count
    keep = {layer for metric in (*chosen, *ALWAYS) for layer in metric.rows}
    extracted = extract(
        samples.images, extractor, runtime, batch=options.batch, groups=_groups(n, extractor, options),
        keep=_in_order(keep, extractor), work=options.work, title="samples",
    )  # fmt: skip
    samples.record["images_sha256"] = extracted.images_sha256
    warnings = guards.pixels(extracted, samples.images.labels)
    if samples.record.get("labels") != "random":
        warnings += guards.class_histogram(samples.images.labels)
    statistics = {layer: moments.total() for layer, moments in extracted.moments.items()}
    return Side(samples, n, statistics, extracted), warnings


def _read_statistics(side: ImageSet, extractor: Extractor, runtime: Runtime) -> dict[str, Statistics]:
    found = read_statistics(side.statistics, extractor.layers)
    return {layer: to_device(statistics, runtime) for layer, statistics in found.items()}


def _in_order(layers: set[str], extractor: Extractor) -> tuple[str, ...]:
    """Those of the layers that the extractor has, in its own order."""
    return tuple(layer for layer in extractor.layers if layer in layers)


def _groups(n: int, extractor: Extractor, options: Options) -> int:
    """Jackknife groups, or 1 for no error bars: while a covariance is singular, the bias does not fall as 1/n and the
    jackknife would correct it by a wrong amount."""
    if not options.groups or n * (options.groups - 1) / options.groups <= extractor.layers["pool"]:
        return 1
    return options.groups


def _protocol(measured: Measured, warnings: list[guards.Caveat]) -> dict:
    samples, reference, identity = measured.samples, measured.reference, measured.extractor.identity
    marks = {warning.mark for warning in warnings}
    breaking = {"unknown-weights", "random-weights", "lossy-samples", "lossy-reference"}
    as_adm = (measured.settings.splits, measured.settings.k) == (MetricSettings.splits, MetricSettings.k)
    beside = measured.held_out
    return {
        "protocol": "adm" if identity["name"] == "inception" and not marks & breaking and as_adm else "custom",
        "n": samples.n, "n_reference": reference.n, "samples": samples.given.record,
        "reference": reference.given.record, "held_out": None if beside is None else beside.given.record,
        "n_held_out": None if beside is None else beside.n,
        "extractor": identity, "features_dtype": "float32", "tf32": False, "moments_dtype": "float64",
        "labels": samples.given.record.get("labels"), "sampler": samples.given.record.get("settings"),
        "versions": {
            "mutor_vision": mutor_vision.__version__, "torch": torch.__version__, "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }  # fmt: skip


def _take_sampling_record(source: SourceImages | NpzImages, record: dict, beside: Path) -> None:
    """Add the labels and the protocol that `mutor sample --num` wrote beside a set."""
    made = read_json(beside)
    if not isinstance(made, dict) or "labels_of_images" not in made:
        return  # some other JSON file
    if type(made.get("num")) is not int or not isinstance(made["labels_of_images"], list):
        raise IntegrityError(f"{beside} is not the record that `mutor sample` wrote; restore it, or remove it")
    check_count(source, made["num"], beside)
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

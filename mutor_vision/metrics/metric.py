"""What a metric is. Each one says what it needs of a comparison, and computes from what was measured.

A metric is a subclass of `Metric` in a file of its own and a line in `evaluate.METRICS`; `evaluate` loops over the
table and knows none of them by name.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mutor_vision.errors import UserError
from mutor_vision.features.extract import Extracted
from mutor_vision.features.extractors import Extractor
from mutor_vision.features.moments import LAYER_KEYS, Statistics
from mutor_vision.features.sources import Images
from mutor_vision.metrics.guards import Caveat
from mutor_vision.runtime import Runtime
from mutor_vision.storage.npz import Npz

# `| Any` stands for `| None`, unchecked: `impossible` has seen to it that a metric has what it says it needs.


@dataclass
class ImageSet:
    """One side of a comparison as it was given: images, statistics, or (ADM's reference files) both."""

    images: Images | Any
    statistics: Npz | Any
    record: dict  # for the protocol

    def __post_init__(self) -> None:
        both = self.images is not None and self.statistics is not None
        self.record["distance_from"] = "images" if self.statistics is None else "statistics in the file"
        if both:  # as ADM's evaluator does: its file has statistics of 1.28 M images and 10,000 images
            self.record["distance_from"] += "; its images serve precision, recall, KID and the like"

    @property
    def name(self) -> str:
        return str(self.record["path"])


@dataclass(frozen=True)
class MetricSettings:
    """Numbers that metrics are computed with. Defaults: ADM's protocol."""

    splits: int = 10  # parts of the Inception Score
    k: int = 3  # neighbours of precision and recall
    kid_subsets: int = 100
    kid_subset_size: int = 1000  # at most; smaller sets use all of the smaller one
    directions: int = 1000  # of MIND
    density_k: int = 5  # neighbours of density and coverage, at most; as in their paper
    groups: int = 20  # of the jackknife, 0 = no error bars

    def __post_init__(self) -> None:
        self._require_positive("splits", "k", "kid_subsets", "directions", "density_k")
        if self.groups < 0 or self.groups == 1:
            raise UserError(f"groups is {self.groups}, expected 2 or more, or 0 for no error bars")

    def _require_positive(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, expected 1 or more")


@dataclass(frozen=True)
class Side:
    """One side of a comparison after the extractor has seen it; the same on every rank."""

    given: ImageSet
    n: int | Any  # images behind the statistics; None where their file does not say
    statistics: dict[str, Statistics]  # layer -> mean and covariance, on the runtime's device
    extracted: Extracted | Any  # features of its images; None where there are none, or no metric needs them
    shared: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """What several metrics need of this side: made by the first that asks, kept for the others. Where `make` is
        collective, every rank asks in the same order, as in all of `compute`."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def rows(self, layer: str) -> Tensor | Any:
        """Features (N, D) float32 of every image on the CPU; None where they are not at hand."""
        return None if self.extracted is None else self.extracted.rows.get(layer)


@dataclass(frozen=True)
class Measured:
    """Both sides of a comparison, and the real images that stand beside the samples."""

    samples: Side
    reference: Side
    extractor: Extractor
    runtime: Runtime
    settings: MetricSettings
    held_out: Side | Any = None  # real images that the model has not seen, where they were given

    def title(self, name: str) -> str:
        """The metric's name with the number of samples, such as 'FID@50000', as papers write it."""
        return f"{name}@{self.samples.n}" if self.samples.n else name


@dataclass(frozen=True)
class Found:
    """What one metric makes of a comparison."""

    # key in the JSON file -> {'name', 'value', ..., 'protocol': what this metric adds to the protocol of all}
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    warnings: tuple[Caveat, ...] = ()
    sections: dict[str, Any] = field(default_factory=dict)  # what stands beside 'metrics' in the JSON file


class Metric:
    """A metric. A subclass sets `name` and what it needs, and writes `compute`; the two methods before it have
    defaults that do nothing."""

    name: str  # as users write it after --metrics
    extractors: tuple[str, ...] = ()  # names of the extractors that it is defined for; () = any that has the layers
    statistics: tuple[str, ...] = ()  # layers whose mean and covariance it needs, of both sides
    rows: tuple[str, ...] = ()  # layers of which it needs the features of every sample, so samples must be images
    reference_rows: tuple[str, ...] = ()  # the same of every reference image
    held_out_rows: tuple[str, ...] = ()  # the same of every held-out image, where there are any
    held_out = False  # whether it needs the statistics of held-out images

    def check(self, num_samples: int, num_reference: int | None, settings: MetricSettings) -> None:
        """Raise UserError where settings do not fit the number of images. Called before any feature is computed, for
        samples that are images; num_reference is None where the reference is statistics only."""

    def prepare(self, reference: Side) -> Any:
        """Whatever of the work needs the reference alone; `compute` gets the result. Called before the samples are
        measured, which can take hours, so that a damaged reference is refused first."""

    def compute(self, measured: Measured, prepared: Any) -> Found:
        """Collective: every rank calls it with the same features, and gets the same result."""
        raise NotImplementedError


def impossible(
    metric: Metric, samples: ImageSet, reference: ImageSet, held_out: ImageSet | None, extractor: Extractor
) -> str | None:
    """Why a metric cannot be computed from these, in words that follow its name; None where it can."""
    if samples.images is None:
        if metric.rows or metric.reference_rows:
            return "needs sample images; these are statistics"
        if lacking := _lacking(metric.statistics, samples):
            return f"needs {lacking} in the samples' statistics"
    if reference.statistics is not None and (lacking := _lacking(metric.statistics, reference)):
        return f"needs {lacking} in the reference"
    if reference.images is None and metric.reference_rows:
        return "needs reference images; these are statistics only"
    if metric.extractors and extractor.identity["name"] not in metric.extractors:
        return f"needs --features {' or '.join(metric.extractors)}"
    for layer in (*metric.statistics, *metric.rows, *metric.reference_rows):
        if layer not in extractor.layers:
            return f"needs the features '{layer}'; {extractor.identity['name']} gives {', '.join(extractor.layers)}"
    if metric.held_out:
        if held_out is None:
            return "needs --held-out, real images that the model has not seen"
        if held_out.statistics is not None and (lacking := _lacking(metric.statistics, held_out)):
            return f"needs {lacking} in the held-out statistics"
    return None


def _lacking(layers: Iterable[str], side: ImageSet) -> str:
    """The members of an npz that hold these layers' statistics, where one of them is missing; else ''."""
    for mean, covariance in (LAYER_KEYS[layer] for layer in layers):
        if mean not in side.statistics.arrays or covariance not in side.statistics.arrays:
            return f"{mean} and {covariance}"
    return ""

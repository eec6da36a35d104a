"""What makes a number wrong or incomparable, found before it is printed. A guard either raises (the number would be
wrong) or returns warnings, each with a short mark that goes into the result."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mutor_vision.errors import IntegrityError, MismatchError
from mutor_vision.features.extract import Extracted
from mutor_vision.storage.npz import Npz

PUBLISHED_COUNT = 50_000  # samples behind published FID and IS
SMOKE_COUNT = 10_000  # below, a distance says little
ADM_SPLIT = 5000  # samples in each of ADM's splits for the Inception Score
DUPLICATES_REFUSED = 0.01  # share of samples equal to another of their class: the same seed on all ranks gives more
CONSTANT_REFUSED = 0.001  # share of one-coloured samples


@dataclass(frozen=True)
class Warning:
    """`mark` stays with the result; `text` says why in a sentence."""

    mark: str
    text: str


def counts(n: int, n_reference: int | None, dim: int) -> list[Warning]:
    """Warnings about numbers of images and a feature width of `dim`."""
    found = []
    if n <= dim:
        text = f"{n:,} samples for {dim} features: their covariance is singular and the distance compares with nothing"
        found.append(Warning("singular-covariance", text))
    if n_reference is not None and n_reference <= dim:
        text = f"the reference has {n_reference:,} images for {dim} features: its covariance is singular; use more"
        found.append(Warning("singular-reference", text))
    if n < SMOKE_COUNT:
        found.append(Warning("smoke-only", f"{n:,} samples, under {SMOKE_COUNT:,}: good for a smoke test only"))
    elif n != PUBLISHED_COUNT:
        text = f"{n:,} samples: not comparable with published FID-50K, which a count alone can move by several points"
        found.append(Warning("not-50k", text))
    return found


def extractor_weights(extractor) -> list[Warning]:
    if extractor.is_random:
        return [Warning("random-weights", "random weights: these numbers test the plumbing and measure nothing")]
    if extractor.identity.get("weights") == "unknown":
        text = "the Inception weights are not the published file: numbers compare only with others of this file"
        return [Warning("unknown-weights", text)]
    return []


def lossy(samples, reference) -> list[Warning]:
    found = []
    if getattr(samples, "lossy", False):
        text = "the samples are JPEG or WEBP files, whose loss shifts every metric"
        found.append(Warning("lossy-samples", text))
    if getattr(reference, "lossy", False):
        text = "the reference is of JPEG or WEBP files: right if they are the data set's originals, wrong if copies"
        found.append(Warning("lossy-reference", text))
    return found


def pixels(extracted: Extracted, labels: Tensor | None = None) -> list[Warning]:
    """Warnings about identical and one-coloured samples; IntegrityError when there are many. labels: int64 (N,) where
    classes are known. A single copy, and copies of another class, are of the data: no seed makes them."""
    n = len(extracted.digests)
    found = []
    repeated = n - len(torch.unique(extracted.digests, dim=0))
    keyed = extracted.digests if labels is None else torch.cat([extracted.digests, labels[:, None]], dim=1)
    of_a_seed = n - len(torch.unique(keyed, dim=0))
    if of_a_seed > max(1, DUPLICATES_REFUSED * n):
        raise IntegrityError(
            f"{of_a_seed:,} of {n:,} samples are copies of others; was one seed used on all ranks? sample again"
        )
    if repeated:
        found.append(Warning("duplicates", f"{repeated:,} of {n:,} samples are copies of others"))
    constant = int(extracted.constant.sum())
    if constant > CONSTANT_REFUSED * n:
        raise IntegrityError(f"{constant:,} of {n:,} samples are of one colour; NaN decodes to that. Sample again")
    if constant:
        found.append(Warning("constant-images", f"{constant:,} of {n:,} samples are of one colour"))
    return found


def same_images(samples: Extracted, reference: Extracted) -> list[Warning]:
    """Warn when most samples are in the reference: the distance is then about 0 by construction."""
    known = {row.tobytes() for row in reference.digests.numpy()}
    shared = sum(row.tobytes() in known for row in samples.digests.numpy()) / len(samples.digests)
    if shared > 0.5:
        text = f"{shared:.0%} of the samples are images of the reference: the distance is about 0 by construction"
        return [Warning("scored-against-itself", text)]
    return []


def channel_order(samples: Extracted, reference: Extracted) -> list[Warning]:
    """Warn when the samples' mean colour fits the reference's much better with red and blue exchanged."""
    ours, theirs = samples.mean_rgb.double().mean(0), reference.mean_rgb.double().mean(0)
    straight, mirrored = (ours - theirs).abs().sum(), (ours.flip(0) - theirs).abs().sum()
    if straight > 10 and mirrored < straight / 3:
        return [
            Warning("bgr", "the samples' mean colour is the reference's with red and blue exchanged: are they BGR?")
        ]
    return []


def class_histogram(labels: Tensor | None) -> list[Warning]:
    """Warn when classes do not have equal numbers of samples (to within one)."""
    if labels is None:
        return []
    per_class = torch.bincount(labels)
    low, high = int(per_class.min()), int(per_class.max())
    if high - low <= 1:
        return []
    text = f"classes have {low} to {high} samples each, not equally many; published numbers use 50 each or random draws"
    return [Warning("unbalanced-classes", text)]


def image_sizes(samples, height: int, width: int, what: str) -> None:
    """MismatchError unless samples have the reference's size: the resize before Inception would hide the difference."""
    if samples is not None and (samples.height, samples.width) != (height, width):
        raise MismatchError(
            f"samples are {samples.width}x{samples.height}, {what} {width}x{height}; "
            "compare equal sizes, or pass --image-size to crop and resize both"
        )


def statistics_file(npz: Npz) -> list[Warning]:
    """Warnings about a reference file with statistics."""
    found = []
    if any(npz.arrays[name].dtype.newbyteorder("=") == np.float16 for name in ("mu", "sigma")):
        found.append(Warning("float16-statistics", f"{npz.path} holds float16 statistics, which have lost digits"))
    return found


def recorded_extractor(protocol: dict | None, extractor, path) -> list[Warning]:
    """MismatchError when a reference records another extractor, or resize rule, than the one in use."""
    if protocol is None:
        text = f"{path} does not say what extractor made it; make sure that it was {extractor.identity['name']}"
        return [Warning("unrecorded-reference", text)]
    recorded = protocol["extractor"]
    for name in ("name", "resize", "state_sha256"):
        if recorded.get(name) != extractor.identity.get(name):
            raise MismatchError(
                f"{path} was made with {name} '{str(recorded.get(name))[:60]}', this run uses "
                f"'{str(extractor.identity.get(name))[:60]}'; make the reference again with eval/reference.py"
            )
    return []

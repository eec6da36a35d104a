"""Checks for what makes a result wrong or incomparable. A guard raises where the number would be wrong, and returns
caveats where it can mislead; each has a short mark that is saved with the result."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mutor_vision.errors import IntegrityError, MismatchError
from mutor_vision.features.extract import Extracted
from mutor_vision.storage.npz import Npz

PUBLISHED_COUNT = 50_000  # samples behind published FID and IS
SMOKE_COUNT = 10_000  # samples; with fewer, a distance says little
ADM_SPLIT = 5000  # samples in each of ADM's splits for the Inception Score
DUPLICATES_REFUSED = 0.01  # share of samples equal to another of their class; one seed on all ranks gives far more
HELD_OUT_SHARED = 0.01  # share of held-out images in the reference from which it matters; data sets repeat a few
CONSTANT_REFUSED = 0.001  # share of one-coloured samples


@dataclass(frozen=True)
class Caveat:
    """What limits the meaning of a result: a warning for the user. mark: a short name, saved with the result; text: one
    sentence that says why."""

    mark: str
    text: str


def counts(n: int, n_reference: int | None, dim: int) -> list[Caveat]:
    """Caveats about the number of images. dim: width of the features."""
    found = []
    if n <= dim:
        text = f"{n:,} samples for {dim} features: their covariance is singular and the distance compares with nothing"
        found.append(Caveat("singular-covariance", text))
    if n_reference is not None and n_reference <= dim:
        text = f"the reference has {n_reference:,} images for {dim} features: its covariance is singular; use more"
        found.append(Caveat("singular-reference", text))
    if n < SMOKE_COUNT:
        found.append(Caveat("smoke-only", f"{n:,} samples, under {SMOKE_COUNT:,}: good for a smoke test only"))
    elif n != PUBLISHED_COUNT:
        text = f"{n:,} samples: not comparable with published FID-50K, which a count alone can move by several points"
        found.append(Caveat("not-50k", text))
    return found


def extractor_weights(extractor) -> list[Caveat]:
    if extractor.is_random:
        return [Caveat("random-weights", "random weights: these numbers test the plumbing and measure nothing")]
    if extractor.identity.get("weights") == "unknown":
        text = "the Inception weights are not the published file: numbers compare only with others of this file"
        return [Caveat("unknown-weights", text)]
    return []


def lossy(samples, reference) -> list[Caveat]:
    found = []
    if getattr(samples, "lossy", False):
        text = "the samples are JPEG or WEBP files, whose loss shifts every metric"
        found.append(Caveat("lossy-samples", text))
    if getattr(reference, "lossy", False):
        text = "the reference is of JPEG or WEBP files: right if they are the data set's originals, wrong if copies"
        found.append(Caveat("lossy-reference", text))
    return found


def pixels(extracted: Extracted, labels: Tensor | None = None) -> list[Caveat]:
    """Caveats about identical and one-coloured samples; IntegrityError when there are many. labels: int64 (N,) where
    classes are known. Only copies within a class count as many, because a repeated seed repeats the class as well;
    copies in another class come from the training data."""
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
        found.append(Caveat("duplicates", f"{repeated:,} of {n:,} samples are copies of others"))
    constant = int(extracted.constant.sum())
    if constant > CONSTANT_REFUSED * n:
        raise IntegrityError(f"{constant:,} of {n:,} samples are of one colour; NaN decodes to that. Sample again")
    if constant:
        found.append(Caveat("constant-images", f"{constant:,} of {n:,} samples are of one colour"))
    return found


def same_images(samples: Extracted, reference: Extracted) -> list[Caveat]:
    """Caveat when most samples are images of the reference."""
    shared = _share_among(samples, reference)
    if shared > 0.5:
        text = f"{shared:.0%} of the samples are images of the reference: the distance is about 0 by construction"
        return [Caveat("scored-against-itself", text)]
    return []


def held_out(held: Extracted | None, reference: Extracted | None) -> list[Caveat]:
    """Caveat when held-out images are in the reference, so that they are not held out. Raises MismatchError when most
    are."""
    if held is None or reference is None:
        return []
    shared = _share_among(held, reference)
    if shared > 0.5:
        raise MismatchError(
            f"{shared:.0%} of the held-out images are images of the reference; give the training images as reference "
            "and others as --held-out"
        )
    if shared > HELD_OUT_SHARED:
        text = f"{shared:.1%} of the held-out images are images of the reference, so what they measure is too small"
        return [Caveat("held-out-in-reference", text)]
    return []


def _share_among(images: Extracted, others: Extracted) -> float:
    """The share of images that are among the others, pixel by pixel."""
    known = {row.tobytes() for row in others.digests.numpy()}
    return sum(row.tobytes() in known for row in images.digests.numpy()) / len(images.digests)


def channel_order(samples: Extracted, reference: Extracted) -> list[Caveat]:
    """Caveat when the samples' mean colour fits the reference's much better with red and blue exchanged."""
    ours, theirs = samples.mean_rgb.double().mean(0), reference.mean_rgb.double().mean(0)
    straight, mirrored = (ours - theirs).abs().sum(), (ours.flip(0) - theirs).abs().sum()
    if straight > 10 and mirrored < straight / 3:
        return [Caveat("bgr", "the samples' mean colour is the reference's with red and blue exchanged: are they BGR?")]
    return []


def class_histogram(labels: Tensor | None) -> list[Caveat]:
    """Caveat when classes differ by more than one sample."""
    if labels is None:
        return []
    per_class = torch.bincount(labels)
    low, high = int(per_class.min()), int(per_class.max())
    if high - low <= 1:
        return []
    text = f"classes have {low} to {high} samples each, not equally many; published numbers use 50 each or random draws"
    return [Caveat("unbalanced-classes", text)]


def image_sizes(samples, height: int, width: int, what: str) -> None:
    """Raise MismatchError unless samples have the reference's size. Inception's resize would hide the difference."""
    if samples is not None and (samples.height, samples.width) != (height, width):
        raise MismatchError(
            f"samples are {samples.width}x{samples.height}, {what} {width}x{height}; "
            "compare equal sizes, or pass --image-size to crop and resize both"
        )


def statistics_file(npz: Npz) -> list[Caveat]:
    """Caveats about a reference file with statistics."""
    found = []
    if any(npz.arrays[name].dtype.newbyteorder("=") == np.float16 for name in ("mu", "sigma")):
        found.append(Caveat("float16-statistics", f"{npz.path} holds float16 statistics, which have lost digits"))
    return found


def recorded_extractor(protocol: dict | None, extractor, path) -> list[Caveat]:
    """Raise MismatchError when a reference was made with another extractor or resize rule; caveat where it does not
    say."""
    if protocol is None:
        text = f"{path} does not say what extractor made it; make sure that it was {extractor.identity['name']}"
        return [Caveat("unrecorded-reference", text)]
    recorded = protocol["extractor"]
    for name in ("name", "resize", "state_sha256"):
        if recorded.get(name) != extractor.identity.get(name):
            raise MismatchError(
                f"{path} was made with {name} '{str(recorded.get(name))[:60]}', this run uses "
                f"'{str(extractor.identity.get(name))[:60]}'; make the reference again with eval/reference.py"
            )
    return []

"""Each class by itself: how far its samples are from its reference images, and how many of them the extractor's
classifier recognises.

A class has too few images for a covariance, so its distance is Fréchet's with diagonal covariances:
|m1 - m2|^2 + sum (s1 - s2)^2, with m means and s standard deviations of each feature.
"""

from typing import Any

import torch
from torch import Tensor

from mutor_vision.features.extract import Extracted
from mutor_vision.features.extractors import Extractor
from mutor_vision.metrics.metric import Found, Measured, Metric


class PerClass(Metric):
    """The section 'classes' of a result, and the accuracy over all classes. It is computed whenever samples have
    labels, with distances if the reference has labels too, and with accuracies if the extractor's classes match."""

    name = "classes"
    rows = ("pool", "logits")
    reference_rows = ("pool",)

    def compute(self, measured: Measured, prepared: None) -> Found:
        samples, reference = measured.samples, measured.reference
        classes = measure(
            samples.given.images, reference.given.images, samples.extracted, reference.extracted, measured.extractor
        )
        if classes is None:
            return Found()
        results = {}
        if classes["accuracy"] is not None:
            protocol = {"classifier": measured.extractor.identity["name"], "classes": classes["matched_by"]}
            results["accuracy"] = {
                "name": measured.title("Accuracy"), "value": classes["accuracy"], "protocol": protocol,
            }  # fmt: skip
        return Found(results, sections={"classes": classes})


def measure(samples, reference, ours: Extracted | None, theirs: Extracted | None, extractor: Extractor) -> dict | None:
    """Per-class results as lists in class order, JSON-ready; None when the samples have no labels.

    'distance' is None without a labelled reference, and has None for a class with fewer than two samples or reference
    images. 'accuracy' is None when the classifier's classes cannot be matched with the samples'."""
    if ours is None or samples.labels is None:
        return None
    num_classes = int(samples.labels.max()) + 1
    names = list(samples.class_names)
    if theirs is not None and reference.labels is not None:
        num_classes = max(num_classes, int(reference.labels.max()) + 1)
        names = names or list(reference.class_names)
    num_classes = max(num_classes, len(names))
    found: dict[str, Any] = {
        "names": names or [str(number) for number in range(num_classes)],
        "samples": torch.bincount(samples.labels, minlength=num_classes).tolist(),
        "distance": None,
        "accuracy": None,
        "class_accuracy": None,
        "matched_by": None,
    }
    labels_of_reference = matched_labels(reference, names) if theirs is not None else None
    if theirs is not None and labels_of_reference is not None:
        found["distance"] = diagonal_distances(
            ours.rows["pool"], samples.labels, theirs.rows["pool"], labels_of_reference, num_classes
        )
    outputs, how = match_classes(names, num_classes, extractor)
    if outputs is not None:
        right = (ours.rows["logits"].argmax(1) == outputs[samples.labels]).double()
        found["matched_by"] = how
        found["accuracy"] = right.mean().item()
        found["class_accuracy"] = [
            right[samples.labels == number].mean().item() if found["samples"][number] else None
            for number in range(num_classes)
        ]
    return found


def diagonal_distances(
    ours: Tensor, our_labels: Tensor, theirs: Tensor, their_labels: Tensor, num_classes: int
) -> list[float | None]:
    """(N, D) and (M, D) features with labels -> distance of each class, None where a side has fewer than 2 images."""
    distances: list[float | None] = []
    for number in range(num_classes):
        a, b = ours[our_labels == number].double(), theirs[their_labels == number].double()
        if len(a) < 2 or len(b) < 2:
            distances.append(None)
            continue
        means, spreads = (a.mean(0) - b.mean(0)).square().sum(), (a.std(0) - b.std(0)).square().sum()
        distances.append((means + spreads).item())
    return distances


def matched_labels(reference, names: list[str]) -> Tensor | None:
    """The reference's labels in the samples' numbering: by name where both have names, else by number."""
    if reference is None or reference.labels is None:
        return None
    if not names or not reference.class_names or list(reference.class_names) == names:
        return reference.labels
    number = {name: index for index, name in enumerate(names)}
    table = torch.tensor([number.get(name, -1) for name in reference.class_names])
    return table[reference.labels]


def match_classes(names: list[str], num_classes: int, extractor: Extractor) -> tuple[Tensor | None, str | None]:
    """(num_classes,) index of each class among the classifier's outputs, and 'name' or 'number'; (None, None) where
    they cannot be matched."""
    if not extractor.class_names or "logits" not in extractor.layers:
        return None, None
    outputs = {name: index for index, name in enumerate(extractor.class_names)}
    if names and all(name in outputs for name in names):
        return torch.tensor([outputs[name] for name in names]), "name"
    if (not names or names == [str(i) for i in range(len(names))]) and num_classes == len(outputs):
        return torch.arange(num_classes), "number"
    return None, None

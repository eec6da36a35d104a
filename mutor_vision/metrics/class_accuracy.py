"""How often a classifier that knows more classes finds the right one among those that were asked for.

A model of 11 ImageNet classes is judged by a network of 1000: its answer is its best guess among the 11. Real images
stand beside the samples, since no classifier is always right, least of all about small images.
"""

from typing import Any

import torch
from torch import Tensor

from mutor_vision.metrics.metric import Found, Measured, Metric, Side
from mutor_vision.metrics.per_class import match_classes, matched_labels


class ClassAccuracy(Metric):
    """Computed whenever samples have labels whose classes are some of the extractor's, not all of them: then it would
    be the accuracy of PerClass."""

    name = "class_accuracy"
    rows = reference_rows = held_out_rows = ("logits",)

    def compute(self, measured: Measured, prepared: None) -> Found:
        samples = measured.samples
        if samples.extracted is None or samples.given.images.labels is None:
            return Found()
        names = _names(measured)
        labels = samples.given.images.labels
        outputs, how = match_classes(names, max(len(names), int(labels.max()) + 1), measured.extractor)
        chosen = labels.unique()
        if outputs is None or not 2 <= len(chosen) < measured.extractor.layers["logits"]:
            return Found()
        right = found_among(samples.rows("logits"), labels, outputs, chosen)
        result: dict[str, Any] = {"name": measured.title(f"Accuracy among {len(chosen)} classes")} | _share(right)
        beside = measured.held_out or measured.reference
        real = _of_real(beside, names, outputs, chosen)
        if real is not None:
            of = "reference" if measured.held_out is None else "held-out"
            result["real"] = _share(real) | {"of": of, "n": len(real)}
        result["protocol"] = {
            "classifier": measured.extractor.identity["name"], "classes": how, "among": len(chosen),
            "chance": 1 / len(chosen),
        }  # fmt: skip
        return Found({self.name: result})


def found_among(logits: Tensor, labels: Tensor, outputs: Tensor, chosen: Tensor) -> Tensor:
    """(N, C) logits, (N,) classes, (K,) each class's place among the logits, (M,) the classes that may be guessed ->
    (N,) float64, 1 where the best guess is right. Images of other classes are left out."""
    ours = torch.isin(labels, chosen)
    guesses = chosen[logits[ours][:, outputs[chosen]].argmax(1)]
    return (guesses == labels[ours]).double()


def _names(measured: Measured) -> list[str]:
    """Class names, of the samples or else of the reference."""
    for side in (measured.samples, measured.reference):
        if side.given.images is not None and side.given.images.class_names:
            return list(side.given.images.class_names)
    return []


def _of_real(side: Side, names: list[str], outputs: Tensor, chosen: Tensor) -> Tensor | None:
    """What `found_among` finds on the real images of these classes; None where there are none."""
    logits, labels = side.rows("logits"), matched_labels(side.given.images, names)
    if logits is None or labels is None or not torch.isin(labels, chosen).any():
        return None
    return found_among(logits, labels, outputs, chosen)


def _share(right: Tensor) -> dict[str, float]:
    share = right.mean().item()
    return {"value": share, "standard_error": (share * (1 - share) / len(right)) ** 0.5}

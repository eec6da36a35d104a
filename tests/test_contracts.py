"""What a newcomer adds from outside the package, each as docs/design.md says: a metric, a source of images, a
quantizer. Every class here is all that has to be written."""

import numpy as np
import pytest
import torch

from mutor_vision.errors import UserError
from mutor_vision.features.extractors import load_extractor
from mutor_vision.metrics import evaluate as evaluation
from mutor_vision.metrics.evaluate import Options, evaluate, open_set
from mutor_vision.metrics.guards import Warning
from mutor_vision.metrics.metric import Found, Metric
from mutor_vision.runtime import Runtime

ALONE = Runtime(0, 1, torch.device("cpu"), None)


class NearestDistance(Metric):
    """Mean distance of a sample to the nearest reference image: 0 where samples are copies of the reference."""

    name = "nearest"
    rows = reference_rows = ("pool",)

    def compute(self, measured, prepared):
        samples, reference = (side.extracted.rows["pool"] for side in (measured.samples, measured.reference))
        value = torch.cdist(samples, reference).min(1).values.mean().item()
        result = {"name": measured.title("Nearest"), "value": value, "protocol": {"n_reference": len(reference)}}
        return Found({"nearest": result}, (Warning("near", "copies"),) if value < 1e-3 else ())


@pytest.fixture(scope="module")
def image_sets(tmp_path_factory):
    """reference.npz with 30 images, copies.npz with 20 of them, others.npz with 20 others, statistics.npz."""
    folder = tmp_path_factory.mktemp("sets")
    images = np.random.default_rng(0).integers(0, 256, (50, 16, 16, 3), dtype=np.uint8)
    np.savez(folder / "reference.npz", images[:30])
    np.savez(folder / "copies.npz", images[:20])
    np.savez(folder / "others.npz", images[30:])
    np.savez(folder / "statistics.npz", mu=np.zeros(320), sigma=np.eye(320))
    return folder


@pytest.fixture(scope="module")
def extractor():
    return load_extractor("timm:test_resnet@32", "random")


def test_a_metric_is_one_class_and_one_line(image_sets, extractor, monkeypatch):
    monkeypatch.setitem(evaluation.METRICS, NearestDistance.name, NearestDistance())
    reference = open_set(image_sets / "reference.npz")
    copies, others = (
        evaluate(open_set(image_sets / name), reference, extractor, ALONE, Options(metrics=("nearest",)))
        for name in ("copies.npz", "others.npz")
    )
    assert copies["metrics"]["nearest"]["value"] < 1e-3 < others["metrics"]["nearest"]["value"]
    assert "near" in copies["marks"] and "near" not in others["marks"]
    assert copies["metrics"].keys() == {"nearest"} and copies["metrics"]["nearest"]["name"] == "Nearest@20"
    protocol = copies["metrics"]["nearest"]["protocol"]
    assert (protocol["n"], protocol["n_reference"], protocol["extractor"]) == (20, 30, "timm:test_resnet")
    # Without a choice it comes with the others, after them, and changes none of their numbers.
    everything = evaluate(open_set(image_sets / "others.npz"), reference, extractor, ALONE, Options())
    assert list(everything["metrics"]) == ["fd", "precision", "recall", "kid", "nearest"]


def test_what_a_metric_needs_is_asked_for_before_anything_is_measured(image_sets, extractor, monkeypatch):
    monkeypatch.setitem(evaluation.METRICS, NearestDistance.name, NearestDistance())
    statistics, images = open_set(image_sets / "statistics.npz"), open_set(image_sets / "others.npz")
    options = Options(metrics=("nearest",))
    with pytest.raises(UserError, match="'nearest' needs reference images; these are statistics only"):
        evaluate(images, statistics, extractor, ALONE, options)
    with pytest.raises(UserError, match="'nearest' needs sample images"):
        evaluate(statistics, images, extractor, ALONE, options)
    monkeypatch.setattr(NearestDistance, "rows", ("tokens",))
    with pytest.raises(UserError, match="needs the features 'tokens'; timm:test_resnet gives pool"):
        evaluate(images, open_set(image_sets / "reference.npz"), extractor, ALONE, options)


def test_a_damaged_reference_is_refused_before_the_samples_are_measured(image_sets, extractor, tmp_path, monkeypatch):
    """They can be hours of sampling."""
    sigma = np.eye(extractor.layers["pool"])
    sigma[0, 0] = -1
    np.savez(tmp_path / "damaged.npz", mu=np.zeros(len(sigma)), sigma=sigma)
    samples = open_set(image_sets / "others.npz")
    monkeypatch.setattr(samples.images, "read", lambda *span: pytest.fail("samples were read"))
    with pytest.raises(UserError, match="the covariance of the reference has the negative eigenvalue"):
        evaluate(samples, open_set(tmp_path / "damaged.npz"), extractor, ALONE, Options(metrics=("fid",)))

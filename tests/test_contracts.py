"""What a newcomer adds from outside the package, each as docs/design.md says: a metric, a source of images, a
quantizer. Every class here is all that has to be written."""

import dataclasses
import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from mutor_vision.config import TokenizerConfig, TokenizerTrainConfig
from mutor_vision.data import reading
from mutor_vision.data.folder import ImageFolder
from mutor_vision.data.reading import open_source
from mutor_vision.data.source import Source
from mutor_vision.errors import ImageError, MismatchError, UserError
from mutor_vision.features.extract import extract
from mutor_vision.features.extractors import load_extractor
from mutor_vision.metrics import evaluate as evaluation
from mutor_vision.metrics.evaluate import Options, evaluate, open_set
from mutor_vision.metrics.guards import Warning
from mutor_vision.metrics.metric import Found, Metric
from mutor_vision.runtime import Runtime
from mutor_vision.storage.checkpoint import read_weights
from mutor_vision.tokenizer.encode import EncodeSettings, encode_folder
from mutor_vision.tokenizer.repairs import recall_bad
from mutor_vision.tokenizer.train import train_tokenizer

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


# ---- a source of images


class MemorySource(Source):
    """Noise of 16 pixels in three classes, made from the number in 'memory:SEED'."""

    def __init__(self, data):
        self.pixels = np.random.default_rng(int(str(data)[7:])).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
        self.labels, self.class_names = [0] * 5 + [1] * 4 + [2] * 3, ["ant", "bee", "cat"]

    @classmethod
    def claims(cls, data):
        return data.startswith("memory:")

    def __len__(self):
        return len(self.pixels)

    def open(self, number):
        return Image.fromarray(self.pixels[number])

    def fingerprint(self, numbers=None):
        return hashlib.sha256(self.pixels[slice(None) if numbers is None else list(numbers)].tobytes()).hexdigest()


@pytest.fixture
def same_images(tmp_path, monkeypatch):
    """'memory:1', and a folder of the same images."""
    monkeypatch.setattr(reading, "SOURCES", [MemorySource])
    source = open_source("memory:1")
    for number, label in enumerate(source.labels):
        path = tmp_path / "images" / source.class_names[label] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        source.open(number).save(path)
    return "memory:1", tmp_path / "images"


def test_a_source_is_one_class_and_one_line(same_images, tmp_path):
    memory, folder = same_images
    config = TokenizerTrainConfig(
        TokenizerConfig(image_size=16, channels=(8, 8), layers_per_block=1, latent_channels=8, code_dim=4,
                        codebook_size=16, attention=False, norm_groups=4),
        val_fraction=0.2, steps=3, batch_size=4, workers=0, log_every=1, val_every=3, sample_every=3, save_every=3,
        precision="float32",
    )  # fmt: skip
    sets, weights = [], []
    for number, data in enumerate(same_images):
        run, codes = tmp_path / f"vq{number}", tmp_path / f"codes{number}"
        weights.append(read_weights(train_tokenizer(dataclasses.replace(config, data=str(data)), run), "model"))
        sets.append(encode_folder(run, data, codes, EncodeSettings(shard_size=7), ALONE, workers=number))
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert torch.equal(sets[0].codes(), sets[1].codes()) and torch.equal(sets[0].labels, sets[1].labels)
    assert len(sets[0].codes().unique()) > 1 and sets[0].class_names == ["ant", "bee", "cat"]
    # It goes on, and is refused, as a folder is: by the fingerprint of what it holds.
    assert torch.equal(encode_folder(tmp_path / "vq0", memory, tmp_path / "codes0", EncodeSettings(shard_size=7),
                                     ALONE).codes(), sets[0].codes())  # fmt: skip
    with pytest.raises(MismatchError, match="begun with other images"):
        encode_folder(tmp_path / "vq0", "memory:2", tmp_path / "codes0", EncodeSettings(shard_size=7), ALONE)


def test_features_of_a_source_are_those_of_a_folder_of_its_images(same_images, extractor):
    memory, folder = (open_set(data) for data in same_images)
    assert memory.images.class_names == folder.images.class_names == ("ant", "bee", "cat")
    assert torch.equal(memory.images.labels, folder.images.labels)
    found = [extract(side.images, extractor, ALONE, keep=("pool",)) for side in (memory, folder)]
    assert found[0].images_sha256 == found[1].images_sha256
    assert torch.equal(found[0].rows["pool"], found[1].rows["pool"])
    assert memory.images.key() != open_set("memory:2").images.key() and memory.images.key() == memory.images.key()


def test_a_bad_image_of_a_source_is_found_before_the_work_and_recorded(same_images, tmp_path, tiny_tokenizer_path,
                                                                       monkeypatch):  # fmt: skip
    def bad(self, number):
        if number in (3, 7):
            raise ImageError(f"image {number}: damaged", f"ant/{number}")
        return Image.fromarray(self.pixels[number])

    settings = EncodeSettings(views="center", shard_size=4)
    out = tmp_path / "codes"
    (tmp_path / "codes").mkdir()
    monkeypatch.setattr(MemorySource, "open", bad)
    with pytest.raises(ImageError, match="2 of 12 images cannot be used: image 3: damaged; image 7: damaged"):
        encode_folder(tiny_tokenizer_path, "memory:1", out, settings, ALONE, workers=0)
    monkeypatch.setattr(MemorySource, "check", lambda self, numbers: [])  # a look that does not decode
    with pytest.raises(ImageError, match="image 3: damaged"):
        encode_folder(tiny_tokenizer_path, "memory:1", out, settings, ALONE, workers=0)
    assert recall_bad(out) == ["ant/3"]


def test_a_folder_is_the_source_that_nobody_claims(same_images):
    assert isinstance(open_source(same_images[0]), MemorySource) and isinstance(
        open_source(same_images[1]), ImageFolder
    )

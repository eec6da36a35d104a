"""What a newcomer adds from outside the package, each as docs/design.md says: a metric, a source of images, a
quantizer. Every class here is all that has to be written."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
import torch
from einops import einsum
from PIL import Image

from mutor_vision.config import TokenizerConfig, TokenizerTrainConfig
from mutor_vision.data import reading
from mutor_vision.data.folder import ImageFolder
from mutor_vision.data.reading import open_source
from mutor_vision.data.source import Source
from mutor_vision.errors import ImageError, IntegrityError, MismatchError, UserError
from mutor_vision.features.extract import extract
from mutor_vision.features.extractors import load_extractor
from mutor_vision.interop.convert import convert_back
from mutor_vision.metrics import evaluate as evaluation
from mutor_vision.metrics.evaluate import Options, evaluate, open_set
from mutor_vision.metrics.guards import Caveat
from mutor_vision.metrics.metric import Found, Metric
from mutor_vision.runtime import Runtime
from mutor_vision.storage import checkpoint
from mutor_vision.tokenizer import quantizer as quantizers
from mutor_vision.tokenizer.encode import EncodeSettings, encode_folder
from mutor_vision.tokenizer.model import VQTokenizer, load_tokenizer
from mutor_vision.tokenizer.quantizer import Quantized, Quantizer
from mutor_vision.tokenizer.repairs import recall_bad
from mutor_vision.tokenizer.train import train_tokenizer

ALONE = Runtime(0, 1, torch.device("cpu"), None)
COPIES = ("copies", "nearest_distance")
TINY = TokenizerTrainConfig(
    TokenizerConfig(image_size=16, channels=(8, 8), layers_per_block=1, latent_channels=8, code_dim=4, codebook_size=16,
                    attention=False, norm_groups=4),
    val_fraction=0.2, steps=3, batch_size=4, workers=0, log_every=1, val_every=3, sample_every=3, save_every=3,
    precision="float32",
)  # fmt: skip


class NearestDistance(Metric):
    """Mean distance of a sample to the nearest reference image: 0 where samples are copies of the reference."""

    name = "nearest"
    rows = reference_rows = ("pool",)

    def compute(self, measured, prepared):
        samples, reference = (side.extracted.rows["pool"] for side in (measured.samples, measured.reference))
        value = torch.cdist(samples, reference).min(1).values.mean().item()
        result = {"name": measured.title("Nearest"), "value": value, "protocol": {"n_reference": len(reference)}}
        return Found({"nearest": result}, (Caveat("near", "copies"),) if value < 1e-3 else ())


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
    assert list(everything["metrics"]) == [
        "fd",
        "precision",
        "recall",
        "kid",
        "mind",
        "density",
        "coverage",
        *COPIES,
        "nearest",
    ]


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
    """Four random colours each, 16 pixels square, in three classes, made from the number in 'memory:SEED'."""

    def __init__(self, data):
        colours = np.random.default_rng(int(str(data)[7:])).integers(0, 256, (12, 2, 2, 3), dtype=np.uint8)
        self.pixels = colours.repeat(8, 1).repeat(8, 2)
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
    sets, weights = [], []
    for number, data in enumerate(same_images):
        run, codes = tmp_path / f"vq{number}", tmp_path / f"codes{number}"
        weights.append(
            checkpoint.read_weights(train_tokenizer(dataclasses.replace(TINY, data=str(data)), run), "model")
        )
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


# ---- a quantizer


class ScalarQuantizer(Quantizer):
    """Each of C bounded numbers is rounded to one of L levels (FSQ, arXiv 2309.15505): V = L^C, nothing is learned."""

    def __init__(self, config):
        super().__init__()
        self.levels = round(config.codebook_size ** (1 / config.code_dim))
        if config.codebook_size != self.levels**config.code_dim:
            raise UserError(f"model.codebook_size is {config.codebook_size}, expected {self.levels**config.code_dim}")
        self.register_buffer("places", self.levels ** torch.arange(config.code_dim), persistent=False)

    def forward(self, latents, entropy_temperature=0.0, rounding=True):
        bounded = latents.float().tanh()
        level = ((bounded + 1) / 2 * (self.levels - 1)).round().long()
        codes = einsum(level, self.places, "b c h w, c -> b h w")
        rounded, none = bounded + (self.lookup(codes) - bounded).detach(), bounded.new_zeros(())
        return Quantized(rounded if rounding else bounded, bounded, codes, none, none, none)

    def lookup(self, codes):
        level = codes[:, None] // self.places[:, None, None] % self.levels
        return 2 * level / (self.levels - 1) - 1


@pytest.fixture
def scalar(monkeypatch):
    """Settings of a tokenizer with it; the table knows it as 'scalar'."""
    monkeypatch.setitem(quantizers.QUANTIZERS, "scalar", ScalarQuantizer)
    model = dataclasses.replace(TINY.model, quantizer="scalar", code_dim=2)
    return dataclasses.replace(TINY, data="memory:1", model=model)


def test_a_quantizer_is_one_class_and_one_line(scalar, same_images, tmp_path):
    trained = load_tokenizer(train_tokenizer(dataclasses.replace(scalar, steps=30, lr=3e-3), tmp_path / "vq"))
    assert isinstance(trained.quantizer, ScalarQuantizer), "its name is in the configuration beside the weights"
    log = [json.loads(line) for line in (tmp_path / "vq" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5]), "gradients pass straight through it"
    sets = [encode_folder(tmp_path / "vq", data, tmp_path / f"codes{number}", EncodeSettings(), ALONE, workers=0)
            for number, data in enumerate(same_images)]  # fmt: skip
    codes = sets[0].codes()
    assert torch.equal(codes, sets[1].codes()) and len(codes.unique()) > 1 and codes.max() < 16
    grid = sets[0].take(torch.tensor([0]), torch.tensor([0]))
    assert torch.equal(trained.quantizer(trained.quantizer.lookup(grid)).codes, grid)
    assert trained.decode(grid).shape == (1, 3, 16, 16)
    with pytest.raises(MismatchError, match="has the quantizer 'scalar'"):
        convert_back(tmp_path / "vq", tmp_path / "llamagen.pt")


def test_a_quantizer_refuses_settings_before_it_is_trained(scalar, tmp_path):
    for name, value in (("dead_code_steps", 5), ("entropy_weight", 0.1)):
        with pytest.raises(UserError, match=f"{name} is {value}, expected 0: the quantizer 'scalar' has no codebook"):
            train_tokenizer(dataclasses.replace(scalar, **{name: value}), tmp_path / "vq")
    with pytest.raises(UserError, match="model.codebook_size is 32, expected 36"):
        VQTokenizer(dataclasses.replace(scalar.model, codebook_size=32))
    with pytest.raises(UserError, match="model.quantizer is 'trinary', expected one of vq, scalar"):
        train_tokenizer(
            dataclasses.replace(scalar, model=dataclasses.replace(scalar.model, quantizer="trinary")), tmp_path / "vq"
        )
    assert not (tmp_path / "vq").exists()


@pytest.mark.parametrize("format", [1, 2])
def test_a_tokenizer_from_before_quantizers_had_names_is_the_same_tokenizer(format, tmp_path):
    torch.manual_seed(0)
    before, run = VQTokenizer(TINY.model).eval(), tmp_path / "run"
    checkpoint.save(run, 1, "tokenizer", TINY, {"model": before.state_dict()}, {}, keep=2)
    folder = tmp_path / "exported"
    checkpoint.export(run, folder)
    (folder / "MANIFEST.json").unlink()  # models were exported without one
    values = json.loads((folder / "config.json").read_text())
    del values["config"]["model"]["quantizer"]
    (folder / "config.json").write_text(json.dumps(values | {"format": format}))
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert load_tokenizer(folder).config == TINY.model
    assert torch.equal(load_tokenizer(folder).encode(images), before.encode(images))
    (folder / "config.json").write_text(json.dumps(values))  # today's format names its quantizer
    with pytest.raises(IntegrityError, match="setting 'model.quantizer' is missing"):
        load_tokenizer(folder)

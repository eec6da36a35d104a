"""Inception with one random weights file: ours against torch-fidelity's own on the same images. (The published weights
are not at hand in tests; random ones exercise the same arithmetic.)"""

import hashlib

import pytest
import torch

from mutor_vision.errors import IntegrityError
from mutor_vision.features.extract import extract
from mutor_vision.features.inception import load_inception
from mutor_vision.metrics import frechet, scores
from mutor_vision.runtime import Runtime, exact_float32

ALONE = Runtime(0, 1, torch.device("cpu"), None)


class TensorImages(torch.utils.data.Dataset):
    """uint8 (N, 3, H, W) as a source of ours and a data set of torch-fidelity's."""

    prefetch, labels, lossy = False, None, False

    def __init__(self, seed: int, count: int = 6):
        # The second set is darker. With fewer images than features most eigenvalues are 0, where torch-fidelity's
        # unsymmetric eigenvalues leave about 1e-5 in all; that must be little of the distance to be compared with.
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.rand(count, 3, 4, 4, generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear")
        self.images = (smooth * (255 if seed == 1 else 60)).to(torch.uint8)
        self.count, self.height, self.width = count, 32, 32

    def read(self, start, stop):
        return self.images[start:stop]

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return self.images[index]


@pytest.fixture(scope="module")
def inception():
    return load_inception("random")


@pytest.fixture(scope="module")
def weights_file(inception, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(inception.network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def extracted(inception):
    return [
        extract(TensorImages(seed), inception, ALONE, groups=5, keep=("pool", "spatial", "logits")) for seed in (1, 2)
    ]


@pytest.mark.slow
def test_fid_is_and_kid_equal_torch_fidelitys(extracted, weights_file):
    from torch_fidelity import calculate_metrics

    expected = calculate_metrics(
        input1=TensorImages(1), input2=TensorImages(2), cuda=False, fid=True, isc=True, kid=True, isc_splits=2,
        kid_subsets=4, kid_subset_size=6, batch_size=8, save_cpu_ram=True, cache=False, verbose=False,
        feature_extractor_weights_path=str(weights_file),
    )  # fmt: skip
    samples, reference = extracted
    fid = frechet.distance(samples.moments["pool"].total(), frechet.root(reference.moments["pool"].total()))
    score = scores.inception_score(samples.rows["logits"], splits=2)
    kid = scores.kernel_distance(samples.rows["pool"], reference.rows["pool"], subsets=4, subset_size=6)
    assert fid == pytest.approx(expected["frechet_inception_distance"], rel=1e-6)
    assert score.mean == pytest.approx(expected["inception_score_mean"], rel=1e-6)
    assert score.std == pytest.approx(expected["inception_score_std"], rel=1e-6, abs=1e-9)
    # torch-fidelity's kernel is in float32; test_metrics compares ours with its definition.
    assert kid.mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-5)


@pytest.mark.slow
def test_distance_of_few_images_is_exact(extracted):
    """With n images the trace term is the nuclear norm of an n x n product of the features themselves."""
    centred = [(x.rows["pool"].double() - x.rows["pool"].double().mean(0)) / 5**0.5 for x in extracted]
    difference = (extracted[0].rows["pool"].double().mean(0) - extracted[1].rows["pool"].double().mean(0)).square()
    shared = torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    exact = difference.sum() + centred[0].square().sum() + centred[1].square().sum() - 2 * shared
    found = frechet.distance(extracted[0].moments["pool"].total(), frechet.root(extracted[1].moments["pool"].total()))
    assert found == pytest.approx(exact.item(), rel=1e-9)


@pytest.mark.slow
def test_spatial_features_are_the_first_seven_channels_last(inception, extracted):
    seen = {}
    hook = inception.network.Mixed_6d.branch1x1.register_forward_hook(lambda *call: seen.update(output=call[2]))
    with torch.no_grad():
        inception(TensorImages(1).images[:2])
    hook.remove()
    expected = [seen["output"][1, channel, row, column] for row, column, channel in ((0, 0, 0), (0, 0, 6), (16, 16, 6))]
    spatial = extracted[0].rows["spatial"]
    assert spatial.shape == (6, 2023)
    found = spatial[1][[0, 6, 2022]]
    assert torch.allclose(found, torch.stack(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_batches_of_one_and_fifty_give_the_same_fid(inception, extracted):
    reference = frechet.root(extracted[1].moments["pool"].total())
    one = extract(TensorImages(1), inception, ALONE, batch=1)
    expected = frechet.distance(extracted[0].moments["pool"].total(), reference)  # batch 50
    assert frechet.distance(one.moments["pool"].total(), reference) == pytest.approx(expected, rel=1e-6)


def test_tf32_is_off_within_and_restored_after():
    before = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    with exact_float32():
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert before == (torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision)


def test_weights_from_a_file_are_those_of_the_file(inception, weights_file):
    loaded = load_inception(str(weights_file), allow_unknown=True)
    assert loaded.identity["weights"] == "unknown" and not loaded.is_random
    assert loaded.identity["weights_sha256"] == hashlib.sha256(weights_file.read_bytes()).hexdigest()
    assert loaded.identity["state_sha256"] == inception.identity["state_sha256"]


def test_another_inception_is_never_taken_silently(weights_file, tmp_path):
    page = tmp_path / "page.pth"
    page.write_text("<!DOCTYPE html><html>404</html>")
    for path, message in ((weights_file, "expected 6726825d"), (page, "DOCTYPE"), (tmp_path / "none", "do not exist")):
        with pytest.raises(IntegrityError, match=message):
            load_inception(str(path))
    with pytest.raises(IntegrityError, match="looks like a web page"):
        load_inception(str(page), allow_unknown=True)


def test_memory_that_is_short_is_not_taken_for_a_wrong_size(monkeypatch):
    from mutor_vision.features.extractors import load_extractor

    extractor = load_extractor("timm:test_resnet@32", "random")

    def full(_):
        raise torch.OutOfMemoryError("CUDA out of memory. If reserved memory is large, set max_split_size_mb")

    monkeypatch.setattr(extractor.model, "forward_features", full)
    with pytest.raises(torch.OutOfMemoryError):
        extractor(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))

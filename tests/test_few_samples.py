"""Metrics for few samples: known answers on features that were made up, written-out references, ranks and memory."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from mutor_vision.errors import MismatchError, UserError
from mutor_vision.features.extract import Extracted
from mutor_vision.features.moments import Moments, Statistics
from mutor_vision.metrics import class_accuracy, copies, density, frechet, mind, ratio, scores
from mutor_vision.metrics.metric import ImageSet, Measured, MetricSettings, Side
from mutor_vision.runtime import Runtime, start

ALONE = Runtime(0, 1, torch.device("cpu"), None)


def normal(count: int, dim: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) + shift


def side(name: str, rows: torch.Tensor, groups: int = 20) -> Side:
    digests = torch.from_numpy(np.ascontiguousarray(rows.numpy()[:, :4])).view(torch.uint8)
    moments = Moments(rows.shape[1], groups)
    moments.update(rows)
    moments.flush()
    extracted = Extracted({"pool": moments}, {"pool": rows}, digests, torch.zeros(len(rows), 3), torch.zeros(len(rows)))
    return Side(ImageSet(None, None, {"path": name}), len(rows), {"pool": moments.total()}, extracted)


def measured(samples, reference, held_out=None, runtime=ALONE, **settings) -> Measured:
    """A comparison of features (N, D), as a metric gets it."""
    extractor = SimpleNamespace(identity={"name": "made up"}, layers={"pool": samples.shape[1]}, class_names=())
    beside = None if held_out is None else side("held-out", held_out)
    return Measured(side("samples", samples), side("reference", reference), extractor, runtime,
                    MetricSettings(**settings), beside)  # fmt: skip


def monge(first, second, n=None, directions=1000, groups=0):
    return mind.monge_distance(first, second, n or min(len(first), len(second)), directions, groups, ALONE)


# ---- MIND


def test_mind_of_equal_sets_is_zero_in_any_order():
    rows = normal(200, 16, 0)
    assert monge(rows, rows).value == 0.0
    assert monge(rows, rows.flip(0)).value == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("dim", [1, 8, 64])
def test_mind_of_a_translation_is_three_times_its_square(dim):
    rows, by = normal(300, dim, 1).double(), normal(1, dim, 2).double()
    expected = 3 * by.square().sum().item()
    # Every direction gives (u t)^2, whose mean over all directions is |t|^2 / D: for 20,000 of them, within 5 errors.
    close = 1e-9 if dim == 1 else 5 * (2 / 20_000) ** 0.5
    assert monge(rows, rows + by, directions=20_000).value == pytest.approx(expected, rel=close)


def test_mind_of_scaled_gaussians_is_that_of_their_deviations():
    """Along every direction the distributions are N(0, 1) and N(0, s^2), at distance (s - 1)^2."""
    found = monge(normal(20_000, 4, 3), 1.5 * normal(20_000, 4, 4), directions=64)
    assert found.value == pytest.approx(3 * 4 * 0.5**2, rel=0.05)


def test_mind_is_its_definition_written_out():
    first, second = normal(90, 12, 5), normal(70, 12, 6, shift=0.3)
    generator = torch.Generator().manual_seed(2020)
    chosen = first[torch.randperm(90, generator=generator)[:70]].double().numpy()
    units = torch.randn(300, 12, generator=generator).double().numpy()
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    expected = [np.mean((np.sort(chosen @ u) - np.sort(second.double().numpy() @ u)) ** 2) for u in units]
    assert monge(first, second, directions=300).value == pytest.approx(3 * 12 * np.mean(expected), rel=1e-6)


def test_mind_is_torch_fidelitys():
    theirs = pytest.importorskip("torch_fidelity.metric_mind", reason="torch-fidelity has MIND from 0.5 on")
    first, second = normal(90, 12, 5), normal(70, 12, 6, shift=0.3)
    expected = theirs.mind_features_to_metric(
        first, second, mind_num_projections=1000, cuda=False, rng_seed=2020, verbose=False
    )
    assert monge(first, second).value == pytest.approx(expected[theirs.KEY_METRIC_MIND], rel=1e-5)


def test_the_error_of_mind_is_the_deviation_over_draws():
    draws = [monge(normal(400, 8, 2 * i, shift=0.2), normal(400, 8, 2 * i + 1), directions=64, groups=20)
             for i in range(40)]  # fmt: skip
    deviation = np.std([draw.value for draw in draws])
    assert np.mean([draw.standard_error for draw in draws]) == pytest.approx(deviation, rel=0.3)
    assert monge(normal(30, 8, 0), normal(30, 8, 1), groups=20).standard_error is None, "too few for 20 groups"


def test_mind_stands_beside_real_images_at_the_same_n():
    samples, reference, held_out = normal(200, 8, 0, shift=0.5), normal(500, 8, 1), normal(150, 8, 2)
    found = mind.Mind().compute(measured(samples, reference, held_out), None)
    result = found.results["mind"]
    assert result["name"] == "MIND@150" and result["protocol"]["images_of_each_side"] == 150
    assert result["real"]["of"] == "held-out" and 0 < 5 * result["real"]["value"] < result["value"]
    assert [warning.mark for warning in found.warnings] == ["mind-few-held-out"]
    split = mind.Mind().compute(measured(samples, reference), None)
    assert split.results["mind"]["real"]["of"] == "reference, split" and not split.warnings
    assert split.results["mind"]["real"]["value"] == pytest.approx(result["real"]["value"], rel=0.5)
    alone = mind.Mind().compute(measured(samples, reference[:300]), None)
    assert "real" not in alone.results["mind"] and [one.mark for one in alone.warnings] == ["mind-alone"]


def test_the_parts_of_a_reference_share_no_image():
    one, other = mind.two_parts(torch.arange(11.0)[:, None], 5)
    assert len(set(one.flatten().tolist()) | set(other.flatten().tolist())) == 10


def test_mind_refuses_what_it_cannot_compare():
    with pytest.raises(UserError, match="MIND of 5 images and 1000 directions from 4 and 9"):
        monge(normal(4, 3, 0), normal(9, 3, 1), n=5)


# ---- density and coverage


def density_coverage(samples, reference, k=5):
    found = density.Balls(reference, k, ALONE).occupied_by(samples)
    return found.density, found.coverage


@pytest.mark.parametrize("block", [scores.BLOCK, 64])
def test_density_and_coverage_are_their_definition_written_out(block, monkeypatch):
    monkeypatch.setattr(scores, "BLOCK", block)
    samples, reference, k = normal(210, 6, 0, shift=0.3), normal(190, 6, 1), 5
    among, between = (torch.cdist(rows.double(), reference.double()) for rows in (reference, samples))
    radii = among.sort(1).values[:, k]  # the first is the image itself
    inside = between < radii
    expected = inside.sum().item() / (k * len(samples)), inside.any(0).double().mean().item()
    assert density_coverage(samples, reference) == pytest.approx(expected, abs=1e-12)


def test_one_distribution_has_density_one_and_a_coverage_that_is_known():
    samples, reference = normal(4000, 3, 0), normal(4000, 3, 1)
    for k in (1, 5):
        found = density_coverage(samples, reference, k)
        # k of 2 N points are nearest to an image, each a sample with chance 1/2: none of them is with 2^-k.
        assert found == pytest.approx((1.0, 1 - 0.5**k), abs=0.04)


def test_a_set_against_itself_has_density_and_coverage_one():
    rows = normal(200, 4, 0)
    # A ball holds its own centre and k - 1 others; the k-th lies on its edge, in one rounding or the other.
    assert density_coverage(rows, rows) == pytest.approx((1.0, 1.0), abs=0.05)


def test_a_missing_half_of_a_mixture_is_half_the_coverage():
    reference = torch.cat([normal(500, 4, 0, shift=-20.0), normal(500, 4, 1, shift=20.0)])
    found = density_coverage(normal(1000, 4, 2, shift=20.0), reference)
    assert found[0] == pytest.approx(1.0, abs=0.1), "density does not see it"
    assert 0.48 < found[1] <= 0.5
    assert density_coverage(normal(1000, 4, 2), reference) == (0.0, 0.0), "between the two lies nothing"


def test_samples_of_one_point_are_dense_and_cover_next_to_nothing():
    reference = normal(500, 4, 0)
    found = density_coverage(reference[:1].repeat(300, 1), reference)
    assert found[0] > 0.5 and found[1] < 0.1


def test_one_outlier_moves_recall_and_not_coverage():
    """Naeem et al.: a far sample has a huge ball, in which recall finds every reference image."""
    reference, samples = normal(300, 4, 0), normal(300, 4, 1, shift=8.0)
    outlier = torch.cat([samples, torch.full((1, 4), -100.0)])
    assert scores.precision_recall(samples, reference, ALONE)[1] < 0.2
    assert scores.precision_recall(outlier, reference, ALONE)[1] == 1.0
    assert density_coverage(outlier, reference)[1] == density_coverage(samples, reference)[1] < 0.1


def test_the_error_of_density_is_its_deviation_over_draws():
    balls = density.Balls(normal(300, 4, 99), 5, ALONE)
    draws = [balls.occupied_by(normal(300, 4, seed, shift=0.3)) for seed in range(60)]
    deviation = np.std([draw.density for draw in draws])
    assert np.mean([draw.density_error for draw in draws]) == pytest.approx(deviation, rel=0.3)


def test_density_of_fewer_images_than_k_says_what_k_it_took():
    found = density.DensityCoverage().compute(measured(normal(9, 3, 0), normal(4, 3, 1)), None)
    assert found.results["density"]["protocol"]["k"] == 3
    with pytest.raises(UserError, match="k must be 1 to 3"):
        density.Balls(normal(4, 3, 1), 4, ALONE)


# ---- FDr


FDR = ratio.FrechetRatio(frechet.FrechetDistance("fid", "FID", "pool"))


def fdr(comparison):
    return FDR.compute(comparison, FDR.prepare(comparison.reference))


def test_the_ratio_of_held_out_images_themselves_is_one():
    reference, held_out = normal(400, 4, 0), normal(300, 4, 1)
    found = fdr(measured(held_out, reference, held_out))
    assert found.results["fdr"]["value"] == 1.0 and not found.warnings
    near = fdr(measured(normal(300, 4, 2), reference, held_out)).results["fdr"]
    assert 0.2 < near["value"] < 5, "other real images are about as far"
    assert near["standard_error"] > 0


def test_the_ratio_of_known_gaussians_is_that_of_their_distances():
    def known(name, mean, count):
        mu = torch.full((3,), mean, dtype=torch.float64)
        given = ImageSet(None, None, {"path": name})
        return Side(given, count, {"pool": Statistics(mu, torch.eye(3, dtype=torch.float64), count)}, None)

    extractor = SimpleNamespace(identity={"name": "inception"}, layers={"pool": 3})
    reference = known("train", 0.0, 900)
    held_out = known("held-out", 1.0, 500)
    comparison = Measured(known("samples", 2.0, 500), reference, extractor, ALONE, MetricSettings(), held_out)
    result = fdr(comparison).results["fdr"]
    assert result["name"] == "FDr@500" and result["value"] == pytest.approx(4.0, rel=1e-12)
    assert result["protocol"]["distance_of_samples"] == pytest.approx(12.0)
    assert result["protocol"]["distance_of_held_out"] == pytest.approx(3.0)
    with pytest.raises(MismatchError, match="at distance 0 from the reference"):
        fdr(Measured(held_out, reference, extractor, ALONE, MetricSettings(), reference))


def test_the_ratio_of_unequal_counts_says_so():
    found = fdr(measured(normal(300, 4, 0), normal(400, 4, 1), normal(200, 4, 2)))
    assert [warning.mark for warning in found.warnings] == ["fdr-unequal-counts"]
    few = fdr(measured(normal(30, 40, 0), normal(400, 40, 1), normal(30, 40, 2)))
    assert "singular-held-out" in [warning.mark for warning in few.warnings]


def test_the_error_of_the_ratio_is_its_deviation_over_draws():
    reference = normal(4000, 3, 99)
    draws = [fdr(measured(normal(1000, 3, 2 * seed, shift=0.5), reference, normal(1000, 3, 2 * seed + 1, shift=0.3)))
             for seed in range(40)]  # fmt: skip
    results = [draw.results["fdr"] for draw in draws]
    deviation = np.std([result["value"] for result in results])
    assert np.mean([result["standard_error"] for result in results]) == pytest.approx(deviation, rel=0.3)


def test_a_ratio_costs_one_distance_more(monkeypatch):
    calls = []
    jackknife = frechet.jackknife
    monkeypatch.setattr(frechet, "jackknife", lambda *given: calls.append(1) or jackknife(*given))
    comparison = measured(normal(300, 4, 0), normal(400, 4, 1), normal(300, 4, 2))
    for metric in (FDR.distance, FDR):
        metric.compute(comparison, metric.prepare(comparison.reference))
    assert len(calls) == 2, "the samples' distance is the same for both"


# ---- copies


@pytest.mark.parametrize("block", [scores.BLOCK, 64])
def test_the_nearest_image_and_its_own_neighbour_are_found(block, monkeypatch):
    monkeypatch.setattr(scores, "BLOCK", block)
    rows, reference = normal(150, 6, 0), normal(170, 6, 1)
    found = copies.nearest(rows, reference, ALONE)
    between, among = (torch.cdist(part.double(), reference.double()) for part in (rows, reference))
    own = among.fill_diagonal_(float("inf")).min(1).values
    assert torch.equal(found.index, between.argmin(1))
    assert torch.allclose(found.distance, between.min(1).values, rtol=1e-6)
    assert torch.allclose(found.own, own[found.index], rtol=1e-6)


def copied(share: float, noise: float = 0.0):
    """300 samples of which a share are reference images with a little noise; reference, held-out images."""
    reference, samples, count = normal(400, 16, 1), normal(300, 16, 2), int(300 * share)
    samples[:count] = reference[7 : 7 + count] + noise * normal(count, 16, 4)
    return samples, reference, normal(300, 16, 3)


def test_copies_of_training_images_are_found_and_named():
    samples, reference, held_out = copied(0.3, noise=0.05)
    found = copies.Copies().compute(measured(samples, reference, held_out), None)
    result, section = found.results["copies"], found.sections["copies"]
    assert result["value"] > result["real"]["value"] + 0.2
    assert "near-copies" in [warning.mark for warning in found.warnings]
    assert len(section["closest"]) == 20 and section["equal_pixels"] == 0
    assert all(pair["reference"] == pair["sample"] + 7 for pair in section["closest"])
    distances = [pair["distance"] for pair in section["closest"]]
    assert distances == sorted(distances) and distances[-1] < 0.4
    lies = found.results["nearest_distance"]
    assert lies["value"] < lies["real"]["value"]


def test_new_images_are_no_copies():
    found = copies.Copies().compute(measured(*copied(0.0)), None)
    result = found.results["copies"]
    assert result["value"] == pytest.approx(result["real"]["value"], abs=4 * 2**0.5 * result["standard_error"])
    assert 0.05 < result["real"]["value"] < 0.6 and not found.warnings
    alone = copies.Copies().compute(measured(*copied(0.0)[:2]), None)
    assert [warning.mark for warning in alone.warnings] == ["copies-alone"]


def test_exact_copies_are_counted_where_the_reference_repeats_images_too():
    samples, reference, held_out = copied(0.1)
    found = copies.Copies().compute(measured(samples, torch.cat([reference, reference]), held_out), None)
    assert found.sections["copies"]["equal_pixels"] == 30
    assert [pair["distance"] for pair in found.sections["copies"]["closest"]] == [0.0] * 20
    assert found.results["copies"]["value"] == pytest.approx(0.1), (
        "each has a neighbour at distance 0, and so have they"
    )
    assert found.results["copies"]["real"]["value"] == 0.0


def test_a_small_distance_keeps_its_digits():
    reference = 1000 + normal(50, 8, 0)
    rows = reference[:5] + 2.0**-10
    found = copies.nearest(rows, reference, ALONE)
    assert found.index.tolist() == [0, 1, 2, 3, 4]
    expected = (rows.double() - reference[:5].double()).norm(dim=1)
    assert torch.allclose(found.distance, expected, rtol=0.05), "the product form is off by several times this"


# ---- all of them


def results_of_every_metric(runtime: Runtime) -> dict:
    comparison = measured(normal(150, 8, 0, shift=0.1), normal(170, 8, 1), normal(150, 8, 2), runtime, directions=300)
    found = {}
    for metric in (mind.Mind(), density.DensityCoverage(), FDR, copies.Copies()):
        found |= metric.compute(comparison, metric.prepare(comparison.reference)).results
    return found


def test_two_ranks_find_what_one_does(forked, monkeypatch, tmp_path):
    def work():
        runtime = start("float32", "cpu")
        found = results_of_every_metric(runtime)
        (tmp_path / f"{runtime.rank}.json").write_text(json.dumps(found))

    done = forked(work, ranks=2)
    assert done.code == 0, done.out
    one = json.loads(json.dumps(results_of_every_metric(ALONE)))
    for rank in range(2):
        two = json.loads((tmp_path / f"{rank}.json").read_text())
        assert two == one


class Largest(TorchDispatchMode):
    """The most numbers that one tensor had."""

    numbers = 0

    def __torch_dispatch__(self, function, types, given=(), named=None):
        result = function(*given, **(named or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


def test_memory_grows_with_the_images_and_not_with_their_pairs_or_the_directions(monkeypatch):
    monkeypatch.setattr(scores, "BLOCK", 64)
    monkeypatch.setattr(mind, "DIRECTIONS_AT_ONCE", 16)
    monkeypatch.setattr(mind, "ROWS_AT_ONCE", 64)
    samples, reference = normal(600, 32, 0), normal(600, 32, 1)
    for metric in (mind.Mind(), density.DensityCoverage(), copies.Copies()):
        with Largest() as largest:
            metric.compute(measured(samples, reference, directions=1000), None)
        assert largest.numbers <= 1000 * 32, f"{metric.name}: a tensor of {largest.numbers} numbers"


# ---- accuracy among classes


def classified(name: str, right: list[bool], labels: list[int], class_names=("b", "d", "e")) -> Side:
    """Images of three of the five classes a to e. Where `right`, the classifier's best guess among the three is the
    label, and otherwise the next one; it always believes in c, which is none of them, most of all."""
    outputs = torch.tensor([1, 3, 4])
    logits, labels = torch.zeros(len(right), 5), torch.tensor(labels)
    guesses = torch.where(torch.tensor(right), labels, (labels + 1) % 3)
    logits[torch.arange(len(right)), outputs[guesses]] = 1.0
    logits[:, 2] = 9.0
    images = SimpleNamespace(labels=labels, class_names=class_names)
    extracted = SimpleNamespace(rows={"logits": logits})
    return Side(ImageSet(images, None, {"path": name}), len(right), {}, extracted)


KNOWS = SimpleNamespace(identity={"name": "five"}, layers={"pool": 2, "logits": 5}, class_names=tuple("abcde"))


def accuracy(samples, reference, held_out=None, extractor=KNOWS):
    comparison = Measured(samples, reference, extractor, ALONE, MetricSettings(), held_out)
    return class_accuracy.ClassAccuracy().compute(comparison, None).results


def test_the_best_guess_is_taken_among_the_samples_classes():
    samples = classified("samples", [True, True, True, False, False, True], [0, 1, 2, 0, 1, 2])
    reference = classified("reference", [True, True, True, False], [0, 1, 2, 2])
    result = accuracy(samples, reference)["class_accuracy"]
    assert result["name"] == "Accuracy among 3 classes@6" and result["value"] == pytest.approx(4 / 6)
    assert result["real"] == {"value": 0.75, "standard_error": pytest.approx((0.75 * 0.25 / 4) ** 0.5),
                              "of": "reference", "n": 4}  # fmt: skip
    assert result["protocol"]["chance"] == pytest.approx(1 / 3) and result["protocol"]["classes"] == "name"
    beside = accuracy(samples, reference, classified("held-out", [True, True], [0, 1]))["class_accuracy"]
    assert beside["real"]["of"] == "held-out" and beside["real"]["value"] == 1.0


def test_real_images_of_other_classes_or_another_order_are_matched_by_name():
    samples = classified("samples", [True, False, True, True], [0, 0, 2, 2])  # b and e; d was not asked for
    reference = classified("reference", [True, True, False], [0, 1, 2], class_names=("d", "e", "b"))
    # Its logits were made for b, d, e in this order: what is right there is judged by the names that it has now.
    result = accuracy(samples, reference)["class_accuracy"]
    assert result["protocol"]["among"] == 2 and result["real"]["n"] == 2, "the image of d is left out"
    assert result["real"]["value"] == 0.5


def test_without_labels_or_classes_that_are_known_there_is_no_accuracy():
    samples = classified("samples", [True, True], [0, 1])
    assert not accuracy(classified("samples", [True, True], [0, 1], ("x", "y", "z")), samples)
    unlabelled = classified("samples", [True, True], [0, 1])
    unlabelled.given.images.labels = None
    assert not accuracy(unlabelled, samples)
    own = SimpleNamespace(identity={"name": "three"}, layers={"pool": 2, "logits": 3}, class_names=("b", "d", "e"))
    assert not accuracy(classified("samples", [True] * 3, [0, 1, 2]), samples, extractor=own), "that is plain accuracy"


# ---- with images


def write_images(path, count: int, seed: int):
    images = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    np.savez(path, images.repeat(4, 1).repeat(4, 2))
    return path


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """train.npz with 60 images, val.npz with 30, samples.npz with 30."""
    folder = tmp_path_factory.mktemp("sets")
    for seed, (name, count) in enumerate({"train": 60, "val": 30, "samples": 30}.items()):
        write_images(folder / f"{name}.npz", count, seed)
    return folder


TINY = ("--features", "timm:test_resnet@16", "--weights", "random", "--groups", 0)


def test_held_out_images_stand_beside_the_samples(sets, command, tmp_path):
    arguments = ("mutor", "fid", "--samples", sets / "samples.npz", "--reference", sets / "train.npz", *TINY)
    done = command(*arguments, "--held-out", sets / "val.npz", "--json", tmp_path / "m.json")
    assert done.code == 0, done.err
    assert "real images" in done.out.splitlines()[0]
    assert "real images: what held-out images measure in the samples' place" in done.out
    result = json.loads((tmp_path / "m.json").read_text())
    assert result["protocol"]["held_out"]["path"] == "val.npz" and result["protocol"]["n_held_out"] == 30
    assert len(result["protocol"]["held_out"]["images_sha256"]) == 64
    value, real = result["metrics"]["mind"]["value"], result["metrics"]["mind"]["real"]["value"]
    assert real / 4 < value < 4 * real, "all three are draws of one distribution"
    protocol = result["metrics"]["fdr"]["protocol"]
    assert protocol["distance_of_samples"] == result["metrics"]["fd"]["value"] and protocol["n_held_out"] == 30
    without = command(*arguments, "--json", tmp_path / "w.json")
    assert without.code == 0, without.err
    assert json.loads((tmp_path / "w.json").read_text())["metrics"]["fd"] == result["metrics"]["fd"]


def test_the_picture_shows_samples_beside_their_nearest_images(sets, command, tmp_path):
    arguments = ("mutor", "fid", "--samples", sets / "samples.npz", "--reference", sets / "train.npz", *TINY)
    done = command(*arguments, "--json", tmp_path / "m.json", "--copies-grid", tmp_path / "pairs.png")
    assert done.code == 0, done.err
    closest = json.loads((tmp_path / "m.json").read_text())["copies"]["closest"]
    assert f"by index from 0 (distance): {closest[0]['sample']} and {closest[0]['reference']} (" in done.out
    picture = np.array(Image.open(tmp_path / "pairs.png"))
    cell = 4 + 128  # a border of 4 pixels, and images of 16 pixels eight times as large
    for number, pair in enumerate(closest):
        row, column = divmod(2 * number, 8)
        for right, name, index in ((0, "samples", pair["sample"]), (1, "train", pair["reference"])):
            y, x = 4 + row * cell, 4 + (column + right) * cell
            with np.load(sets / f"{name}.npz") as file:
                assert (picture[y : y + 128 : 8, x : x + 128 : 8] == file["arr_0"][index]).all()


def test_a_picture_without_the_copy_check_is_refused(sets, command, tmp_path):
    arguments = ("mutor", "fid", "--samples", sets / "samples.npz", "--reference", sets / "train.npz", *TINY)
    done = command(*arguments, "--metrics", "fid", "--copies-grid", tmp_path / "pairs.png")
    assert done.code == 2 and "--copies-grid needs the metric 'copies'" in done.err


def test_the_ratio_needs_held_out_images(sets, command, tmp_path):
    arguments = ("mutor", "fid", "--samples", sets / "samples.npz", "--reference", sets / "train.npz", *TINY)
    done = command(*arguments, "--metrics", "fdr")
    assert done.code == 2 and "metric 'fdr' needs --held-out" in done.err
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(3))
    done = command(*arguments, "--held-out", tmp_path / "statistics.npz")
    assert done.code == 4, done.out


def test_a_second_network_has_distances_of_its_own(sets, command, tmp_path):
    arguments = ("mutor", "fid", "--samples", sets / "samples.npz", "--reference", sets / "train.npz", *TINY)
    arguments += ("--held-out", sets / "val.npz", "--json", tmp_path / "m.json")
    done = command(*arguments, "--also", "timm:test_vit@16=random", "--also", "timm:test_efficientnet@16=random")
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "m.json").read_text())
    metrics = result["metrics"]
    ratios = [metrics[key]["value"] for key in ("fdr", "fdr timm:test_vit", "fdr timm:test_efficientnet")]
    assert metrics["fdr_mean"]["value"] == pytest.approx(np.prod(ratios) ** (1 / 3))
    assert (
        metrics["fd timm:test_vit"]["protocol"]["extractor"] == "timm:test_vit" and "mind timm:test_vit" not in metrics
    )
    assert [one["name"] for one in result["protocol"]["more_extractors"]] == ["timm:test_vit", "timm:test_efficientnet"]
    assert len(result["marks"]) == len(result["warnings"]) == len(set(result["warnings"]))
    alone = command("mutor", "fid", "--samples", sets / "samples.npz", "--reference", sets / "train.npz",
                    "--held-out", sets / "val.npz", "--features", "timm:test_vit@16", "--weights", "random",
                    "--groups", 0, "--json", tmp_path / "alone.json")  # fmt: skip
    assert alone.code == 0, alone.err
    assert json.loads((tmp_path / "alone.json").read_text())["metrics"]["fdr"] == metrics["fdr timm:test_vit"]


def test_a_second_network_needs_a_distance_to_measure(sets, command):
    arguments = ("mutor", "fid", "--samples", sets / "samples.npz", "--reference", sets / "train.npz", *TINY)
    done = command(*arguments, "--metrics", "kid", "--also", "timm:test_vit@16=random")
    assert done.code == 2 and "--also measures fid and fdr" in done.err
    done = command(*arguments, "--also", "timm:test_resnet@32=random")
    assert done.code == 2 and "timm:test_resnet is given twice" in done.err


def test_the_batch_size_changes_no_number(sets, command, tmp_path):
    arguments = ("mutor", "fid", "--samples", sets / "samples.npz", "--reference", sets / "train.npz", *TINY)
    found = []
    for batch in (4, 50):
        done = command(*arguments, "--held-out", sets / "val.npz", "--batch-size", batch, "--json", tmp_path / "m.json")
        assert done.code == 0, done.err
        found.append(json.loads((tmp_path / "m.json").read_text()))
    for key, entry in found[0]["metrics"].items():
        assert entry["value"] == pytest.approx(found[1]["metrics"][key]["value"], rel=1e-4, abs=1e-6), key
    assert {"mind", "density", "coverage", "fdr", "copies", "nearest_distance"} < found[0]["metrics"].keys()


def test_images_of_the_reference_are_not_held_out(sets, command):
    arguments = ("mutor", "fid", "--samples", sets / "samples.npz", "--reference", sets / "train.npz", *TINY)
    done = command(*arguments, "--held-out", sets / "train.npz")
    assert done.code == 5 and "100% of the held-out images are images of the reference" in done.err

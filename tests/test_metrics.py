"""Numbers: against golden values, torch-fidelity, closed forms, and each other."""

import importlib.util

import numpy as np
import pytest
import torch

from mutor_vision.errors import UserError
from mutor_vision.features.moments import Moments, Statistics
from mutor_vision.metrics import frechet, scores
from mutor_vision.runtime import Runtime

ALONE = Runtime(0, 1, torch.device("cpu"), None)


def moments_of(features: torch.Tensor, groups: int = 1, step: int = 250) -> Moments:
    moments = Moments(features.shape[1], groups)
    for first in range(0, len(features), step):
        moments.update(features[first : first + step], first)
    moments.flush()
    return moments


def normal(count: int, dim: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator) / (1 + torch.arange(dim) / 4) + shift


@pytest.fixture(scope="module")
def golden(shared):
    with np.load(shared / "golden" / "adm_metrics.npz", allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) if file[name].ndim else file[name].item() for name in file}


@pytest.mark.parametrize("layer, name", [("pool", "fid"), ("spatial", "sfid")])
def test_frechet_distance_is_adms(golden, layer, name):
    reference = frechet.root(moments_of(golden[f"{layer}_ref"]).total())
    for groups in (1, 20):
        found = frechet.distance(moments_of(golden[f"{layer}_gen"], groups).total(), reference)
        assert found == pytest.approx(golden[name], rel=1e-6)


def test_inception_score_is_adms(golden):
    logits = golden["probs_gen"].log()  # the softmax of log p is p
    one = scores.inception_score(logits, splits=1, shuffle_seed=None)
    four = scores.inception_score(logits, splits=4, shuffle_seed=None)
    assert one.mean == pytest.approx(golden["is_one_split"], rel=1e-5)
    assert four.mean == pytest.approx(golden["is_splits_of_250"], rel=1e-5)


@pytest.mark.parametrize("block", [scores.BLOCK, 300])
def test_precision_and_recall_are_adms(golden, block, monkeypatch):
    monkeypatch.setattr(scores, "BLOCK", block)  # several blocks must give what one does
    found = scores.precision_recall(golden["pool_gen"], golden["pool_ref"], ALONE)
    assert found == (golden["precision_k3"], golden["recall_k3"])


def test_metrics_equal_torch_fidelity_on_the_same_features():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    ours, theirs = normal(700, 48, 1, shift=0.1), normal(600, 48, 2)
    statistics = [fid_features_to_statistics(x.double()) for x in (ours, theirs)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    found = frechet.distance(moments_of(ours, 20).total(), frechet.root(moments_of(theirs).total()))
    assert found == pytest.approx(expected, rel=1e-6)

    expected = isc_features_to_metric(5 * ours)
    found = scores.inception_score(5 * ours)
    assert found.mean == pytest.approx(expected["inception_score_mean"], rel=1e-6)
    assert found.std == pytest.approx(expected["inception_score_std"], rel=1e-6)

    assert scores.precision_recall(ours, theirs, ALONE) == pytest.approx(
        calculate_precision_recall_full(ours, theirs), abs=1e-6
    )
    kid = kid_features_to_metric(
        ours.double(), theirs.double(), kid_subsets=5, kid_subset_size=200, rng_seed=2020, verbose=False
    )
    found = scores.kernel_distance(ours, theirs, subsets=5, subset_size=200)
    assert found.mean == pytest.approx(kid["kernel_inception_distance_mean"], rel=1e-6)


def test_kid_is_its_definition_where_float32_is_not(monkeypatch):
    """Large features: in float32 the difference of the sums loses digits (7e-4 here). Memory: no matrix
    of the size of a subset is made."""
    from torch_fidelity.metric_kid import kid_features_to_metric

    ours, theirs = (30 * normal(900, 64, seed, shift=1.0) for seed in (1, 2))
    draws, values = np.random.RandomState(scores.SHUFFLE_SEED), []
    for _ in range(3):
        x, y = (rows[draws.choice(900, 700, replace=False)].double() for rows in (ours, theirs))
        xx, yy, xy = (((a @ b.T) / 64 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        own = sum(kernel.sum() - kernel.diagonal().sum() for kernel in (xx, yy)) / (700 * 699)
        values.append((own - 2 * xy.mean()).item())
    for block in (scores.KERNEL_BLOCK, 128):
        monkeypatch.setattr(scores, "KERNEL_BLOCK", block)
        found = scores.kernel_distance(ours, theirs, subsets=3, subset_size=700)
        assert found.mean == pytest.approx(np.mean(values), rel=1e-9)
        assert found.std == pytest.approx(np.std(values), rel=1e-9)
    rounded = kid_features_to_metric(ours, theirs, kid_subsets=3, kid_subset_size=700, rng_seed=2020, verbose=False)
    assert rounded["kernel_inception_distance_mean"] != pytest.approx(np.mean(values), rel=1e-5)


def test_the_distance_is_exact_at_any_rank_and_torch_fidelitys_at_full_rank_only(root):
    specification = importlib.util.spec_from_file_location("frechet_rank", root / "benchmarks/frechet_rank.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    few, many = module.rounding(60, 512), module.rounding(600, 128)
    assert few["ours"] < 1e-9 and many["ours"] < 1e-9
    assert many["torch-fidelity"] < 1e-6 < few["torch-fidelity"], "what docs/evaluation.md says of it"


def test_moments_are_numpys_and_parts_and_order_do_not_matter():
    features = normal(1003, 20, 3, shift=100.0)  # a mean far above the deviation, where sums of squares lose digits
    expected = np.cov(features.double().numpy(), rowvar=False)
    shuffled = features[torch.randperm(1003, generator=torch.Generator().manual_seed(0))]
    for arranged in (moments_of(features, 1, 1), moments_of(features, 20, 250), moments_of(shuffled, 7, 33)):
        total = arranged.total()
        assert total.n == 1003
        assert np.abs(total.sigma.numpy() - expected).max() < 1e-12
        assert np.abs(total.mu.numpy() - features.double().mean(0).numpy()).max() < 1e-11


def test_leaving_a_group_out_is_never_having_seen_it():
    features = normal(503, 12, 4)
    moments = moments_of(features, groups=5)
    for group in range(5):
        rest = features[torch.arange(503) % 5 != group]
        expected, found = moments_of(rest).total(), moments.without(group)
        assert found.n == expected.n
        assert torch.allclose(found.mu, expected.mu, atol=1e-14)
        assert torch.allclose(found.sigma, expected.sigma, atol=1e-14)


def test_distance_of_known_gaussians_is_the_closed_form():
    mu, spread = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([1.0, 2.0, 3.0]).double()
    other = torch.tensor([2.0, 0.5, 3.0]).double()
    first, second = Statistics(mu, spread.square().diag(), None), Statistics(mu * 0, other.square().diag(), None)
    expected = mu.square().sum() + (spread - other).square().sum()
    assert frechet.distance(first, frechet.root(second)) == pytest.approx(expected.item(), rel=1e-12)
    assert frechet.distance(first, frechet.root(first)) == pytest.approx(0.0, abs=1e-9)


def test_distance_with_fewer_images_than_features_is_symmetric_and_zero_to_itself():
    first, second = (moments_of(normal(30, 100, seed)).total() for seed in (5, 6))
    there, back = frechet.distance(first, frechet.root(second)), frechet.distance(second, frechet.root(first))
    assert there == pytest.approx(back, rel=1e-9)
    assert frechet.distance(first, frechet.root(first)) < 1e-6


def test_jackknife_interval_covers_the_true_distance():
    """10,000 samples of a known Gaussian in 32 dimensions, 100 draws: at least 90 intervals hold the true value."""
    dim, covered, plain_covered = 32, 0, 0
    spread = 1 / (1 + torch.arange(dim).double() / 4)
    reference = frechet.root(Statistics(torch.zeros(dim).double(), spread.square().diag(), None))
    wider, shift = 1.02 * spread, 0.01
    true = dim * shift**2 + (wider - spread).square().sum().item()
    for draw in range(100):
        generator = torch.Generator().manual_seed(draw)
        features = torch.randn(10_000, dim, generator=generator) * wider.float() + shift
        estimate = frechet.jackknife(moments_of(features, groups=20, step=10_000), reference, ALONE)
        low, high = estimate.interval_95
        covered += low <= true <= high
        plain_covered += abs(estimate.value - true) <= high - estimate.bias_corrected
    assert covered >= 90, f"{covered} of 100"
    assert plain_covered < covered, "without the correction of its bias, the distance lies outside more often"


@pytest.mark.parametrize("groups, quantile", [(2, 12.706), (3, 4.303), (11, 2.228), (20, 2.093)])
def test_the_interval_is_as_wide_as_students_t_of_the_tables_says(groups, quantile):
    features = torch.randn(40 * groups, 8, generator=torch.Generator().manual_seed(0))
    reference = frechet.root(Statistics(torch.zeros(8).double(), torch.eye(8).double(), None))
    estimate = frechet.jackknife(moments_of(features, groups=groups, step=1000), reference, ALONE)
    low, high = estimate.interval_95
    assert (high - low) / 2 / estimate.standard_error == pytest.approx(quantile, abs=6e-4)


def test_inception_score_does_not_depend_on_the_order_of_samples():
    """Class-sorted samples used to score 41 instead of 157 in evaluators that cut them as they come."""
    classes, count = 20, 10_000
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(count, classes, generator=generator)
    logits[torch.arange(count), torch.arange(count) * classes // count] += 6.0  # sorted by class
    shuffled = logits[torch.randperm(count, generator=generator)]
    found, sorted_score = scores.inception_score(shuffled), scores.inception_score(logits)
    assert found.mean == pytest.approx(sorted_score.mean, rel=1e-3)
    assert scores.inception_score(logits, shuffle_seed=None).mean < 0.3 * found.mean


@pytest.mark.parametrize("call, message", [
    (lambda x: scores.inception_score(x, splits=21), "use 1 to 20 splits"),
    (lambda x: scores.precision_recall(x, x, ALONE, k=20), "k must be 1 to 19"),
    (lambda x: scores.kernel_distance(x, x, subset_size=21), "2 to the smaller"),
])  # fmt: skip
@pytest.mark.bad_input("evaluation")
def test_scores_refuse_what_they_cannot_measure(call, message):
    with pytest.raises(UserError, match=message):
        call(torch.rand(20, 4))

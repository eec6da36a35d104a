import numpy as np

from mutor_vision.keyed_random import choose, derived_seed, permutation, uniforms


def test_a_row_depends_on_its_index_alone():
    together = uniforms(7, "p", np.arange(20), 5)
    for i in range(20):
        assert (uniforms(7, "p", np.array([i]), 5) == together[i]).all()
    assert (uniforms(7, "p", np.arange(20), 3) == together[:, :3]).all()


def test_seed_and_purpose_change_everything():
    base = uniforms(0, "p", np.arange(50), 4)
    for other in (uniforms(1, "p", np.arange(50), 4), uniforms(0, "q", np.arange(50), 4)):
        assert (base != other).all()


def test_the_numbers_are_uniform_and_uncorrelated():
    draws = uniforms(0, "p", np.arange(20_000), 4)
    assert 0 <= draws.min() and draws.max() < 1
    histogram = np.histogram(draws, bins=20, range=(0, 1))[0]
    assert abs(histogram - 4000).max() < 6 * 4000**0.5
    assert abs(np.corrcoef(draws.T) - np.eye(4)).max() < 0.03
    neighbours = np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]
    assert abs(neighbours) < 0.03


def test_the_numbers_never_change():
    """They are part of the format: a run continued with a later version must draw the same."""
    assert uniforms(0, "p", np.array([0, 1]), 2).tolist() == [
        [0.014443504188155654, 0.6392728666158748],
        [0.21486101905964528, 0.7224812317873325],
    ]
    assert derived_seed(0, "p", 1) == 4015759483737894647
    assert permutation(3, "order", 1, 8).tolist() == [1, 5, 6, 7, 0, 4, 3, 2]


def test_a_permutation_holds_every_number_once_and_differs_by_epoch():
    orders = [permutation(0, "order", epoch, 1000) for epoch in range(3)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(1000))
    assert (orders[0] != orders[1]).any() and (orders[1] != orders[2]).any()


def test_a_choice_of_a_sorted_list_is_of_all_its_classes():
    labels = np.repeat(np.arange(100), 50)  # 5,000 images listed class by class
    chosen = choose(0, "p", len(labels), 1000)
    assert len(np.unique(chosen)) == 1000 and (np.diff(chosen) > 0).all()
    assert 1 <= np.bincount(labels[chosen], minlength=100).min() and np.bincount(labels[chosen]).max() < 30
    assert np.array_equal(chosen, choose(0, "p", len(labels), 1000))
    assert not np.array_equal(chosen, choose(0, "q", len(labels), 1000))
    assert len(choose(0, "p", 7, 10)) == 7 and len(choose(0, "p", 7, 0)) == 0

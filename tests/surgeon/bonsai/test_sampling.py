"""Complementary sub-models: what they drop, how likely, and what they are drawn from."""

import numpy as np
import pytest

from surgeon.bonsai.sampling import candidates_of, design_matrix, draw_keeps


def parts_of(sizes=(40, 7, 3, 1), fraction=0.2):
    draw = np.random.default_rng(5)
    return [candidates_of(draw.random(n), fraction) for n in sizes]


def test_the_most_important_units_are_frozen():
    scores = np.array([0.3, 9.0, 0.1, 5.0, 0.2, 7.0, 8.0, 6.0, 4.0, 3.0])
    part = candidates_of(scores, 0.2)
    assert part.units.tolist() == [0, 2, 4, 9] and part.n_frozen == 6
    assert part.weights == pytest.approx((9.0 - scores[[0, 2, 4, 9]]) / (4 * 9.0 - 3.6))


@pytest.mark.parametrize(
    ("n", "fraction", "n_candidates"), [(11008, 0.05, 1101), (32, 0.05, 4), (10, 0.5, 10), (3, 0.9, 3)]
)
def test_the_number_of_candidates_is_that_of_the_published_code(n, fraction, n_candidates):
    assert candidates_of(np.arange(float(n)), fraction).units.size == n_candidates


def test_there_are_as_many_candidates_as_permitted_widths_need():
    assert candidates_of(np.arange(64.0), 0.05, at_least=16).units.size == 16
    assert candidates_of(np.arange(8.0), 0.05, at_least=16).units.size == 8


@pytest.mark.parametrize("pair", range(20))
def test_the_two_of_a_pair_partition_the_candidates(pair):
    parts = parts_of()
    first, second = (draw_keeps(parts, 3, 1, 2 * pair + half) for half in (0, 1))
    for part, one, other in zip(parts, first, second, strict=True):
        frozen = np.setdiff1d(np.arange(part.n_live), part.units)
        assert one[frozen].all() and other[frozen].all()
        assert np.array_equal(one[part.units], ~other[part.units])
        assert abs(int(one[part.units].sum()) - int(other[part.units].sum())) <= 1


def test_the_odd_candidate_goes_with_either_of_a_pair():
    """With one candidate each, sub-layers would all lose it in the same sub-models if the first always dropped more."""
    parts = parts_of(sizes=(1,) * 6, fraction=0.5)
    design = design_matrix(parts, 0, 1, 200)
    agreement = np.corrcoef(design[0::2].T)[np.triu_indices(6, 1)]
    assert np.abs(agreement).max() < 0.35
    assert np.abs(design[0::2].mean(axis=0) - 0.5).max() < 0.15


def test_draws_follow_the_weights():
    """One of two: with weights 3 to 1 it goes first three times in four; exact for draws without replacement."""
    part = candidates_of(np.array([1.0, 3.0, 4.0, 4.0]), 0.25)
    assert part.weights == pytest.approx([0.75, 0.25])
    n = 4000
    dropped = [not draw_keeps([part], 1, 1, 2 * k)[0][0] for k in range(n)]
    assert np.mean(dropped) == pytest.approx(0.75, abs=4 * np.sqrt(0.75 * 0.25 / n))


@pytest.mark.parametrize("scores", [np.ones(8), np.array([0.0] + [1.0] * 7)])
def test_without_weights_the_draw_is_uniform(scores):
    part = candidates_of(scores, 0.5)
    assert part.weights == pytest.approx(np.full(8, 1 / 8))
    dropped = np.mean([~draw_keeps([part], 2, 1, 2 * k)[0] for k in range(2000)], axis=0)
    assert dropped == pytest.approx(0.5, abs=0.06)


def test_draws_are_keyed_by_seed_round_and_pair():
    parts = parts_of()
    one = np.concatenate(draw_keeps(parts, 3, 1, 4))
    assert np.array_equal(one, np.concatenate(draw_keeps(parts, 3, 1, 4)))
    for other in ((4, 1, 4), (3, 2, 4), (3, 1, 6)):
        assert not np.array_equal(one, np.concatenate(draw_keeps(parts, *other)))


def test_a_sub_layer_without_units_or_candidates_has_no_part_in_it():
    parts = [candidates_of(np.zeros(0), 0.1), candidates_of(np.arange(4.0), 0.0)]
    assert [part.units.size for part in parts] == [0, 0]
    assert design_matrix(parts, 0, 1, 10).shape == (10, 0)

"""From scores to blocks, against trying all."""

import itertools

import numpy as np
import pytest

from surgeon.choices import Selector
from surgeon.errors import NonFiniteError, ParameterError
from surgeon.layers.choosing import Choice, blocks_for_fraction, closest_span, lowest_blocks
from surgeon.layers.dropping import SubLayerScore, drop_count, drop_weights
from surgeon.layers.spec import SPECS, LayerGranularity
from surgeon.pruning.units import SubLayerKind

ATTENTION, MLP = SubLayerKind.ATTENTION, SubLayerKind.MLP


def test_every_selector_is_described():
    assert set(SPECS) == set(Selector)
    spec = SPECS
    assert [s.value for s in spec if not spec[s].needs_data] == [
        *("input", "output", "middle", "both", "max-gap", "deepest", "magnitude")
    ]
    assert [s.value for s in spec if spec[s].needs_grad] == ["taylor", "curvature"]
    assert [s.value for s in spec if spec[s].iterative] == ["sleb"]
    assert [s.value for s in spec if spec[s].contiguous] == ["input", "output", "middle", "deepest", "angular"]
    assert [s.value for s in spec if spec[s].granularity is LayerGranularity.SUB_LAYER] == ["llm-drop"]


def test_lowest_is_the_cheapest_of_all_sets():
    scores = np.random.default_rng(0).normal(size=9)
    choice = Choice(9, 3, 1, 2)
    found = lowest_blocks(list(scores), choice)
    best = min(itertools.combinations(choice.allowed, 3), key=lambda blocks: sum(scores[list(blocks)]))
    assert sorted(found) == list(best)
    assert list(found) == sorted(found, key=lambda index: scores[index])
    assert lowest_blocks([1.0, 1.0, 1.0, 1.0], Choice(4, 2, 1, 0)) == (1, 2)


def test_a_score_that_is_not_finite_is_named_unless_its_block_is_protected():
    scores = [float("nan"), 1.0, 2.0, float("inf")]
    assert lowest_blocks(scores, Choice(4, 1, 1, 1)) == (1,)
    with pytest.raises(NonFiniteError, match=r"the score of block 3 is inf"):
        lowest_blocks(scores, Choice(4, 1, 1, 0))


def test_closest_span_is_the_best_of_all_spans():
    distances = np.random.default_rng(1).uniform(size=(8, 8))
    for n, first, last in itertools.product(range(1, 5), (0, 1), (0, 2)):
        found = closest_span(distances, Choice(7, n, first, last))
        starts = range(first, 7 - last - n + 1)
        best = min(starts, key=lambda start: distances[start, start + n])
        assert found == tuple(range(best, best + n))


def test_closest_span_names_a_distance_that_is_not_finite():
    distances = np.zeros((4, 4))
    distances[2, 3] = np.nan
    with pytest.raises(NonFiniteError, match=r"the score of block 2 is nan"):
        closest_span(distances, Choice(3, 1))


def test_blocks_for_a_fraction():
    assert [blocks_for_fraction(f, [5] * 10) for f in (0.01, 0.1, 0.11, 0.5, 0.91)] == [1, 1, 2, 5, 10]
    assert blocks_for_fraction(3 / 30, [7] * 30) == 3
    assert blocks_for_fraction(0.5, [9, 1, 1, 1]) == 4, "the three smallest have a quarter"
    for fraction in np.linspace(0.05, 0.95, 19):
        weights = [int(w) for w in np.random.default_rng(2).integers(1, 9, 6)]
        n = blocks_for_fraction(float(fraction), weights)
        assert all(sum(c) >= fraction * sum(weights) - 1e-6 for c in itertools.combinations(weights, n))


def sub_layers():
    scores = {ATTENTION: [0.3, 0.1, 0.2], MLP: [0.05, 0.9, 0.01]}
    weights = {ATTENTION: 10, MLP: 30}
    return [SubLayerScore(b, kind, scores[kind][b], weights[kind]) for b in range(3) for kind in (ATTENTION, MLP)]


def test_attention_goes_first_then_mlps():
    order = [(s.block, s.kind) for s in drop_count(sub_layers(), 6)]
    assert order == [(1, ATTENTION), (2, ATTENTION), (0, ATTENTION), (2, MLP), (0, MLP), (1, MLP)]
    for n_weights, n in ((1, 1), (10, 1), (11, 2), (30, 3), (31, 4), (60, 4), (61, 5), (120, 6)):
        assert [(s.block, s.kind) for s in drop_weights(sub_layers(), n_weights)] == order[:n]


def test_too_many_sub_layers_are_refused():
    with pytest.raises(ParameterError, match=r"got 7 sub-layers, allowed: 1 to 6"):
        drop_count(sub_layers(), 7)
    with pytest.raises(ParameterError, match=r"121 weights shall go, but the sub-layers that may go have 120"):
        drop_weights(sub_layers(), 121)


def test_a_sub_layer_without_a_score_is_named():
    scores = [*sub_layers(), SubLayerScore(3, MLP, float("nan"), 30)]
    with pytest.raises(NonFiniteError, match=r"the score of the mlp of block 3 is nan"):
        drop_count(scores, 1)

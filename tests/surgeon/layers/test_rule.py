"""One function for all selectors: what each makes of its scores, and rules that cannot be."""

import math

import numpy as np
import pytest

from surgeon.choices import Selector
from surgeon.errors import NonFiniteError, ParameterError
from surgeon.layers.choosing import Choice, greedy_blocks
from surgeon.layers.rule import LayerRule, select
from surgeon.pruning.units import SubLayerKind

NAN = math.nan
ATTENTION, MLP = SubLayerKind.ATTENTION, SubLayerKind.MLP


def rule(selector: str, n_remove: int, n_blocks: int = 5, first: int = 0, last: int = 0, **more):
    return LayerRule(Selector(selector), n_blocks, first, last, n_remove, **more)


def test_patterns_need_no_scores():
    found = select(rule("both", 3, 8, 1, 1), None)
    assert found.removed == found.order == (1, 2, 6)
    assert (found.dropped, found.scores) == ((), {})


@pytest.mark.parametrize("selector", ["block-influence", "perplexity", "taylor", "magnitude", "curvature"])
def test_lowest_scores_go_in_that_order(selector):
    found = select(rule(selector, 2), np.array([0.5, 0.1, 0.9, -0.2, 0.3]))
    assert found.order == (3, 1)
    assert found.removed == (1, 3)
    assert found.scores == {"block": [0.5, 0.1, 0.9, -0.2, 0.3]}
    assert select(rule(selector, 2, first=2, last=1), np.array([0.5, 0.1, 0.9, -0.2, NAN])).order == (3, 2)


def test_the_closest_span_goes():
    distances = np.full((6, 6), 0.9)
    distances[2, 4] = 0.1
    distances[0, 2] = 0.05
    found = select(rule("angular", 2), distances)
    assert found.removed == (0, 1)
    assert found.scores == {"block": [0.05, 0.9, 0.1, 0.9, None]}
    assert select(rule("angular", 2, first=1), distances).removed == (2, 3)


def test_greedy_removal_follows_its_losses():
    losses = np.array([[1.0, 3.0, 2.0, 4.0, 5.0], [NAN, 7.0, 8.0, 6.0, 9.0], [NAN, 5.0, 4.0, NAN, 3.0]])
    found = select(rule("sleb", 3), losses)
    assert found.order == (0, 3, 4)
    assert found.removed == (0, 3, 4)
    assert found.scores == {"block": [1.0, None, None, 6.0, 3.0]}
    assert greedy_blocks(losses[:2], Choice(5, 3, 1, 1)) == (2, 3)


def test_greedy_removal_names_a_loss_that_is_not_finite():
    with pytest.raises(NonFiniteError, match=r"the score of block 1 is nan"):
        greedy_blocks(np.array([[1.0, NAN, 2.0]]), Choice(3, 1))


def test_sub_layers_go_by_weights_or_by_number():
    scores = np.array([[0.3, 0.1, 0.2], [0.05, 0.9, 0.01]])
    weights = ((10, 30),) * 3
    by_number = select(rule("llm-drop", 4, 3, weights=weights), scores)
    assert (by_number.removed, by_number.order) == ((2,), (2,))
    assert by_number.dropped == ((0, ATTENTION), (1, ATTENTION))
    assert by_number.scores == {"attention": [0.3, 0.1, 0.2], "mlp": [0.05, 0.9, 0.01]}
    for n_weights, expected in ((5, ((1, ATTENTION),)), (20, ((1, ATTENTION), (2, ATTENTION)))):
        by_weights = LayerRule(Selector.LLM_DROP, 3, 0, 0, None, n_weights, weights)
        assert select(by_weights, scores).dropped == expected
    protected = select(rule("llm-drop", 3, 3, 1, 0, weights=weights), scores)
    assert (protected.removed, protected.dropped) == ((2,), ((1, ATTENTION),))


def test_a_rule_that_cannot_be_is_refused_at_once():
    with pytest.raises(ParameterError, match=r"5 of 5 blocks would go"):
        rule("sleb", 5)
    with pytest.raises(ParameterError, match=r"attention and MLP of all 3 blocks would go"):
        rule("llm-drop", 6, 3, weights=((10, 30),) * 3)
    with pytest.raises(ParameterError, match=r"got 5 sub-layers, allowed: 1 to 4"):
        rule("llm-drop", 5, 3, 1, 0, weights=((10, 30),) * 3)
    with pytest.raises(ValueError, match=r"needs the weights of attention and MLP of each of 3 blocks"):
        rule("llm-drop", 2, 3)
    with pytest.raises(ValueError, match=r"either a number of sub-layers or a number of weights"):
        LayerRule(Selector.LLM_DROP, 3, 0, 0, 2, 10.0, ((10, 30),) * 3)
    with pytest.raises(ValueError, match=r"sleb needs a number of blocks"):
        LayerRule(Selector.SLEB, 3, 0, 0)

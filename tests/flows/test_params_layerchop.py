"""The section of LayerChop: its own protection, and options without effect."""

import pytest
from pydantic import ValidationError

from flows.params_layerchop import LayerChopParams
from surgeon.choices import Selector
from surgeon.layers.spec import SPECS


def test_defaults() -> None:
    given = LayerChopParams()
    assert (given.selector, given.blocks, given.protected) == (Selector.BLOCK_INFLUENCE, None, (0, 0))
    assert LayerChopParams(selector=Selector.TAYLOR).protected == (4, 2)
    assert LayerChopParams(selector=Selector.SLEB, protect_first=0).protected == (0, 1)
    assert LayerChopParams(selector=Selector.ANGULAR, protect_last=3).protected == (0, 3)
    assert all(
        LayerChopParams(selector=s).protected == (spec.protect_first, spec.protect_last) for s, spec in SPECS.items()
    )


def test_the_gradient_counts_where_it_can() -> None:
    assert LayerChopParams(selector=Selector.CURVATURE).counts_gradient
    assert not LayerChopParams(selector=Selector.CURVATURE, gradient=False).counts_gradient
    assert LayerChopParams(selector=Selector.TAYLOR).counts_gradient
    assert not LayerChopParams(selector=Selector.MAGNITUDE).counts_gradient


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"selector": "sleb", "gradient": True}, "layerchop.gradient has no effect with selector: sleb"),
        ({"selector": "output", "protect_first": 0}, "protect_first has no effect with selector: output"),
        ({"selector": "deepest", "protect_first": 2}, "protect_first has no effect with selector: deepest"),
        ({"selector": "input", "protect_last": 2}, "protect_last has no effect with selector: input"),
        ({"blocks": 0}, "greater than or equal to 1"),
        ({"protect_first": -1}, "greater than or equal to 0"),
        ({"selector": "max_gap"}, "Input should be"),
        ({"block": 3}, "Extra inputs are not permitted"),
        ({"blocks": True}, "must be a number"),
    ],
)
def test_what_has_no_effect_or_is_out_of_range_is_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LayerChopParams.model_validate(given)

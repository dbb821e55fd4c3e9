"""Scores of units against sums over explicit activations."""

import numpy as np
import pytest
import torch

from surgeon.bonsai.priors import random_scores, unit_scores
from surgeon.choices import Prior
from surgeon.errors import NonFiniteError


def inputs_of(whole, part):
    """All inputs of the output linear of a part, `[tokens, columns]` float64."""
    seen = []
    handle = part.linear.register_forward_pre_hook(lambda _module, args: seen.append(args[0].double()))
    with torch.no_grad():
        whole.model(input_ids=torch.from_numpy(whole.tokens), use_cache=False)
    handle.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen]).numpy()


def expected(prior, x, W):
    if prior is Prior.WANDA:
        return np.abs(W).mean(axis=0) * np.sqrt((x**2).mean(axis=0))
    if prior is Prior.FLUCTUATION:
        return x.var(axis=0) * (W**2).sum(axis=0)
    return np.abs(x).mean(axis=0)


@pytest.mark.parametrize("prior", [Prior.WANDA, Prior.MAGNITUDE, Prior.FLUCTUATION])
@pytest.mark.parametrize("family", ["llama-gqa-tied", "opt"])
def test_scores_are_those_of_the_formula(whole_of, family, prior):
    whole = whole_of(family)
    found = unit_scores(whole.model, whole.parts, whole.tokens, 6, prior)
    for part, scores in zip(whole.parts, found, strict=True):
        x, W = inputs_of(whole, part), part.linear.weight.double().numpy()
        by_column = expected(prior, x, W)
        assert scores == pytest.approx(by_column.reshape(part.n_live, part.width).mean(axis=1), rel=1e-9)


def test_batches_do_not_matter(whole_of):
    whole = whole_of("opt")
    one, other = (unit_scores(whole.model, whole.parts, whole.tokens, b, Prior.FLUCTUATION) for b in (6, 4))
    for a, b in zip(one, other, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_random_scores_are_keyed(whole_of):
    sizes = [part.n_live for part in whole_of("opt").parts]
    one = np.concatenate(random_scores(sizes, 3, 1))
    assert np.array_equal(one, np.concatenate(random_scores(sizes, 3, 1)))
    assert not np.array_equal(one, np.concatenate(random_scores(sizes, 3, 2)))
    assert one.size == sum(sizes) and 0 <= one.min() < one.max() <= 1


def test_what_is_not_finite_has_an_address(whole_of):
    whole = whole_of("opt")
    whole.blockwise.linears(1)["fc1"].weight.data[3, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"block 1, mlp: .* calibration sequences 0 to 3"):
        unit_scores(whole.model, whole.parts, whole.tokens, 4, Prior.WANDA)

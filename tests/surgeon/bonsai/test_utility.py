"""Sub-models: their loss, and that no graph is ever built."""

import math

import numpy as np
import pytest
import torch

from surgeon.bonsai.parts import MaskedPart, masked
from surgeon.bonsai.priors import random_scores, unit_scores
from surgeon.bonsai.regression import RegressionSpec, regress
from surgeon.bonsai.sampling import candidates_of, draw_keeps
from surgeon.bonsai.utility import LEAST, sub_model_loss, token_batches, utility_of
from surgeon.choices import Prior, Utility
from surgeon.errors import NonFiniteError
from surgeon.pruning.units import SubLayerKind


def some_keeps(whole, seed=0):
    draw = np.random.default_rng(seed)
    return [draw.random(part.n_live) < 0.6 for part in whole.parts]


def test_the_loss_is_the_mean_over_all_predictions(whole_of):
    whole = whole_of("opt")
    keeps = some_keeps(whole)
    with torch.no_grad(), masked(whole.parts, keeps):
        ids = torch.from_numpy(whole.tokens)
        expected = float(whole.model(input_ids=ids, labels=ids, use_cache=False).loss)
    for batch_size in (6, 4, 1):
        found = sub_model_loss(whole.model, whole.parts, keeps, token_batches(whole.model, whole.tokens, batch_size))
        assert found == pytest.approx(expected, rel=1e-6)


def test_a_mask_leaves_nothing_behind(whole_of):
    whole = whole_of("llama")
    inputs = token_batches(whole.model, whole.tokens, 6)
    everything = [np.ones(part.n_live, dtype=bool) for part in whole.parts]
    before = sub_model_loss(whole.model, whole.parts, everything, inputs)
    assert sub_model_loss(whole.model, whole.parts, some_keeps(whole), inputs) != before
    assert sub_model_loss(whole.model, whole.parts, everything, inputs) == before
    assert not any(part.linear._forward_pre_hooks for part in whole.parts)


def test_no_graph_is_ever_built(whole_of):
    """Weights ask for gradients, and still nothing that a linear is given or gives needs any."""
    whole = whole_of("qwen2")
    whole.model.requires_grad_(True)
    graphs, calls = [], []

    def look(_module, inputs, output):
        calls.append(torch.is_grad_enabled())
        graphs.extend(t for t in (*inputs, output) if isinstance(t, torch.Tensor) and t.requires_grad)

    for module in whole.model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(look)
    ids = torch.from_numpy(whole.tokens)
    whole.model(input_ids=ids, use_cache=False)
    assert graphs  # outside of Bonsai there would be one
    graphs.clear(), calls.clear()
    unit_scores(whole.model, whole.parts, whole.tokens, 4, Prior.WANDA)
    sub_model_loss(whole.model, whole.parts, some_keeps(whole), token_batches(whole.model, whole.tokens, 4))
    assert calls and not any(calls) and not graphs


def test_a_loss_that_is_not_finite_has_an_address(whole_of):
    whole = whole_of("llama")
    whole.blockwise.linears(1)["mlp.up_proj"].weight.data[3, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"sequences 0 to 3 is nan.*that of block 1, mlp"):
        sub_model_loss(whole.model, whole.parts, some_keeps(whole), token_batches(whole.model, whole.tokens, 4))


def test_utilities():
    assert utility_of(2.0, Utility.NEGATIVE_LOSS) == -2.0
    assert utility_of(2.0, Utility.NEGATIVE_PERPLEXITY) == pytest.approx(-(math.e**2))
    assert utility_of(1000.0, Utility.NEGATIVE_PERPLEXITY) == LEAST


def test_a_part_knows_what_its_linear_reads():
    with pytest.raises(ValueError, match="block 2, attention: 3 units of 4 columns, but its output linear has 8"):
        MaskedPart(2, SubLayerKind.ATTENTION, torch.nn.Linear(8, 4), 3, 4)


@pytest.mark.parametrize("n_sub_models", [64, 128])
def test_planted_useless_channels_rank_last(whole_of, n_sub_models):
    """Half of the candidates do nothing, which a random prior cannot know; on its own text a model needs the others."""
    whole = whole_of("llama")
    parts = [part for part in whole.parts if part.kind is SubLayerKind.MLP]
    candidates = [candidates_of(scores, 0.1) for scores in random_scores([part.n_live for part in parts], 0, 1)]
    planted = [np.random.default_rng(0).permutation(own.units)[: own.units.size // 2] for own in candidates]
    for part, own, idle in zip(parts, candidates, planted, strict=True):
        part.linear.weight.data[:, own.units] *= 2.0
        part.linear.weight.data[:, idle] = 0.0
    inputs = token_batches(whole.model, own_text(whole.model), 8)
    utilities = np.array(
        [
            -sub_model_loss(whole.model, parts, draw_keeps(candidates, 0, 1, index), inputs)
            for index in range(n_sub_models)
        ]
    )
    result = regress(candidates, utilities, RegressionSpec())
    idle = np.concatenate([np.isin(own.units, gone) for own, gone in zip(candidates, planted, strict=True)])
    first = np.argsort(np.concatenate(result.coefficients))[: idle.sum()]
    assert idle[first].all()


def own_text(model):
    """Greedy continuations of every start: text on which the model itself is as good as can be."""
    with torch.no_grad():
        ids = torch.randint(4, 272, (8, 1), generator=torch.Generator().manual_seed(0))
        for _ in range(64):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(dim=-1)], dim=1)
    return ids.numpy()

"""Sampled next tokens: each depends on its own key alone, and the mean over draws is the Fisher matrix itself."""

import numpy as np
import pytest
import torch
from tiny import make_tiny

from surgeon.choices import Targets
from surgeon.curvature.kronecker_factors import OutputObserver
from surgeon.curvature.weight_moments import DiagonalObserver, LossGradientObserver
from surgeon.models import resolve_model
from surgeon.passes.blockwise import BlockwiseModel
from surgeon.passes.targets import EMPIRICAL, TokenTargets, draw_seed
from tests.surgeon.passes.running import observe
from tests.surgeon.passes.stock import load_stock, relative, stock_tokens

N_VOCABULARY = 24
SAMPLED = TokenTargets(Targets.SAMPLED, draws=2, seed=3)


def logits_of(n_sequences=4, length=300, n_vocabulary=7):
    return torch.randn(n_sequences, length, n_vocabulary, generator=torch.Generator().manual_seed(0))


def test_tokens_of_the_text():
    ids = torch.arange(12).reshape(2, 6)
    assert torch.equal(EMPIRICAL.next_tokens(logits_of(2, 6), ids, 0, 0), ids[:, 1:])


def test_draws_do_not_depend_on_batches():
    logits = logits_of()
    together = SAMPLED.next_tokens(logits, torch.zeros(4, 300, dtype=torch.long), 10, 1)
    parts = [
        SAMPLED.next_tokens(logits[part], torch.zeros(0, 300), 10 + part.start, 1)
        for part in (slice(0, 3), slice(3, 4))
    ]
    assert together.shape == (4, 299)
    assert torch.equal(together, torch.cat(parts))


@pytest.mark.parametrize("other", [(4, 10, 0), (3, 11, 0), (3, 10, 1)], ids=["seed", "sequence", "draw"])
def test_each_part_of_the_key_matters(other):
    seed, first, draw = other
    ids = torch.zeros(4, 300, dtype=torch.long)
    logits = logits_of(1).expand(4, -1, -1)
    one = SAMPLED.next_tokens(logits, ids, 10, 0)
    assert torch.equal(one, SAMPLED.next_tokens(logits, ids, 10, 0))
    assert (one != TokenTargets(Targets.SAMPLED, 2, seed).next_tokens(logits, ids, first, draw)).float().mean() > 0.3
    assert (one[0] != one[1]).float().mean() > 0.3


def test_seeds_are_apart():
    seeds = {draw_seed(*key) for key in np.ndindex(4, 20, 20)}
    assert len(seeds) == 1600
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("n_vocabulary", [2, 7, 500])
def test_frequencies_are_those_of_the_softmax(n_vocabulary):
    logits = logits_of(1, 2, n_vocabulary)
    logits[0, 0, 1] = -torch.inf
    many = logits[:, :1].expand(1, 20001, -1)
    drawn = SAMPLED.next_tokens(many, torch.zeros(1, 20001, dtype=torch.long), 0, 0)[0]
    expected = 20000 * torch.softmax(logits[0, 0].double(), dim=0)
    counts = torch.bincount(drawn, minlength=n_vocabulary)
    assert counts[1] == 0, "it has no probability"
    assert float((counts - expected).abs().max()) < 6 * float(expected.max()) ** 0.5 + 3


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    path = make_tiny("opt", folder / "model", vocab_size=N_VOCABULARY)
    return BlockwiseModel(resolve_model(str(path), folder / "cache")), path


BLOCKS = "model.decoder.layers"
NAMES = ("self_attn.v_proj", "fc1")
SEQUENCES = np.array([[5, 9, 17], [20, 4, 11]])


def exact_moments(path, names):
    """``mean_t`` of the expectations of g gᵀ and of (g∘g)(a∘a)ᵀ under the model's own softmax, by name.

    Targets of different positions are independent and each score has mean zero, so positions add up.
    """
    with torch.no_grad():
        probabilities = load_stock(path, torch.float64)(torch.from_numpy(SEQUENCES)).logits.softmax(dim=-1)
    length = SEQUENCES.shape[1]
    inputs = stock_tokens(path, SEQUENCES, BLOCKS)[0]
    one = torch.ones(SEQUENCES.size, 1, dtype=torch.float64)
    result = {name: [0.0, 0.0] for name in names}
    for position in range(length - 1):
        # The gradient is a sum over positions: what is left of it when one target changes is a difference of scores.
        scores = []
        for token in range(N_VOCABULARY):
            targets = torch.from_numpy(SEQUENCES[:, 1:]).clone()
            targets[:, position] = token
            scores.append(stock_tokens(path, SEQUENCES, BLOCKS, targets)[1])
        weights = probabilities[:, position].T.repeat_interleave(length, dim=1)
        for name in names:
            a = torch.cat([inputs[f"{BLOCKS}.1.{name}"], one], dim=1)
            mine = torch.stack([each[f"{BLOCKS}.1.{name}"] for each in scores])
            mine = mine - (weights[..., None] * mine).sum(dim=0)
            result[name][0] += torch.einsum("vt,vti,vtj->ij", weights, mine, mine) / SEQUENCES.size
            result[name][1] += (weights[..., None] * mine.square()).sum(dim=0).T @ a.square() / SEQUENCES.size
    return result


def test_the_mean_over_draws_tends_to_the_fisher_matrix(small):
    model, path = small
    exact = exact_moments(path, NAMES)

    def errors(draws, seed=0):
        targets = TokenTargets(Targets.SAMPLED, draws, seed) if draws else EMPIRICAL
        make = (OutputObserver, DiagonalObserver, LossGradientObserver)
        seen = observe(model, SEQUENCES, lambda _i, block: [kind(block) for kind in make], 3, 2, targets)[0][1]
        square, diagonal, gradient = (observer.result() for observer in seen)
        return [
            [relative(square[n], exact[n][0]) for n in NAMES],
            [relative(diagonal[n], exact[n][1]) for n in NAMES],
            [float(gradient[n].norm()) for n in NAMES],
        ]

    few = np.mean([errors(16, seed) for seed in range(3)], axis=0)
    many = np.array(errors(1024))
    # Errors fall with the root of the number of draws: by 8 here.
    assert (many[:2] < 0.25 * few[:2]).all()
    assert (many[:2] < 0.1).all()
    assert (many[2] < 0.25 * few[2]).all(), "the mean gradient tends to zero"
    assert np.min(errors(0)[:2]) > 0.3, "the empirical Fisher matrix is another one"

"""The ridge against explicit least squares over all sub-models, and both solvers on planted answers."""

import numpy as np
import pytest

from surgeon.bonsai.adam import N_FOLDS, fit_adam, folds
from surgeon.bonsai.kendall import kendall_tau
from surgeon.bonsai.regression import RegressionSpec, regress, require_sub_models
from surgeon.bonsai.ridge import fit_ridge
from surgeon.bonsai.sampling import candidates_of, design_matrix
from surgeon.choices import Penalty, Scope, Solver
from surgeon.errors import NonFiniteError, ParameterError


def problem(n_pairs=12, sizes=(9, 8), seed=0, noise=0.05):
    """Masks of complementary sub-models, utilities with an effect that is even in the masks, and a prior."""
    draw = np.random.default_rng(seed)
    parts = [candidates_of(draw.random(n), 0.5) for n in sizes]
    design = design_matrix(parts, seed, 1, 2 * n_pairs)
    prior = np.concatenate([part.scores[part.units] for part in parts])
    true = 0.7 * prior + 0.2 * draw.standard_normal(prior.size)
    even = np.repeat(draw.standard_normal(n_pairs), 2)
    return parts, design, design @ true + even + noise * draw.standard_normal(2 * n_pairs), prior


def explicit(design, utilities, prior, strength):
    """min (y - b - X(c s + δ))² + λ δ² over all sub-models, b and c free: β, c and all that predicts."""
    X = design.astype(float)
    columns = np.column_stack([np.ones(len(X)), X @ prior, X])
    penalty = np.diag([0.0, 0.0] + [strength] * X.shape[1])
    b, c, *delta = np.linalg.solve(columns.T @ columns + penalty, columns.T @ utilities)
    return c * prior + np.array(delta), c, b


@pytest.mark.parametrize("strength", [1e-2, 1.0, 50.0])
@pytest.mark.parametrize("seed", range(3))
def test_ridge_is_the_explicit_least_squares_over_all_sub_models(strength, seed):
    _, design, utilities, prior = problem(seed=seed)
    fit = fit_ridge(design, utilities, prior, np.array([strength]))
    beta, c, _ = explicit(design, utilities, prior, strength)
    assert c > 0
    assert fit.coefficients == pytest.approx(beta, abs=1e-9)
    assert fit.prior_scale / prior.max() == pytest.approx(c, rel=1e-9)


@pytest.mark.parametrize("strength", [1e-2, 1.0, 50.0])
def test_what_is_held_out_is_exactly_one_pair(strength):
    """Kendall's tau of the closed form is that of fits that have not seen the pair."""
    _, design, utilities, prior = problem()
    slopes, differences = [], (utilities[0::2] - utilities[1::2]) / 2
    for k in range(len(design) // 2):
        others = np.arange(len(design)) // 2 != k
        beta, c, _ = explicit(design[others], utilities[others], prior, strength)
        assert c > 0
        slopes.append((design[2 * k] - 0.5) @ beta)
    expected = kendall_tau(np.concatenate([slopes, np.negative(slopes)]), np.concatenate([differences, -differences]))
    assert 0 < expected < 1
    assert fit_ridge(design, utilities, prior, np.array([strength])).tau == pytest.approx(expected, abs=1e-12)


def test_the_strength_with_the_best_tau_is_taken():
    _, design, utilities, prior = problem(noise=1.0)
    strengths = np.logspace(-3, 3, 13)
    taus = [fit_ridge(design, utilities, prior, np.array([s])).tau for s in strengths]
    fit = fit_ridge(design, utilities, prior, strengths)
    assert fit.tau == max(taus) > min(taus)
    assert fit.strength == max(s for s, tau in zip(strengths, taus, strict=True) if tau == max(taus))


def test_a_prior_that_contradicts_is_left_out():
    _, design, utilities, prior = problem(noise=0.0)
    fit = fit_ridge(design, -utilities, prior, np.array([1.0]))
    X = design - 0.5
    plain = X.T @ np.linalg.solve(X @ X.T + np.eye(len(X)), -utilities - np.mean(-utilities))
    assert fit.prior_scale == 0
    assert fit.coefficients == pytest.approx(plain, abs=1e-9)


def test_equal_priors_say_nothing():
    parts = [candidates_of(np.ones(6), 0.5)]
    design = design_matrix(parts, 0, 1, 20)
    fit = fit_ridge(design, design @ np.arange(6.0), np.ones(6))
    assert fit.prior_scale == 0 and np.array_equal(np.argsort(fit.coefficients), np.arange(6))


def test_sub_models_that_are_not_complementary_are_refused():
    _, design, utilities, prior = problem()
    with pytest.raises(ValueError, match="complementary"):
        fit_ridge(design[1:-1], utilities[1:-1], prior)


@pytest.mark.parametrize("solver", list(Solver))
@pytest.mark.parametrize("scope", list(Scope))
def test_units_without_effect_rank_below_those_with_one(solver, scope):
    draw = np.random.default_rng(2)
    parts = [candidates_of(draw.random(n), 0.5) for n in (12, 10)]
    useless = [draw.permutation(n)[: n // 2] for n in (12, 10)]
    true = []
    for part, idle in zip(parts, useless, strict=True):
        effect = np.ones(part.n_live)
        effect[idle] = 0.0
        true.append(effect)
    design = design_matrix(parts, 0, 1, 128)
    utilities = design @ np.concatenate(true) + 0.05 * draw.standard_normal(128)
    result = regress(parts, utilities, RegressionSpec(solver, scope))
    for own, idle in zip(result.coefficients, useless, strict=True):
        assert set(np.argsort(own)[: len(idle)]) == set(idle)
    assert result.tau > 0.5


@pytest.mark.parametrize("n", [2, 8, 11])
def test_too_few_sub_models_are_refused(n):
    with pytest.raises(ParameterError, match=rf"got {n}; .*at least 10 .*or 0"):
        require_sub_models(n)
    parts, *_ = problem()
    with pytest.raises(ParameterError, match="at least 10"):
        regress(parts, np.zeros(n), RegressionSpec())


def test_a_utility_that_is_not_finite_has_an_address():
    parts, _, utilities, _ = problem()
    utilities[5] = np.nan
    with pytest.raises(NonFiniteError, match="round 1: the utility of sub-model 5 is nan"):
        regress(parts, utilities, RegressionSpec())


def test_folds_split_no_pair_and_hold_out_everything_once():
    held = np.array(folds(26))
    assert len(held) == N_FOLDS and np.array_equal(held.sum(axis=0), np.ones(26))
    assert np.array_equal(held[:, 0::2], held[:, 1::2])


def test_the_published_solver_learns_and_is_reproducible():
    _, design, utilities, _ = problem(n_pairs=40, noise=0.0)
    zeros = np.zeros(design.shape[1])
    one, other = (fit_adam(design, utilities, zeros, Penalty.L2, (0, 1)) for _ in range(2))
    assert np.array_equal(one.coefficients, other.coefficients)
    assert one.tau > 0.1


@pytest.mark.parametrize(
    ("one", "other", "tau"),
    [([1, 2, 3], [1, 2, 3], 1.0), ([1, 2, 3], [3, 2, 1], -1.0), ([1, 2, 3], [1, 3, 2], 1 / 3), ([1, 1], [1, 2], 0.0)],
)
def test_kendall(one, other, tau):
    assert kendall_tau(np.array(one, dtype=float), np.array(other, dtype=float)) == pytest.approx(tau)


def test_kendall_with_ties():
    """tau-b: 4 pairs agree, 1 is tied in the first."""
    assert kendall_tau(np.array([1.0, 1, 2, 3]), np.array([1.0, 2, 3, 4])) == pytest.approx(5 / np.sqrt(5 * 6))

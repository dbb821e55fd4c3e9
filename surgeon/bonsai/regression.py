"""From utilities of sub-models to a coefficient for every candidate: by how much utility falls if it goes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from surgeon.bonsai.adam import N_FOLDS, fit_adam
from surgeon.bonsai.ridge import Fit, fit_ridge
from surgeon.bonsai.sampling import Candidates, design_matrix
from surgeon.choices import Penalty, Scope, Solver
from surgeon.errors import NonFiniteError, ParameterError

FloatArray = NDArray[np.float64]

LEAST_SUB_MODELS = 2 * N_FOLDS
"""Fewer cannot be regressed on: a pair in every fold."""


@dataclass(frozen=True)
class RegressionSpec:
    """How utilities are regressed on masks.

    Attributes:
        solver: ridge, or as published.
        scope: one regression for all sub-layers, or one for each.
        penalty: of the solver `adam`.
        seed: of the run.
        number: of the round, from 1.
    """

    solver: Solver = Solver.RIDGE
    scope: Scope = Scope.GLOBAL
    penalty: Penalty = Penalty.L1
    seed: int = 0
    number: int = 1


@dataclass(frozen=True)
class Regression:
    """What the sub-models of a round say.

    Attributes:
        coefficients: for each sub-layer, of its candidates, `[n_candidates]` float64, utility per unit.
        tau: Kendall's tau of predictions for sub-models that were held out, the mean over regressions.
        strength: of the penalty, the mean over regressions.
        prior_scale: factor of the prior, the mean over regressions; 0 for the solver `adam`.
    """

    coefficients: tuple[FloatArray, ...]
    tau: float
    strength: float
    prior_scale: float


def require_sub_models(n_sub_models: int) -> None:
    """Refuses numbers of sub-models that nothing can be learnt from; 0 stands for the prior alone.

    Raises:
        ParameterError: naming how many are needed.
    """
    if n_sub_models and (n_sub_models < LEAST_SUB_MODELS or n_sub_models % 2):
        raise ParameterError(
            f"sub_models: got {n_sub_models}; sub-models come in complementary pairs and a regression needs at least "
            f"{LEAST_SUB_MODELS} of them ({LEAST_SUB_MODELS // 2} pairs); give an even number from {LEAST_SUB_MODELS} "
            "on, or 0 to prune by the prior alone"
        )


def regress(parts: Sequence[Candidates], utilities: FloatArray, spec: RegressionSpec) -> Regression:
    """Regresses utilities on which candidates each sub-model kept.

    Args:
        parts: candidates of every sub-layer.
        utilities: of sub-models 0, 1, …, `[n_sub_models]` float64.
        spec: how.

    Raises:
        ParameterError: there are too few sub-models.
        NonFiniteError: a utility is not finite.
    """
    require_sub_models(len(utilities))
    if not np.isfinite(utilities).all():
        index = int(np.flatnonzero(~np.isfinite(utilities))[0])
        raise NonFiniteError(f"round {spec.number}: the utility of sub-model {index} is {utilities[index]}")
    design = design_matrix(parts, spec.seed, spec.number, len(utilities))
    ends = np.cumsum([part.units.size for part in parts])
    priors = [part.scores[part.units] for part in parts]
    if spec.scope is Scope.GLOBAL:
        fit = _fit(design, utilities, np.concatenate(priors), spec)
        return Regression(tuple(np.split(fit.coefficients, ends[:-1])), fit.tau, fit.strength, fit.prior_scale)
    fits = [
        _fit(own, utilities, prior, spec)
        for own, prior in zip(np.split(design, ends[:-1], axis=1), priors, strict=True)
    ]
    return Regression(
        tuple(fit.coefficients for fit in fits),
        *(float(np.mean([getattr(fit, name) for fit in fits])) for name in ("tau", "strength", "prior_scale")),
    )


def _fit(design: NDArray[np.bool_], utilities: FloatArray, prior: FloatArray, spec: RegressionSpec) -> Fit:
    if not prior.size:
        return Fit(prior, 0.0, 0.0)
    if spec.solver is Solver.RIDGE:
        return fit_ridge(design, utilities, prior)
    has_own = spec.scope is Scope.PER_LAYER and prior.sum() > 0
    start = prior / prior.sum() if has_own else np.zeros_like(prior)
    return fit_adam(design, utilities, start, spec.penalty, (spec.seed, spec.number))

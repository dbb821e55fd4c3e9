"""Ridge regression of utilities on masks, in the dual: there are far more candidates than sub-models.

With X the masks of 2m sub-models (2m by P, ones and zeros), y their utilities and s the prior, find

    min over b, c, δ of  sum_i (y_i - b - x_iᵀ(c s + δ))² + λ ‖δ‖²,      β = c s + δ

The intercept b and the scale c of the prior are not punished. Sub-models come in complementary pairs, x and 1 - x, so
with v = x - 1/2 and d = (y of the first - y of the second) / 2 the sum of a pair is, b fitted, 2 (d - vᵀβ)² and a
constant: m equations without intercept are left, exactly. With K = V Vᵀ, z = V s and G = (K + λ/2)⁻¹,

    c = zᵀG d / zᵀG z,   G̃ = G - G z zᵀG / zᵀG z,   β = c s + Vᵀ G̃ d

Left out of the fit, pair k has the residual (G̃ d)_k / G̃_kk (the closed form of leave-one-out, here exactly
leave-one-pair-out, c fitted anew each time). λ is that of a grid for which Kendall's tau between the predictions of
pairs left out and what was measured is highest; of equals the largest. c is not negative: a prior that predicts the
opposite of what is measured is left out.

Reference: ours; Golub, Heath & Wahba 1979 and Allen 1974 (PRESS) for the closed form. The published solver is in
`surgeon.bonsai.adam`.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from surgeon.bonsai.kendall import kendall_tau

FloatArray = NDArray[np.float64]

GRID = np.logspace(-4, 4, 33)
"""Strengths λ that are tried, as parts of twice the mean eigenvalue of K."""
_ZERO = 1e-12


@dataclass(frozen=True)
class Fit:
    """A regression of utilities on masks.

    Attributes:
        coefficients: how much utility falls if a candidate goes, `[n_candidates]` float64.
        tau: Kendall's tau of predictions for pairs that were left out.
        strength: of the penalty.
        prior_scale: factor of the prior, where the solver has one.
    """

    coefficients: FloatArray
    tau: float
    strength: float
    prior_scale: float = 0.0


def pair_differences(design: NDArray[np.bool_], utilities: FloatArray) -> tuple[FloatArray, FloatArray]:
    """What complementary pairs leave of a regression: ``V`` `[n_pairs, P]` and ``d`` `[n_pairs]`, float64.

    Raises:
        ValueError: sub-models 2k and 2k + 1 are not complementary.
    """
    if not np.array_equal(design[0::2], ~design[1::2]):
        raise ValueError("sub-models 2k and 2k + 1 must keep complementary candidates")
    return design[0::2].astype(np.float64) - 0.5, (utilities[0::2] - utilities[1::2]) / 2.0


def fit_ridge(
    design: NDArray[np.bool_], utilities: FloatArray, prior: FloatArray, strengths: FloatArray | None = None
) -> Fit:
    """Regresses utilities on masks.

    Args:
        design: whether each sub-model keeps each candidate, `[2m, P]` bool; 2k and 2k + 1 are complementary.
        utilities: of the sub-models, `[2m]` float64.
        prior: scores of the candidates, `[P]` float64, at any scale.
        strengths: penalties λ to choose from, ascending; None for `GRID`.
    """
    centred, differences = pair_differences(design, utilities)
    shape = prior / np.abs(prior).max() if np.abs(prior).max() > 0 else prior
    along = centred @ shape
    values, vectors = np.linalg.eigh(centred @ centred.T)
    if strengths is None:
        strengths = 2.0 * GRID * max(float(values.mean()), _ZERO)
    best: tuple[float, float, float, FloatArray] | None = None
    for strength in strengths.tolist():
        inverse = (vectors / (np.maximum(values, 0.0) + strength / 2.0)) @ vectors.T
        scale, dual, predictions = _solve(inverse, along, differences)
        tau = kendall_tau(_both(predictions), _both(differences))
        if best is None or tau >= best[0]:
            best = (tau, strength, scale, dual)
    assert best is not None, "there is a strength to choose"
    tau, strength, scale, dual = best
    return Fit(scale * shape + centred.T @ dual, tau, strength, scale)


def _solve(inverse: FloatArray, along: FloatArray, differences: FloatArray) -> tuple[float, FloatArray, FloatArray]:
    """Scale of the prior, ``G̃ d``, and what each pair is predicted to be when it is left out."""
    scale = 0.0
    through = inverse @ along
    size = float(along @ through)
    if along @ along > _ZERO * len(along) and size > 0:
        fitted = float(through @ differences) / size
        if fitted > 0:
            scale, inverse = fitted, inverse - np.outer(through, through) / size
    dual = inverse @ differences
    diagonal = inverse.diagonal()
    # A pair that alone decides c says nothing of itself: nothing is predicted for it.
    known = diagonal > _ZERO * diagonal.max()
    predictions = np.where(known, differences - dual / np.where(known, diagonal, 1.0), 0.0)
    return scale, dual, predictions


def _both(values: FloatArray) -> FloatArray:
    """Values of both sub-models of every pair."""
    return np.concatenate([values, -values])

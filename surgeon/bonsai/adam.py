"""The published solver: a linear model trained by Adam and stopped early, its settings chosen by cross-validation.

With features divided by ``r = sqrt(1 + sum of the initial weights)`` the loss of a batch is the mean squared error plus
``λ/r · sum |β|`` (`l1`) or ``λ/r · sum (β - β₀)²`` (`l2`), where β₀ are the initial weights, or the mean mask if those
sum to 0. The learning rate is ``1 / (P f)`` with P the number of features; it is halved when Kendall's tau on held-out
pairs has not risen for more than 3 epochs, but not below 1e-5; after 10 such epochs training stops, and the weights of
the best tau are kept. f, λ and the batch size are those of a grid with the highest mean tau over 5 folds; with them
the model is fitted to all sub-models once more.

Initial weights are zero where one regression explains all sub-layers, and the prior, normalised to sum 1, where each
sub-layer has its own. Folds never split a complementary pair (departure: the published folds may).

Reference: Dery et al. 2024, section 3.3, and their code.
"""

from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from surgeon.bonsai.kendall import kendall_tau
from surgeon.bonsai.ridge import Fit
from surgeon.choices import Penalty

FloatArray = NDArray[np.float64]

RATE_FACTORS = (100.0, 10.0, 1.0, 0.1)
STRENGTHS = (1e2, 1e-4, 0.0)
BATCHES = (32, 64, 128)
N_FOLDS = 5
N_EPOCHS = 50
_PATIENCE = 10
_RATE_PATIENCE = 3
_LEAST_RATE = 1e-5
_DECAY_1, _DECAY_2, _EPSILON = 0.9, 0.999, 1e-8
_DRAW = 2
"""Keeps the order of sub-models apart from the draws of masks and priors."""


@dataclass(frozen=True)
class Training:
    """How one linear model is trained.

    Attributes:
        rate_factor: f; the learning rate is ``1 / (P f)``.
        strength: λ.
        batch: sub-models at a time.
        penalty: of which kind.
        seeds: of the order of sub-models.
    """

    rate_factor: float
    strength: float
    batch: int
    penalty: Penalty
    seeds: tuple[int, ...]


def fit_adam(
    design: NDArray[np.bool_], utilities: FloatArray, start: FloatArray, penalty: Penalty, seeds: tuple[int, int]
) -> Fit:
    """Regresses utilities on masks as published.

    Args:
        design: whether each sub-model keeps each candidate, `[n_sub_models, P]` bool; 2k and 2k + 1 are a pair.
        utilities: of the sub-models, `[n_sub_models]` float64.
        start: initial weights, `[P]`: zeros, or a prior that sums to 1.
        penalty: of which kind.
        seeds: seed and number of the round.
    """
    features = design.astype(np.float64)
    best: tuple[float, Training] | None = None
    for factor, strength, batch in product(RATE_FACTORS, STRENGTHS, BATCHES):
        training = Training(factor, strength, batch, penalty, (*seeds, _DRAW))
        taus = [
            _train(features, utilities, start, (~held, held), replace(training, seeds=(*training.seeds, fold)))[1]
            for fold, held in enumerate(folds(len(utilities)))
        ]
        tau = float(np.mean(taus))
        if best is None or tau > best[0]:
            best = (tau, training)
    assert best is not None, "there is a setting to choose"
    everything = np.ones(len(utilities), dtype=bool)
    weights, _ = _train(features, utilities, start, (everything, everything), best[1])
    return Fit(weights, best[0], best[1].strength)


def folds(n_sub_models: int) -> list[NDArray[np.bool_]]:
    """Which sub-models each of five folds holds out, `[n_sub_models]` bool; contiguous, pairs unsplit."""
    parts = np.array_split(np.arange(n_sub_models // 2), N_FOLDS)
    return [np.isin(np.arange(n_sub_models) // 2, part) for part in parts]


def _train(
    features: FloatArray,
    utilities: FloatArray,
    start: FloatArray,
    split: tuple[NDArray[np.bool_], NDArray[np.bool_]],
    training: Training,
) -> tuple[FloatArray, float]:
    """Weights of the best epoch, and Kendall's tau of that epoch on the held-out sub-models."""
    fitted, held = split
    scale = float(np.sqrt(1.0 + start.sum()))
    inputs, targets = features[fitted] / scale, utilities[fitted] - utilities[fitted].mean()
    held_inputs, held_targets = features[held] / scale, utilities[held]
    towards = start if start.sum() else features[fitted].mean(axis=0)
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(training.seeds)))
    adam = _Adam(np.append(start, 0.0), 1.0 / (features.shape[1] * training.rate_factor))
    best, best_tau, since, since_rate = start, -np.inf, 0, 0
    for _ in range(N_EPOCHS):
        order = generator.permutation(len(targets))
        for first in range(0, len(order), training.batch):
            chosen = order[first : first + training.batch]
            adam.step(_gradient(adam.values, inputs[chosen], targets[chosen], training, (towards, scale)))
        tau = kendall_tau(held_inputs @ adam.values[:-1], held_targets)
        if tau > best_tau:
            best, best_tau, since, since_rate = adam.values[:-1].copy(), tau, 0, 0
            continue
        since, since_rate = since + 1, since_rate + 1
        if since_rate > _RATE_PATIENCE:
            adam.rate, since_rate = max(adam.rate / 2.0, min(_LEAST_RATE, adam.rate)), 0
        if since >= _PATIENCE:
            break
    return best, best_tau


def _gradient(
    values: FloatArray,
    inputs: FloatArray,
    targets: FloatArray,
    training: Training,
    around: tuple[FloatArray, float],
) -> FloatArray:
    """Of the loss of a batch with respect to weights and intercept (last), `[P + 1]`."""
    weights, (towards, scale) = values[:-1], around
    errors = inputs @ weights + values[-1] - targets
    gradient = 2.0 * (inputs.T @ errors) / len(targets)
    if training.penalty is Penalty.L1:
        gradient += training.strength / scale * np.sign(weights)
    else:
        gradient += 2.0 * training.strength / scale * (weights - towards)
    return np.append(gradient, 2.0 * errors.mean())


class _Adam:
    """Adam (Kingma & Ba 2015, algorithm 1) on one vector."""

    def __init__(self, values: FloatArray, rate: float) -> None:
        self.values, self.rate = values, rate
        self._first, self._second, self._steps = np.zeros_like(values), np.zeros_like(values), 0

    def step(self, gradient: FloatArray) -> None:
        """One step against a gradient."""
        self._steps += 1
        self._first = _DECAY_1 * self._first + (1.0 - _DECAY_1) * gradient
        self._second = _DECAY_2 * self._second + (1.0 - _DECAY_2) * gradient**2
        first = self._first / (1.0 - _DECAY_1**self._steps)
        second = self._second / (1.0 - _DECAY_2**self._steps)
        self.values = self.values - self.rate * first / (np.sqrt(second) + _EPSILON)

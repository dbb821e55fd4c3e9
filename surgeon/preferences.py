"""What is asked of a run of pruning, before a method fills in the rest."""

from dataclasses import dataclass

from surgeon.choices import (
    Allocation,
    Correction,
    Cost,
    Curvature,
    Method,
    Ranking,
    Structure,
    Targets,
    UpdateRule,
    Widths,
)
from surgeon.errors import ParameterError
from surgeon.pruning.granularity import Granularity


@dataclass(frozen=True)
class Preferences:
    """What is asked for. None is left to the method and the granularity.

    Attributes:
        method: the preset.
        granularity: what goes as one.
        widths: of units, equal in all blocks or free.
        multiple: what a number of MLP neurons is rounded to, at least 1.
        heads: whether key/value groups may go too, not only MLP neurons.
        rescorings: how often costs of units are taken again as units go, at least 0.
        curvature: the approximation.
        rank: Kronecker products of `kronecker-sum`, at least 2.
        power_iterations: passes of the power iteration of `nearest-kronecker` and `kronecker-sum`, at least 1.
        targets: next tokens that gradients are taken for.
        draws: of `sampled` targets for each sequence, at least 1.
        cost: what a removal costs.
        ranking: what is compared between structures.
        allocation: within what the cheapest are chosen.
        update: how the rest adapts.
        max_iterations: of conjugate gradients, at least 1.
        tolerance: relative residual at which they stop, above 0.
        max_correlate: weights of `chunked` or columns of `sequential` at a time, at least 1.
        damping_activations: multiple of the mean diagonal of A, at least 0.
        damping_gradients: multiple of the mean diagonal of G, at least 0.
        correction: what is done about the gradient of the loss.
        newton_step: part of the damped natural-gradient step, above 0 and at most 1.
    """

    method: Method = Method.LLM_SURGEON
    granularity: Granularity = Structure.UNITS
    widths: Widths | None = None
    multiple: int | None = None
    heads: bool | None = None
    rescorings: int | None = None
    curvature: Curvature | None = None
    rank: int | None = None
    power_iterations: int | None = None
    targets: Targets | None = None
    draws: int | None = None
    cost: Cost | None = None
    ranking: Ranking | None = None
    allocation: Allocation | None = None
    update: UpdateRule | None = None
    max_iterations: int | None = None
    tolerance: float | None = None
    max_correlate: int | None = None
    damping_activations: float | None = None
    damping_gradients: float | None = None
    correction: Correction = Correction.NONE
    newton_step: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("rank", 2), ("multiple", 1), ("power_iterations", 1), ("draws", 1), ("max_iterations", 1)):
            _require_least(name, getattr(self, name), least)
        _require_least("rescorings", self.rescorings, 0)
        _require_least("max_correlate", self.max_correlate, 1)
        _require_least("damping.activations", self.damping_activations, 0)
        _require_least("damping.gradients", self.damping_gradients, 0)
        for name in ("tolerance", "newton_step"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ParameterError(f"{name}: got {value}; must be above 0 and at most 1")


def no_effect(name: str, value: object, where: str, reason: str) -> None:
    """Refuses a choice that is given although nothing reads it."""
    if value is not None:
        raise ParameterError(f"{name}: {value} has no effect with {where} ({reason}); leave it null")


def _require_least(name: str, value: float | None, least: int) -> None:
    if value is not None and not least <= value < float("inf"):
        raise ParameterError(f"{name}: got {value}; must be at least {least}")

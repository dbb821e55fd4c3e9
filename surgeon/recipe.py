"""How to prune, with every choice made: what the parameters of a run come down to.

A method is a preset. `resolve` fills in what is not given from the method and the granularity, and refuses what
contradicts them or would have no effect.
"""

from dataclasses import dataclass

from surgeon.choices import Allocation, Correction, Cost, Method, Ranking, UpdateRule
from surgeon.curvature.spec import CurvatureSpec
from surgeon.pruning.granularity import Granularity


@dataclass(frozen=True)
class Damping:
    """Relative damping of both factors (multiples of the mean of their diagonals)."""

    activations: float
    gradients: float


@dataclass(frozen=True)
class UpdateSpec:
    """How the remaining weights adapt.

    Attributes:
        rule: which solution.
        max_iterations: of conjugate gradients; 0 where the rule does not iterate.
        tolerance: relative residual at which conjugate gradients stop; 0 where the rule does not iterate.
        max_correlate: weights solved for at a time by `chunked`, columns by `sequential`; 0 for the others.
        newton_step: part of the damped natural-gradient step that the update aims at; 0 for none.
    """

    rule: UpdateRule
    max_iterations: int = 0
    tolerance: float = 0.0
    max_correlate: int = 0
    newton_step: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """Everything that decides which weights go and what becomes of the others, but the target of a shot."""

    method: Method
    granularity: Granularity
    curvature: CurvatureSpec
    damping: Damping
    cost: Cost
    ranking: Ranking
    allocation: Allocation
    update: UpdateSpec
    correction: Correction

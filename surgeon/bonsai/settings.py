"""How Bonsai learns what units are worth."""

from dataclasses import dataclass

from surgeon.bonsai.regression import require_sub_models
from surgeon.choices import Penalty, Prior, Scope, Solver, Utility
from surgeon.errors import ParameterError


@dataclass(frozen=True)
class BonsaiSettings:
    """What a round measures, and what it makes of it.

    Attributes:
        sub_models: that are run in a round, an even number; 0 goes by the prior alone.
        sequences: calibration sequences that each runs on; None is all.
        prior: what is known before.
        utility: what a sub-model is worth.
        solver: of the regression.
        scope: one regression, or one for each sub-layer.
        penalty: of the solver `adam`.
        seed: of all draws.
    """

    sub_models: int = 64
    sequences: int | None = None
    prior: Prior = Prior.WANDA
    utility: Utility = Utility.NEGATIVE_LOSS
    solver: Solver = Solver.RIDGE
    scope: Scope = Scope.GLOBAL
    penalty: Penalty = Penalty.L1
    seed: int = 0

    def __post_init__(self) -> None:
        require_sub_models(self.sub_models)
        if self.sequences is not None and self.sequences < 1:
            raise ParameterError(f"sequences: got {self.sequences}, allowed: 1 or more, or none for all")

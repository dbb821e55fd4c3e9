"""How much work each task of a run is, to say how much time is left.

Units are multiply-adds; a float64 one counts double. Only ratios matter: the rate is measured while running.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgeon.choices import UpdateRule
from surgeon.curvature.spec import Statistic

if TYPE_CHECKING:
    from flows.session import Session

_FLOAT64 = 2.0
_COST_CUBES = 1.5
"""A Cholesky factorisation (1/3 n³), an inverse (2/3 n³) and the products with the weight, in n³."""
_UPDATE_CUBES = 1.5
"""Two factorisations (2/3 n³), solves and products, in n³."""
_FACTORS = 0.65
"""Part of a full product that a triangular one takes (measured)."""


@dataclass(frozen=True)
class WorkPlan:
    """Work of a whole run, by kind of task.

    Attributes:
        curvature: of all groups of one shot.
        refining: of all groups of one shot, for what is computed from K-FAC's factors.
        costs: of one block.
        update: of one block.
        evaluation: of one evaluation.
        sample: of one continuation.
        groups: curvature tasks a shot.
        blocks: blocks of the model.
        shots: number of shots.
    """

    curvature: float
    refining: float
    costs: float
    update: float
    evaluation: float
    sample: float
    groups: int
    blocks: int
    shots: int

    @classmethod
    def of(cls, session: "Session") -> "WorkPlan":
        """Work of a session's run."""
        params, model = session.params, session.model
        n_calibration = params.calibrate.sequences * params.calibrate.length
        n_evaluation = session.windows.attributes["n_windows"] * params.evaluate.length
        per_token = model.n_weights + model.width * model.n_vocabulary
        names = session.measured_linears
        measured = [s for block in model.blocks for s in block if names is None or s.name in names]
        squares = sum(s.n_out**2 + s.n_in**2 for s in measured)
        cubes = sum(s.n_out**3 + s.n_in**3 for s in measured) / model.n_blocks
        cross = 2.0 * sum((s.n_out + s.n_in) * s.n_weights for s in measured) / model.n_blocks
        recipe = session.recipe
        refining = 0.0
        if Statistic.MOMENTS in recipe.curvature.statistics:
            refining = n_calibration * (2 * per_token + squares + model.n_weights)
        if Statistic.KRONECKER_TERMS in recipe.curvature.statistics:
            refining = (
                recipe.curvature.iterations * n_calibration * (2 * per_token + 3 * recipe.curvature.rank * squares)
            )
        recomputed = 0 if len(session.context.groups) == 1 else 1
        return cls(
            curvature=n_calibration * ((2 + recomputed) * per_token + _FACTORS * squares),
            refining=refining,
            costs=_FLOAT64 * _COST_CUBES * cubes if recipe.update.rule is not UpdateRule.SEQUENTIAL else 0.0,
            update=recipe.update.max_iterations * cross / 2 or _FLOAT64 * _UPDATE_CUBES * cubes,
            evaluation=n_evaluation * per_token,
            sample=per_token * params.report.new_tokens * 4.0,
            groups=len(session.context.groups),
            blocks=model.n_blocks,
            shots=params.prune.shots,
        )

    def units(self, task: str) -> float:
        """Work of one task, by the last part of its name."""
        kind = task.rsplit("/", 1)[-1]
        return {
            "curvature": self.curvature / self.groups,
            "moments": self.refining / self.groups,
            "kronecker-terms": self.refining / self.groups,
            "costs": self.costs,
            "update": self.update,
            "evaluation": self.evaluation,
            "sample": self.sample,
            "export": self.sample,
        }.get(kind, 0.0)

    @property
    def total(self) -> float:
        """Work of the whole run."""
        shot = self.curvature + self.refining + self.blocks * (self.costs + self.update) + self.evaluation
        return self.shots * shot + self.evaluation + 3 * self.sample

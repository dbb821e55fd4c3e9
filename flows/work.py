"""How much work each task of a run is, to say how much time is left.

Units are multiply-adds; a float64 one counts double. Only ratios matter: the rate is measured while running.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

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
        costs: of one block.
        update: of one block.
        evaluation: of one evaluation.
        sample: of one continuation.
        groups: curvature tasks a shot.
        blocks: blocks of the model.
        shots: number of shots.
    """

    curvature: float
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
        squares = sum(s.n_out**2 + s.n_in**2 for block in model.blocks for s in block)
        cubes = sum(s.n_out**3 + s.n_in**3 for block in model.blocks for s in block) / model.n_blocks
        recomputed = 0 if len(session.context.groups) == 1 else 1
        return cls(
            curvature=n_calibration * ((2 + recomputed) * per_token + _FACTORS * squares),
            costs=_FLOAT64 * _COST_CUBES * cubes,
            update=_FLOAT64 * _UPDATE_CUBES * cubes,
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
            "costs": self.costs,
            "update": self.update,
            "evaluation": self.evaluation,
            "sample": self.sample,
            "export": self.sample,
        }.get(kind, 0.0)

    @property
    def total(self) -> float:
        """Work of the whole run."""
        shot = self.curvature + self.blocks * (self.costs + self.update) + self.evaluation
        return self.shots * shot + self.evaluation + 3 * self.sample

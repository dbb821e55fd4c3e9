"""Which curvature is wanted, and which statistics of the calibration text it is made of."""

from dataclasses import dataclass
from enum import StrEnum

from surgeon.choices import Curvature, Targets
from surgeon.errors import ParameterError


class Statistic(StrEnum):
    """A kind of statistic of one block, computed and stored as a whole.

    `input-factors` are ``A`` and the mean input, `output-factors` are ``G``, `moments` are EKFAC's bases and second
    moments, `kronecker-terms` the terms of the nearest Kronecker sum, `diagonal` the second moments by weight, and
    `loss-gradient` is the mean gradient of the loss.
    """

    INPUT_FACTORS = "input-factors"
    OUTPUT_FACTORS = "output-factors"
    MOMENTS = "moments"
    KRONECKER_TERMS = "kronecker-terms"
    DIAGONAL = "diagonal"
    LOSS_GRADIENT = "loss-gradient"


_STATISTICS: dict[Curvature, tuple[Statistic, ...]] = {
    Curvature.IDENTITY: (),
    Curvature.ACTIVATIONS: (Statistic.INPUT_FACTORS,),
    Curvature.DIAGONAL: (Statistic.DIAGONAL,),
    Curvature.KFAC: (Statistic.INPUT_FACTORS, Statistic.OUTPUT_FACTORS),
    Curvature.NEAREST_KRONECKER: (Statistic.KRONECKER_TERMS,),
    Curvature.KRONECKER_SUM: (Statistic.KRONECKER_TERMS,),
    Curvature.EKFAC: (Statistic.INPUT_FACTORS, Statistic.OUTPUT_FACTORS, Statistic.MOMENTS),
}


@dataclass(frozen=True)
class CurvatureSpec:
    """A kind of curvature with its settings.

    Attributes:
        kind: the approximation.
        targets: next tokens of the text, or draws.
        draws: number of draws for each sequence; 1 if the targets are those of the text.
        rank: number of Kronecker products; 1 unless `kronecker-sum`.
        iterations: passes of the power iteration of `nearest-kronecker` and `kronecker-sum`; 0 for the others.
        seed: of the draws; 0 if the targets are those of the text.
    """

    kind: Curvature
    targets: Targets = Targets.EMPIRICAL
    draws: int = 1
    rank: int = 1
    iterations: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        iterated = self.kind in (Curvature.NEAREST_KRONECKER, Curvature.KRONECKER_SUM)
        if iterated != (self.iterations > 0):
            raise ParameterError(f"curvature {self.kind}: got {self.iterations} iterations of the power method")
        if self.rank < 1 or (self.rank > 1 and self.kind is not Curvature.KRONECKER_SUM):
            raise ParameterError(f"curvature {self.kind}: got rank {self.rank}; only kronecker-sum has more than 1")
        if self.draws < 1 or (self.draws > 1 and self.targets is not Targets.SAMPLED):
            raise ParameterError(f"targets {self.targets}: got {self.draws} draws; only sampled has more than 1")

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """What the curvature is made of; what comes later may be computed from what comes before."""
        return _STATISTICS[self.kind]

"""From coefficients to the order in which the units of a sub-layer go, and what each costs.

The coefficient of a unit is by how much utility falls if it goes; with the loss as utility that is a rise of the loss
in nats per token, which is what costs of units are everywhere in Surgeon. So coefficients *are* the costs, and the
choice of widths is that of all methods (`surgeon.pruning.unit_allocation`): free widths with `heads: true` and
`multiple: 1` ranked by cost are the published global selection; by weight its counterpart by price; per layer the local
one.

Coefficients can be negative: sub-models without the unit were better. They are neither shifted nor cut off: either
would change which of two units goes first, or how neurons are traded for key/value groups. Negative costs cannot make a
round remove more than it is asked for, because widths are taken no further than the budget needs.

Frozen units come last and cost +∞. Of equal coefficients the unit with the lower prior goes first.

Reference: Dery et al. 2024, section 3.4, and their code.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from surgeon.bonsai.sampling import Candidates

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class RankedUnits:
    """In which order the units of one sub-layer go.

    Attributes:
        order: positions among the units that live, those that go first in front, `[n_live]` int64.
        costs: in that order, `[n_live]` float64; +∞ for frozen units.
    """

    order: NDArray[np.int64]
    costs: FloatArray

    @property
    def n_frozen(self) -> int:
        """Units that stay."""
        return int(np.isinf(self.costs).sum())


def rank_units(part: Candidates, coefficients: FloatArray) -> RankedUnits:
    """Orders the units of a sub-layer.

    Args:
        part: its candidates and priors.
        coefficients: of the candidates, `[n_candidates]` float64.
    """
    costs = np.full(part.n_live, np.inf)
    costs[part.units] = coefficients
    order = np.lexsort((part.scores, costs)).astype(np.int64)
    return RankedUnits(order, costs[order])

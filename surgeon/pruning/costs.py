"""What it costs, in nats per token, to remove a row, a column or a weight of a linear.

The formulas are those of the curvature (`surgeon/curvature`); here they are put in the place of the whole linear. With
a curvature that does not know gradients the unit is another (of the squared output, or of the squared weight).

Reference: LeCun et al. 1989 (OBD); Hassibi & Stork 1992 (OBS); van der Ouderaa et al. 2024, section 3.2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from surgeon.choices import Cost
from surgeon.errors import NonFiniteError
from surgeon.pruning.live import LiveLinear

GONE = -1.0
"""Stands for the cost of a weight that is gone already; no cost is below zero."""


@dataclass(frozen=True)
class StructureCosts:
    """Costs of all rows and columns of a linear; those of removed or dead structures are 0 and not live.

    Attributes:
        rows: `[n_out]` float64, nats per token.
        columns: `[n_in]` float64, nats per token.
        live_rows: `[n_out]` bool.
        live_columns: `[n_in]` bool.
    """

    rows: Tensor
    columns: Tensor
    live_rows: Tensor
    live_columns: Tensor


def structure_costs(live: LiveLinear, cost: Cost, where: str) -> StructureCosts:
    """Costs of every live row and column of a linear.

    Args:
        live: live part of the linear and its damped curvature.
        cost: OBS or OBD.
        where: block and linear, for the error message.

    Raises:
        NonFiniteError: if a cost is not finite.
    """
    linear = live.linear
    columns = live.curvature.column_costs(live.weight, cost)[: live.n_live_columns]
    result = StructureCosts(
        rows=_scatter(live.curvature.row_costs(live.weight, cost), linear.live_rows),
        columns=_scatter(columns, linear.live_columns),
        live_rows=linear.live_rows,
        live_columns=linear.live_columns,
    )
    for side, values in (("row", result.rows), ("column", result.columns)):
        if not torch.isfinite(values).all():
            index = int((~torch.isfinite(values)).nonzero()[0])
            raise NonFiniteError(f"{where}: the cost of {side} {index} is {float(values[index])}; raise prune.damping")
    return result


def weight_costs(live: LiveLinear, cost: Cost, where: str) -> Tensor:
    """Costs of every single weight of a linear.

    Returns:
        `[n_out, n_in]` float32; `GONE` for weights that are gone already, those of dead rows and columns among them.

    Raises:
        NonFiniteError: if a cost is not finite.
    """
    costs = live.curvature.weight_costs(live.weight.float(), cost)[:, : live.n_live_columns]
    if not torch.isfinite(costs).all():
        row, column = (int(i) for i in (~torch.isfinite(costs)).nonzero()[0])
        raise NonFiniteError(
            f"{where}: the cost of weight ({row}, {column}) of the live ones is {float(costs[row, column])}; raise "
            "prune.damping"
        )
    placed = live.placed(costs, fill=GONE)
    if live.linear.live_weights is not None:
        placed.masked_fill_(~live.linear.live_weights, GONE)
    return placed


def _scatter(values: Tensor, live: Tensor) -> Tensor:
    full = torch.zeros(live.shape[0], dtype=torch.float64, device=live.device)
    full[live] = values
    return full

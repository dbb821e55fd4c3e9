"""What it costs, in nats per token, to remove a row or a column of a linear.

With ``W`` `[n_out, n_in (+ 1)]`, factors ``A``, ``G`` and their damped forms ``Â``, ``Ĝ``:

=========  =======================  ================================
structure  OBD (others fixed)       OBS (others re-optimised)
=========  =======================  ================================
row r      ``½ G_rr  w_rᵀ A w_r``   ``½ w_rᵀ A w_r / [Ĝ⁻¹]_rr``
column c   ``½ A_cc  w_cᵀ G w_c``   ``½ w_cᵀ G w_c / [Â⁻¹]_cc``
=========  =======================  ================================

Reference: LeCun et al. 1989 (OBD); Hassibi & Stork 1992 (OBS); van der Ouderaa et al. 2024, section 3.2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from surgeon.choices import Cost
from surgeon.errors import NonFiniteError
from surgeon.pruning.damped import LiveCurvature


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


def structure_costs(curvature: LiveCurvature, cost: Cost, where: str) -> StructureCosts:
    """Costs of every live row and column of a linear under its Kronecker-factored curvature.

    Args:
        curvature: live part of the linear and its damped factors.
        cost: OBS or OBD.
        where: block and linear, for the error message.

    Raises:
        NonFiniteError: if a cost is not finite.
    """
    weight, a, g = curvature.weight, curvature.activations, curvature.gradients
    row_energy = ((weight @ a.matrix) * weight).sum(dim=1)
    column_energy = ((g.matrix @ weight) * weight).sum(dim=0)
    if cost is Cost.OBS:
        row_costs = 0.5 * row_energy / g.inverse_diagonal()
        column_costs = 0.5 * column_energy / a.inverse_diagonal()
    else:
        row_costs = 0.5 * row_energy * g.matrix.diagonal()
        column_costs = 0.5 * column_energy * a.matrix.diagonal()
    linear = curvature.linear
    result = StructureCosts(
        rows=_scatter(row_costs, linear.live_rows),
        columns=_scatter(column_costs[: curvature.n_live_columns], linear.live_columns),
        live_rows=linear.live_rows,
        live_columns=linear.live_columns,
    )
    for side, values in (("row", result.rows), ("column", result.columns)):
        if not torch.isfinite(values).all():
            index = int((~torch.isfinite(values)).nonzero()[0])
            raise NonFiniteError(f"{where}: the cost of {side} {index} is {float(values[index])}; raise prune.damping")
    return result


def _scatter(values: Tensor, live: Tensor) -> Tensor:
    full = torch.zeros(live.shape[0], dtype=torch.float64, device=live.device)
    full[live] = values
    return full

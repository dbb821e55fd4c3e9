"""What can be said of a run, linear by linear: plain facts without arrays."""

from dataclasses import dataclass, field
from typing import Any

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@dataclass(frozen=True)
class LinearFacts:
    """One linear after a shot. What is not known, or has no meaning for the method, is None.

    Attributes:
        block: index.
        linear: name in its block.
        n_out: rows of the dense weight.
        n_in: its columns.
        live_rows: rows that live.
        live_columns: columns that live.
        n_live: weights that live.
        sparsity: fraction of the dense weights that are gone.
        predicted_cost: rise of the loss by this shot under the damped curvature, nats per token (with `activations` or
            `identity`: of the squared output, or of the squared weights). None where the method predicts none, and in a
            block that is gone whole.
        update_size: Frobenius norm of the change of what was kept over that of all live weights (and biases) before
            the shot; 0 where they were left as they are.
        correction_size: the same of what trained adapters changed after it; None without them.
        iterations: of conjugate gradients.
        residual: at which they ended, relative.
        converged: whether that is within prune.tolerance.
    """

    block: int
    linear: str
    n_out: int
    n_in: int
    live_rows: int | None
    live_columns: int | None
    n_live: int
    sparsity: float
    predicted_cost: float | None
    update_size: float | None
    correction_size: float | None = None
    iterations: int | None = None
    residual: float | None = None
    converged: bool | None = None


@dataclass(frozen=True)
class DampingFacts:
    """Relative damping of one linear in the last shot: multiples of the mean of the diagonal of a factor.

    Attributes:
        block: index.
        linear: name in its block.
        activations: in force; 0 where nothing is inverted, None where the linear has no such factor.
        gradients: likewise.
        escalations: how often it had to be multiplied by ten before the costs could be computed; None where costs
            need no damping. `activations` and `gradients` are those after it.
    """

    block: int
    linear: str
    activations: float | None
    gradients: float | None
    escalations: int | None


@dataclass(frozen=True)
class CostSummary:
    """Costs of the candidates of one kind in one block, as they were compared in a shot.

    Attributes:
        shot: from 1.
        block: index.
        of: what the candidates are, see `flows.cost_samples.Sample`.
        unit: "cost" (nats per token) or "cost per weight".
        count: candidates that lived before the shot.
        n_gone: those of them that went.
        minimum: least value; None if there are no candidates.
        quantiles: value by fraction, for `QUANTILES`.
        maximum: largest value.
        largest_gone: largest value of what went; None if nothing did.
        threshold: of the mask, in the same unit, where one number separates what went from what stayed.
    """

    shot: int
    block: int
    of: str
    unit: str
    count: int
    n_gone: int
    minimum: float | None
    quantiles: dict[float, float]
    maximum: float | None
    largest_gone: float | None
    threshold: float | None


@dataclass(frozen=True)
class MaskFacts:
    """How one shot chose what goes.

    Attributes:
        shot: from 1.
        parameters: target, structure, ranking, allocation; for units also widths, multiple, heads and usage.
        threshold: what the dearest removal cost, by the ranking; None for equal widths, which have none.
        n_removed: units, rows and columns, or weights that went.
        predicted_cost: sum of their costs.
        sparsity: of all decoder linears after it.
        kept: for units, how many each block keeps, by sub-layer ("mlp", "attention").
    """

    shot: int
    parameters: dict[str, Any]
    threshold: float | None
    n_removed: int
    predicted_cost: float
    sparsity: float
    kept: dict[str, list[int]] | None


@dataclass(frozen=True)
class Anatomy:
    """What a run did.

    Attributes:
        shots: number of shots.
        linears: after the last shot, in module order.
        dampings: in the last shot.
        masks: of all shots; none for a method that chooses as it goes (sparsegpt).
        costs: of all shots and blocks, as far as their arrays are there.
        missing: what cannot be said because arrays were dropped, as sentences.
        removed: indices of blocks that are gone whole.
    """

    shots: int
    linears: list[LinearFacts]
    dampings: list[DampingFacts]
    masks: list[MaskFacts] = field(default_factory=list)
    costs: list[CostSummary] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    removed: list[int] = field(default_factory=list)

"""The view of a run: what its shots did to the model, by kind of linear and by block."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flows.anatomy import read_anatomy, shot_linears
from flows.anatomy_facts import Anatomy, LinearFacts
from flows.cost_samples import block_shapes
from flows.inspection.opening import choose_shot, open_store, read_manifest
from flows.shot import shot_label
from flows.workspace import Workspace


@dataclass(frozen=True)
class Totals:
    """Several linears together; what no linear has is None.

    Attributes:
        n_weights: of the dense linears.
        n_live: weights that live.
        sparsity: fraction that is gone.
        predicted_cost: sum, nats per token; None if no linear has one.
        update_size: smallest and largest.
        correction_size: smallest and largest.
        solved: linears whose update was found by conjugate gradients.
        not_converged: those of them that did not reach prune.tolerance.
        worst_residual: of those that were solved.
    """

    n_weights: int
    n_live: int
    sparsity: float
    predicted_cost: float | None
    update_size: tuple[float, float] | None
    correction_size: tuple[float, float] | None
    solved: int
    not_converged: int
    worst_residual: float | None


@dataclass(frozen=True)
class RunView:
    """What `surgeon inspect` shows of a run.

    Attributes:
        shot: whose state it is.
        anatomy: all facts.
        shots: by shot, its linears together.
        kinds: by name of linear, those of all blocks together.
        blocks: by block.
    """

    shot: int
    anatomy: Anatomy
    shots: dict[int, Totals]
    kinds: dict[str, Totals]
    blocks: dict[int, Totals]

    def to_json(self) -> dict[str, Any]:
        """Everything, for scripts (docs/inspecting.md)."""
        return asdict(self)


def inspect_run(workspace: Workspace, shot: int | None) -> RunView:
    """What a run did up to a shot (default: the last).

    Raises:
        InputError: no run yet, or no such shot.
    """
    references, store = read_manifest(workspace), open_store(workspace)
    shot = choose_shot(references, shot)
    anatomy = read_anatomy(store, references, shot)
    linears = anatomy.linears
    shots = {
        number: total(shot_linears(store, references, number, block_shapes(references, shot_label(number)), []))
        for number in range(1, shot + 1)
    }
    return RunView(
        shot=shot,
        anatomy=anatomy,
        shots=shots,
        kinds={name: total([f for f in linears if f.linear == name]) for name in linear_names(anatomy)},
        blocks={b: total([f for f in linears if f.block == b]) for b in dict.fromkeys(f.block for f in linears)},
    )


def linear_names(anatomy: Anatomy) -> list[str]:
    """Names of the linears of all blocks, in module order."""
    return list(dict.fromkeys(facts.linear for facts in anatomy.linears))


def total(linears: Sequence[LinearFacts]) -> Totals:
    """Puts linears together."""
    n_weights, n_live = sum(f.n_out * f.n_in for f in linears), sum(f.n_live for f in linears)
    costs = [f.predicted_cost for f in linears if f.predicted_cost is not None]
    residuals = [f.residual for f in linears if f.residual is not None]
    return Totals(
        n_weights=n_weights,
        n_live=n_live,
        sparsity=1.0 - n_live / n_weights,
        predicted_cost=sum(costs) if costs else None,
        update_size=_range(f.update_size for f in linears),
        correction_size=_range(f.correction_size for f in linears),
        solved=len(residuals),
        not_converged=sum(f.converged is False for f in linears),
        worst_residual=max(residuals, default=None),
    )


def _range(values: Iterable[float | None]) -> tuple[float, float] | None:
    known = [value for value in values if value is not None]
    return (min(known), max(known)) if known else None

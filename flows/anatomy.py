"""What a run did to a model, linear by linear: read from what its results say of themselves. Computes no results."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flows.cost_samples import MaskReader, Sample, block_shapes
from flows.shot import shot_label
from surgeon.errors import InputError
from surgeon.store import Reference, Store
from tasks.context import LinearShape, split_columns, split_rows

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
            `identity`: of the squared output, or of the squared weights).
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
    predicted_cost: float
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
    """

    shots: int
    linears: list[LinearFacts]
    dampings: list[DampingFacts]
    masks: list[MaskFacts] = field(default_factory=list)
    costs: list[CostSummary] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def read_anatomy(store: Store, references: Mapping[str, Reference], shots: int) -> Anatomy:
    """Reads what a finished run did to each linear.

    Args:
        store: with its objects.
        references: of data/manifest.json, by readable name.
        shots: number of shots; linears and dampings are those of the last.

    Raises:
        InputError: the last shot is not in the references.
    """
    last = shot_label(shots)
    blocks = block_shapes(references, last)
    if not blocks:
        raise InputError(f"there are no updates of {last} among the {len(references)} results of the run")
    anatomy = Anatomy(shots, [], [])
    for block, shapes in enumerate(blocks):
        anatomy.linears.extend(linear_facts(store, references, shots, block, shapes, anatomy.missing))
        anatomy.dampings.extend(damping_facts(store, references, shots, block, shapes))
    for shot in range(1, shots + 1):
        _read_costs(store, references, shot, blocks, anatomy)
    return anatomy


def block_costs(store: Store, references: Mapping[str, Reference], shot: int, block: int) -> list[Sample] | None:
    """Candidates of one block in one shot; None where costs were dropped or the method has none."""
    mask = references.get(f"{shot_label(shot)}/mask")
    costs = references.get(f"{shot_label(shot)}/block-{block:02d}/costs")
    if mask is None or costs is None or not (store.has_payload(costs.key) and store.has_payload(mask.key)):
        return None
    reader = MaskReader(store, mask, block_shapes(references, shot_label(shot)))
    return list(reader.samples(block, store.open(costs.key)))


def summarise(shot: int, block: int, samples: Iterable[Sample]) -> list[CostSummary]:
    """One summary for each kind of candidate; those of all linears are put together."""
    kinds: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        kinds.setdefault((sample.of, sample.unit), []).append(sample)
    return [_summary(shot, block, of, unit, mine) for (of, unit), mine in kinds.items()]


def _summary(shot: int, block: int, of: str, unit: str, samples: list[Sample]) -> CostSummary:
    values: NDArray[Any] = np.concatenate([sample.values for sample in samples])
    gone = np.concatenate([sample.gone for sample in samples])
    thresholds = {sample.threshold for sample in samples}
    some = values.size > 0
    return CostSummary(
        shot=shot,
        block=block,
        of=of,
        unit=unit,
        count=int(values.size),
        n_gone=int(gone.sum()),
        minimum=float(values.min()) if some else None,
        quantiles=dict(zip(QUANTILES, np.quantile(values, QUANTILES).tolist(), strict=True)) if some else {},
        maximum=float(values.max()) if some else None,
        largest_gone=float(values[gone].max()) if gone.any() else None,
        threshold=thresholds.pop() if len(thresholds) == 1 else None,
    )


def linear_facts(
    store: Store,
    references: Mapping[str, Reference],
    shot: int,
    block: int,
    shapes: tuple[LinearShape, ...],
    missing: list[str],
) -> list[LinearFacts]:
    """The linears of one block after a shot; what cannot be said is added to ``missing``."""
    place = f"{shot_label(shot)}/block-{block:02d}"
    final = references.get(f"{place}/correction") or references[f"{place}/update"]
    rows: list[int | None] = [None] * len(shapes)
    columns: list[int | None] = [None] * len(shapes)
    if store.has_payload(final.key):
        stored = store.open(final.key)
        rows = [int(live.sum()) for live in split_rows(shapes, stored.array("live_rows"))]
        columns = [int(live.sum()) for live in split_columns(shapes, stored.array("live_columns"))]
    else:
        missing.append(f"live rows and columns of {place}: its weights are not in the store")
    found = []
    for shape, n_rows, n_columns in zip(shapes, rows, columns, strict=True):
        facts = final.attributes["linears"][shape.name]
        names = ("n_live", "sparsity", "predicted_cost")
        solved = {name: facts.get(name) for name in ("iterations", "residual", "converged")}
        found.append(
            LinearFacts(
                block=block,
                linear=shape.name,
                n_out=shape.n_out,
                n_in=shape.n_in,
                live_rows=n_rows,
                live_columns=n_columns,
                **{name: facts[name] for name in names},
                update_size=facts.get("relative_change"),
                correction_size=facts.get("correction_size"),
                **solved,
            )
        )
    return found


def damping_facts(
    store: Store, references: Mapping[str, Reference], shot: int, block: int, shapes: tuple[LinearShape, ...]
) -> list[DampingFacts]:
    """The damping of the linears of one block in a shot."""
    place = f"{shot_label(shot)}/block-{block:02d}"
    asked = store.parameters(references[f"{place}/update"].key)
    costs = references.get(f"{place}/costs")
    facts = costs.attributes["linears"] if costs is not None else {}
    # Units are paid for by one linear of each sub-layer; the others are inverted only for a Newton step.
    every = not facts or asked["newton_step"]
    found = []
    for shape in shapes:
        mine = facts.get(shape.name, {} if every else {"damping": (None, None)})
        used = [
            None if a is None else u
            for a, u in zip(asked["damping"], mine.get("damping", asked["damping"]), strict=True)
        ]
        found.append(DampingFacts(block, shape.name, used[0], used[1], mine.get("escalations")))
    return found


def _read_costs(
    store: Store,
    references: Mapping[str, Reference],
    shot: int,
    blocks: list[tuple[LinearShape, ...]],
    anatomy: Anatomy,
) -> None:
    label = shot_label(shot)
    mask = references.get(f"{label}/mask")
    if mask is None:
        return
    reader = MaskReader(store, mask, blocks)
    facts = mask.attributes
    anatomy.masks.append(
        MaskFacts(
            shot=shot,
            parameters=reader.parameters,
            threshold=facts["threshold"],
            n_removed=facts["n_removed"],
            predicted_cost=facts["predicted_cost"],
            sparsity=facts["sparsity"],
            kept=facts.get("kept"),
        )
    )
    dropped = []
    for block in range(len(blocks)):
        costs = references.get(f"{label}/block-{block:02d}/costs")
        if costs is None or not (store.has_payload(costs.key) and store.has_payload(mask.key)):
            dropped.append(block)
        else:
            anatomy.costs.extend(summarise(shot, block, reader.samples(block, store.open(costs.key))))
    if dropped:
        anatomy.missing.append(
            f"costs of {label}, {len(dropped)} of {len(blocks)} blocks: dropped by run.keep, or the run was changed"
        )

"""What a run did to a model, linear by linear: read from what its results say of themselves. Computes no results."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flows.anatomy_facts import QUANTILES, Anatomy, CostSummary, DampingFacts, LinearFacts, MaskFacts
from flows.cost_samples import MaskReader, Sample, block_shapes
from flows.shot import shot_label
from surgeon.errors import InputError
from surgeon.store import Reference, Store
from tasks.context import LinearShape, ModelState, split_columns, split_rows


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
        raise InputError(f"there is no record of {last} among the {len(references)} results of the run")
    anatomy = Anatomy(shots, [], [], removed=list(state_after(references, shots).removed))
    anatomy.linears.extend(shot_linears(store, references, shots, blocks, anatomy.missing))
    for block, shapes in enumerate(blocks):
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


def shot_linears(
    store: Store,
    references: Mapping[str, Reference],
    shot: int,
    blocks: Sequence[tuple[LinearShape, ...]],
    missing: list[str],
) -> list[LinearFacts]:
    """The linears of all blocks after a shot; what cannot be said is added to ``missing``."""
    return [
        facts
        for block, shapes in enumerate(blocks)
        for facts in linear_facts(store, references, shot, block, shapes, missing)
    ]


def linear_facts(
    store: Store,
    references: Mapping[str, Reference],
    shot: int,
    block: int,
    shapes: tuple[LinearShape, ...],
    missing: list[str],
) -> list[LinearFacts]:
    """The linears of one block after a shot; what cannot be said is added to ``missing``."""
    state = state_after(references, shot)
    update = state.update_of(block)
    if block in state.removed or update is None:
        return [_whole_linear(block, shape, is_gone=block in state.removed) for shape in shapes]
    final = store.lookup(update.key)
    if final is None:
        raise InputError(
            f"the weights of block {block} after shot {shot} are not in the store: run `surgeon prune` again"
        )
    place = f"{shot_label(shot)}/block-{block:02d}"
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
        names = ("n_live", "sparsity")
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
                predicted_cost=facts.get("predicted_cost"),
                update_size=facts.get("relative_change"),
                correction_size=facts.get("correction_size"),
                **solved,
            )
        )
    return found


def state_after(references: Mapping[str, Reference], shot: int) -> ModelState:
    """The state after a shot, from its record (without the digest of the checkpoint)."""
    return ModelState.from_json("", references[f"{shot_label(shot)}/shot"].attributes["state"])


def _whole_linear(block: int, shape: LinearShape, *, is_gone: bool) -> LinearFacts:
    """A linear of a block that is gone whole, or that is as in the checkpoint."""
    left = 0 if is_gone else 1
    return LinearFacts(
        block=block,
        linear=shape.name,
        n_out=shape.n_out,
        n_in=shape.n_in,
        live_rows=left * shape.n_out,
        live_columns=left * shape.n_in,
        n_live=left * shape.n_weights,
        sparsity=1.0 - left,
        predicted_cost=None,
        update_size=None,
    )


def damping_facts(
    store: Store, references: Mapping[str, Reference], shot: int, block: int, shapes: tuple[LinearShape, ...]
) -> list[DampingFacts]:
    """The damping of the linears of one block in a shot; of a method that inverts nothing there is none."""
    place = f"{shot_label(shot)}/block-{block:02d}"
    update = references.get(f"{place}/update")
    asked = {} if update is None else store.parameters(update.key)
    if "damping" not in asked:
        return [DampingFacts(block, shape.name, None, None, None) for shape in shapes]
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

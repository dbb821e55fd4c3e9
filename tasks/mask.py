"""What goes from every linear of the model: one threshold over the costs of all blocks, or one for each linear."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from surgeon.choices import Structure
from surgeon.pruning.allocation import Candidates, allocate
from surgeon.pruning.granularity import is_structured
from surgeon.pruning.selection import Cut, check_divides, select_weights
from surgeon.store import Reference, digest_arrays
from tasks.context import Context, LinearShape, split_columns, split_rows
from tasks.progress import report
from tasks.rule import MaskRule
from tasks.stage import Outcome, Product, Request, Stage, produce, read_arrays
from tasks.units import unit_masks

Array = NDArray[Any]
_SOURCES = (
    "surgeon.pruning.allocation",
    "surgeon.pruning.selection",
    "surgeon.pruning.unit_allocation",
    "surgeon.pruning.units",
    "tasks.rule",
    "tasks.units",
)
MASK = Stage("mask", 3, _SOURCES)


def mask_request(costs: Sequence[Reference], rule: MaskRule, label: str) -> Request:
    """The request for the mask of all blocks."""
    parameters: dict[str, Any] = {
        "target": rule.target,
        "structure": str(rule.recipe.granularity),
        "ranking": rule.recipe.ranking if is_structured(rule.recipe.granularity) else None,
        "allocation": rule.recipe.allocation,
    }
    if (units := rule.recipe.units) is not None:
        parameters |= {
            "widths": units.widths,
            "multiple": units.multiple,
            "heads": units.heads,
            "usage": rule.usage.parameters,
        }
    return Request(
        MASK,
        parameters,
        {"costs": [reference.digest for reference in costs]},
        f"{label}/mask",
    )


def mask_task(context: Context, costs: Sequence[Reference], rule: MaskRule, label: str) -> Outcome[Reference]:
    """What stays in every linear of the model.

    For rows and columns: live sets. For weights: where the costs of each linear are cut, from which the mask follows.
    """

    def compute() -> Product:
        if rule.recipe.units is not None:
            return Product(*unit_masks(context, costs, rule))
        if isinstance(rule.recipe.granularity, Structure) and is_structured(rule.recipe.granularity):
            return _structures(context, costs, rule, rule.recipe.granularity)
        return _weights(context, costs, rule)

    report(f"{label}: mask", 0, 1)
    return produce(context, mask_request(costs, rule, label), compute)


def block_masks(context: Context, block: int, mask: Reference) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Live rows and columns of the linears of one block, cut out of the mask of all blocks."""
    arrays = read_arrays(context, mask.key)
    before = [shape for shapes in context.model.blocks[:block] for shape in shapes]
    row, column = sum(s.n_out for s in before), sum(s.n_in for s in before)
    result = {}
    for shape in context.model.blocks[block]:
        rows = torch.from_numpy(arrays["live_rows"][row : row + shape.n_out]).to(context.place)
        columns = torch.from_numpy(arrays["live_columns"][column : column + shape.n_in]).to(context.place)
        result[shape.name] = (rows, columns)
        row, column = row + shape.n_out, column + shape.n_in
    return result


def block_cuts(context: Context, block: int, mask: Reference) -> dict[str, Cut]:
    """Where the costs of the linears of one block are cut."""
    arrays = read_arrays(context, mask.key)
    first = sum(len(shapes) for shapes in context.model.blocks[:block])
    return {
        shape.name: Cut(*(arrays[part][first + i].item() for part in ("threshold", "n_ties", "per_row")))
        for i, shape in enumerate(context.model.blocks[block])
    }


def _structures(context: Context, costs: Sequence[Reference], rule: MaskRule, structure: Structure) -> Product:
    candidates: list[Candidates] = []
    for block, reference in enumerate(costs):
        candidates += _candidates(block, context.model.blocks[block], read_arrays(context, reference.key))
    allocation = allocate(candidates, rule.target, structure, rule.recipe.ranking, rule.recipe.allocation)
    masks = zip(allocation.live_rows, allocation.live_columns, strict=True)
    blocks: list[str] = []
    for shapes in context.model.blocks:
        mine = [next(masks) for _ in shapes]
        parts = {"rows": np.concatenate([m[0] for m in mine]), "columns": np.concatenate([m[1] for m in mine])}
        blocks.append(digest_arrays(parts, {}))
    return Product(
        {"live_rows": np.concatenate(allocation.live_rows), "live_columns": np.concatenate(allocation.live_columns)},
        {
            "sparsity": allocation.sparsity,
            "threshold": allocation.threshold,
            "predicted_cost": allocation.predicted_cost,
            "n_removed": allocation.n_removed,
            "blocks": blocks,
        },
    )


def _weights(context: Context, costs: Sequence[Reference], rule: MaskRule) -> Product:
    store = context.store.open()
    for block, shapes in enumerate(context.model.blocks):
        for shape in shapes:
            check_divides(shape.n_in, rule.recipe.granularity, f"block {block}, {shape.name}")

    def read() -> Iterable[NDArray[np.float32]]:
        for shapes, reference in zip(context.model.blocks, costs, strict=True):
            stored = store.open(reference.key)
            for shape in shapes:
                yield stored.array(f"{shape.name}/costs")

    selection = select_weights(read, rule.target, rule.recipe.granularity, rule.recipe.allocation)
    arrays: dict[str, Array] = {
        "threshold": np.array([cut.threshold for cut in selection.cuts], dtype=np.float32),
        "n_ties": np.array([cut.n_ties for cut in selection.cuts], dtype=np.int64),
        "per_row": np.array([cut.per_row for cut in selection.cuts], dtype=np.int64),
    }
    blocks, first = [], 0
    for shapes, reference in zip(context.model.blocks, costs, strict=True):
        mine = {name: values[first : first + len(shapes)] for name, values in arrays.items()}
        blocks.append(digest_arrays(mine, {"costs": reference.digest}))
        first += len(shapes)
    return Product(
        arrays,
        {
            "sparsity": selection.sparsity,
            "threshold": selection.threshold,
            "predicted_cost": selection.predicted_cost,
            "n_removed": selection.n_removed,
            "blocks": blocks,
        },
    )


def _candidates(block: int, shapes: tuple[LinearShape, ...], arrays: dict[str, Array]) -> list[Candidates]:
    return [
        Candidates(f"block {block}, {shape.name}", *parts)
        for shape, *parts in zip(
            shapes,
            split_rows(shapes, arrays["row_costs"]),
            split_columns(shapes, arrays["column_costs"]),
            split_rows(shapes, arrays["live_rows"]),
            split_columns(shapes, arrays["live_columns"]),
            strict=True,
        )
    ]

"""Weights, biases and live sets of the linears of one block after a shot."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from surgeon.choices import Structure, UpdateRule
from surgeon.pruning.granularity import is_structured
from surgeon.pruning.linear import PrunedLinear
from surgeon.pruning.live import live_linear
from surgeon.pruning.selection import weights_that_stay
from surgeon.pruning.sequential import update_sequentially
from surgeon.pruning.structure_update import update_structures
from surgeon.pruning.weight_update import UpdateResult, update_weights
from surgeon.store import Reference
from surgeon.transfer import to_host
from tasks.context import Context
from tasks.costs import LIVE_SOURCES, BlockWork, damping_parameters
from tasks.curvature import read_statistics
from tasks.mask import block_cuts, block_masks
from tasks.progress import report
from tasks.stage import Outcome, Product, Request, Stage, produce
from tasks.weights import packed_live, read_linears

Array = NDArray[Any]
UPDATE = Stage(
    "update",
    3,
    (
        *LIVE_SOURCES,
        "surgeon.curvature.groups",
        "surgeon.pruning.conjugate",
        "surgeon.pruning.selection",
        "surgeon.pruning.sequential",
        "surgeon.pruning.structure_update",
        "surgeon.pruning.weight_update",
    ),
)


@dataclass(frozen=True)
class Removal:
    """What goes from a block.

    Attributes:
        target: fraction of all weights to be gone; what a rule that chooses as it goes is told.
        costs: of the block, where a mask was made from costs of single weights.
        mask: of all blocks; None where the rule chooses as it goes.
    """

    target: float
    costs: Reference | None = None
    mask: Reference | None = None


def update_request(work: BlockWork, removal: Removal) -> Request:
    """The request for the updated weights of one block; it depends on that block's part of the mask only."""
    recipe, mask = work.recipe, removal.mask
    update = recipe.update
    parameters: dict[str, Any] = {
        "block": work.block,
        "curvature": recipe.curvature.kind,
        "update": update.rule,
        "damping": damping_parameters(recipe),
        "max_iterations": update.max_iterations,
        "tolerance": update.tolerance,
        "max_correlate": update.max_correlate,
        "newton_step": update.newton_step,
    }
    inputs = dict(work.inputs)
    if mask is None:
        parameters |= {"target": removal.target, "structure": str(recipe.granularity)}
    else:
        inputs["mask"] = mask.attributes["blocks"][work.block]
    return Request(UPDATE, parameters, inputs, work.name("update"))


def update_task(context: Context, work: BlockWork, removal: Removal) -> Outcome[Reference]:
    """Weights, biases and live sets of the linears of one block after the shot."""

    def compute() -> Product:
        how = _weights
        if work.recipe.update.rule is UpdateRule.SEQUENTIAL:
            how = _sequential
        elif is_structured(work.recipe.granularity):
            how = _structures
        # Handed over without a name here, so that what is replaced is freed.
        return update_product(how(context, work, removal, read_linears(context, work.state, work.block)))

    report(f"{work.label}: update", work.block, context.model.n_blocks)
    return produce(context, update_request(work, removal), compute)


def _structures(
    context: Context, work: BlockWork, removal: Removal, linears: Mapping[str, PrunedLinear]
) -> dict[str, UpdateResult]:
    assert removal.mask is not None, "rows and columns go by a mask"
    masks = block_masks(context, work.block, removal.mask)
    if work.recipe.granularity is Structure.UNITS:
        linears = _without_rows(linears, masks)
    changed = [
        name
        for name, linear in linears.items()
        if work.recipe.update.newton_step
        or not (torch.equal(linear.live_rows, masks[name][0]) and torch.equal(linear.live_columns, masks[name][1]))
    ]
    results = {name: UpdateResult(linear, 0.0, 0.0) for name, linear in linears.items()}
    for name, factors in read_statistics(context, work.statistics, changed):
        where, recipe = f"block {work.block}, {name}", work.recipe
        live = live_linear(linears[name], factors, recipe.curvature.kind, recipe.damping, where)
        results[name] = update_structures(live, *masks[name], recipe.update, where)
    return results


def _without_rows(
    linears: Mapping[str, PrunedLinear], masks: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> dict[str, PrunedLinear]:
    """Linears of which the rows of removed units are gone: nothing reads them, so nothing has to make up for them."""
    return {name: linear.restricted(masks[name][0], linear.live_columns) for name, linear in linears.items()}


def _weights(
    context: Context, work: BlockWork, removal: Removal, linears: Mapping[str, PrunedLinear]
) -> dict[str, UpdateResult]:
    assert removal.mask is not None and removal.costs is not None, "weights go by a mask made from their costs"
    cuts = block_cuts(context, work.block, removal.mask)
    costs = context.store.open().open(removal.costs.key)
    results = {}
    for name, factors in read_statistics(context, work.statistics, list(linears)):
        where, recipe = f"block {work.block}, {name}", work.recipe
        values = torch.from_numpy(costs.array(f"{name}/costs")).to(context.place)
        keep = weights_that_stay(values, recipe.granularity, cuts[name])
        live = live_linear(linears[name], factors, recipe.curvature.kind, recipe.damping, where, torch.float32)
        results[name] = update_weights(live, keep, recipe.update, where)
    return results


def _sequential(
    context: Context, work: BlockWork, removal: Removal, linears: Mapping[str, PrunedLinear]
) -> dict[str, UpdateResult]:
    recipe = work.recipe
    results = {}
    for name, factors in read_statistics(context, work.statistics, list(linears)):
        where = f"block {work.block}, {name}"
        live = live_linear(linears[name], factors, recipe.curvature.kind, recipe.damping, where, torch.float32)
        width = recipe.update.max_correlate
        results[name] = update_sequentially(live, removal.target, recipe.granularity, width, where)
    return results


def update_product(results: Mapping[str, UpdateResult]) -> Product:
    """Weights, biases and live sets of a block, with facts by linear; `results` in module order."""
    arrays: dict[str, Array] = {}
    facts = {}
    for name, result in results.items():
        linear = result.linear
        arrays[f"{name}/weight"] = to_host(linear.weight)
        if linear.bias is not None:
            arrays[f"{name}/bias"] = to_host(linear.bias)
        if linear.live_weights is not None:
            arrays[f"{name}/live"] = packed_live(linear.live_weights)
        fact: dict[str, Any] = {
            "sparsity": 1.0 - linear.n_live_weights / linear.n_weights,
            "n_live": linear.n_live_weights,
            "predicted_cost": result.predicted_cost,
            "relative_change": result.relative_change,
        }
        if result.convergence is not None:
            fact["iterations"] = result.convergence.iterations
            fact["residual"] = result.convergence.residual
            fact["converged"] = result.convergence.reached
        facts[name] = fact
    for part in ("live_rows", "live_columns"):
        vectors = [getattr(result.linear, part) for result in results.values()]
        arrays[part] = np.asarray(torch.cat(vectors).cpu().numpy())
    return Product(arrays, {"linears": facts, "order": list(results)})

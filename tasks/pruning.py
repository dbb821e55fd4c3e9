"""Costs and updates of one block, and the mask of all blocks.

Vectors over the rows (columns) of several linears are stored one after the other, in module order.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from surgeon.choices import Cost, Ranking, Structure, UpdateRule
from surgeon.curvature.factors import BlockFactors
from surgeon.pruning.allocation import Candidates, allocate
from surgeon.pruning.costs import structure_costs
from surgeon.pruning.damped import Damping, live_curvature
from surgeon.pruning.linear import PrunedLinear
from surgeon.pruning.update import UpdateResult, update_linear
from surgeon.store import Reference, Store, digest_arrays
from tasks.context import Context, LinearShape, ModelState
from tasks.progress import report
from tasks.stage import Outcome, Product, Request, Stage, produce, read_arrays
from tasks.weights import read_linears

Array = NDArray[Any]
_DAMPED = ("surgeon.curvature.factors", "surgeon.pruning.damped", "surgeon.pruning.linear")
COSTS = Stage("costs", 1, (*_DAMPED, "surgeon.pruning.costs"))
MASK = Stage("mask", 1, ("surgeon.pruning.allocation",))
UPDATE = Stage("update", 1, (*_DAMPED, "surgeon.pruning.update"))


@dataclass(frozen=True)
class MaskRule:
    """How the mask of a shot is chosen."""

    target: float
    structure: Structure
    ranking: Ranking


def read_factors(context: Context, reference: Reference, linears: Collection[str]) -> BlockFactors:
    """Factors of some linears of one block from the store, symmetric float32."""
    stored = Store(context.store).open(reference.key)
    reads = {name: source for name, source in stored.attributes["reads"].items() if name in linears}
    sources = dict.fromkeys(reads.values())
    on = context.device
    return BlockFactors(
        activations={name: torch.from_numpy(stored.array(f"{name}/A")).to(on) for name in sources},
        mean_inputs={name: torch.from_numpy(stored.array(f"{name}/mean_input")).to(on) for name in sources},
        gradients={name: torch.from_numpy(stored.array(f"{name}/G")).to(on) for name in reads},
        reads=reads,
        n_tokens=int(stored.attributes["n_tokens"]),
    )


def cost_request(
    state: ModelState, block: int, factors: Reference, damping: Damping, cost: Cost, label: str
) -> Request:
    """The request for the costs of one block."""
    return Request(
        COSTS,
        {"block": block, "damping": [damping.activations, damping.gradients], "cost": cost},
        {"weights": state.block_digest(block), "factors": factors.digest},
        f"{label}/block-{block:02d}/costs",
    )


def cost_task(
    context: Context, state: ModelState, block: int, factors: Reference, damping: Damping, cost: Cost, label: str
) -> Outcome[Reference]:
    """Costs of all rows and columns of the linears of one block."""

    def compute() -> Product:
        linears = read_linears(context, state, block)
        block_factors = read_factors(context, factors, linears)
        parts: dict[str, list[torch.Tensor]] = {
            n: [] for n in ("row_costs", "column_costs", "live_rows", "live_columns")
        }
        facts = {}
        for name, linear in linears.items():
            where = f"block {block}, {name}"
            curvature = live_curvature(linear, block_factors.linear(name), damping, where)
            costs = structure_costs(curvature, cost, where)
            values = (costs.rows, costs.columns, costs.live_rows, costs.live_columns)
            for part, value in zip(parts.values(), values, strict=True):
                part.append(value)
            facts[name] = {
                "dead_rows": curvature.n_dead_rows,
                "dead_columns": curvature.n_dead_columns,
                "damping": [curvature.activations.damping, curvature.gradients.damping],
                "escalations": curvature.activations.escalations + curvature.gradients.escalations,
            }
        return Product({n: torch.cat(part).cpu().numpy() for n, part in parts.items()}, {"linears": facts})

    report(f"{label}: costs", block, context.model.n_blocks)
    return produce(context, cost_request(state, block, factors, damping, cost, label), compute)


def mask_request(costs: list[Reference], rule: MaskRule, label: str) -> Request:
    """The request for the mask of all blocks."""
    return Request(
        MASK,
        {"target": rule.target, "structure": rule.structure, "ranking": rule.ranking},
        {"costs": [reference.digest for reference in costs]},
        f"{label}/mask",
    )


def mask_task(context: Context, costs: list[Reference], rule: MaskRule, label: str) -> Outcome[Reference]:
    """What stays in every linear of the model: one threshold over all costs."""

    def compute() -> Product:
        candidates: list[Candidates] = []
        for block, reference in enumerate(costs):
            candidates += _candidates(block, context.model.blocks[block], read_arrays(context, reference.key))
        allocation = allocate(candidates, rule.target, rule.structure, rule.ranking)
        masks = zip(allocation.live_rows, allocation.live_columns, strict=True)
        blocks: list[str] = []
        for shapes in context.model.blocks:
            mine = [next(masks) for _ in shapes]
            blocks.append(
                digest_arrays(
                    {"rows": np.concatenate([m[0] for m in mine]), "columns": np.concatenate([m[1] for m in mine])}, {}
                )
            )
        return Product(
            {
                "live_rows": np.concatenate(allocation.live_rows),
                "live_columns": np.concatenate(allocation.live_columns),
            },
            {
                "sparsity": allocation.sparsity,
                "threshold": allocation.threshold,
                "predicted_cost": allocation.predicted_cost,
                "n_removed": allocation.n_removed,
                "blocks": blocks,
            },
        )

    return produce(context, mask_request(costs, rule, label), compute)


def update_request(
    state: ModelState, block: int, factors: Reference, mask: Reference, damping: Damping, rule: UpdateRule, label: str
) -> Request:
    """The request for the updated weights of one block; it depends on that block's part of the mask only."""
    return Request(
        UPDATE,
        {"block": block, "damping": [damping.activations, damping.gradients], "update": rule},
        {"weights": state.block_digest(block), "factors": factors.digest, "mask": mask.attributes["blocks"][block]},
        f"{label}/block-{block:02d}/update",
    )


def update_task(
    context: Context,
    state: ModelState,
    block: int,
    factors: Reference,
    mask: Reference,
    damping: Damping,
    rule: UpdateRule,
    label: str,
) -> Outcome[Reference]:
    """Weights, biases and live sets of the linears of one block after the shot."""

    def compute() -> Product:
        live = _block_masks(context, block, read_arrays(context, mask.key))
        linears = read_linears(context, state, block)
        changed = [name for name, linear in linears.items() if not _keeps_all(linear, *live[name])]
        block_factors = read_factors(context, factors, changed)
        results = {}
        for name, linear in linears.items():
            where = f"block {block}, {name}"
            if name in changed:
                curvature = live_curvature(linear, block_factors.linear(name), damping, where)
                results[name] = update_linear(curvature, *live[name], rule, where)
            else:
                results[name] = UpdateResult(linear, predicted_cost=0.0, relative_change=0.0)
        return _update_product(results)

    report(f"{label}: update", block, context.model.n_blocks)
    return produce(context, update_request(state, block, factors, mask, damping, rule, label), compute)


def _keeps_all(linear: PrunedLinear, live_rows: torch.Tensor, live_columns: torch.Tensor) -> bool:
    return bool((linear.live_rows == live_rows).all() and (linear.live_columns == live_columns).all())


def _update_product(results: dict[str, UpdateResult]) -> Product:
    arrays: dict[str, Array] = {}
    facts = {}
    for name, result in results.items():
        linear = result.linear
        arrays[f"{name}/weight"] = linear.weight.cpu().numpy()
        if linear.bias is not None:
            arrays[f"{name}/bias"] = linear.bias.cpu().numpy()
        facts[name] = {
            "sparsity": 1.0 - linear.n_live_weights / linear.n_weights,
            "predicted_cost": result.predicted_cost,
            "relative_change": result.relative_change,
        }
    arrays["live_rows"] = torch.cat([r.linear.live_rows for r in results.values()]).cpu().numpy()
    arrays["live_columns"] = torch.cat([r.linear.live_columns for r in results.values()]).cpu().numpy()
    return Product(arrays, {"linears": facts, "order": list(results)})


def _candidates(block: int, shapes: tuple[LinearShape, ...], arrays: dict[str, Array]) -> list[Candidates]:
    rows = np.cumsum([s.n_out for s in shapes])[:-1]
    columns = np.cumsum([s.n_in for s in shapes])[:-1]
    return [
        Candidates(f"block {block}, {shape.name}", *parts)
        for shape, *parts in zip(
            shapes,
            np.split(arrays["row_costs"], rows),
            np.split(arrays["column_costs"], columns),
            np.split(arrays["live_rows"], rows),
            np.split(arrays["live_columns"], columns),
            strict=True,
        )
    ]


def _block_masks(context: Context, block: int, mask: dict[str, Array]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Live rows and columns of the linears of one block, cut out of the mask of all blocks."""
    before = [shape for shapes in context.model.blocks[:block] for shape in shapes]
    row, column = sum(s.n_out for s in before), sum(s.n_in for s in before)
    result = {}
    for shape in context.model.blocks[block]:
        rows = torch.from_numpy(mask["live_rows"][row : row + shape.n_out]).to(context.device)
        columns = torch.from_numpy(mask["live_columns"][column : column + shape.n_in]).to(context.device)
        result[shape.name] = (rows, columns)
        row, column = row + shape.n_out, column + shape.n_in
    return result

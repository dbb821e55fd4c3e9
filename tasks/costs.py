"""Costs of everything in one block that could go: units, rows and columns, or single weights.

Vectors over the rows (columns) of several linears are stored one after the other, in module order.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from surgeon.choices import Cost, Curvature, Structure
from surgeon.curvature.spec import Statistic
from surgeon.pruning.costs import structure_costs, weight_costs
from surgeon.pruning.granularity import Granularity, is_structured
from surgeon.pruning.linear import PrunedLinear
from surgeon.pruning.live import LiveLinear, live_linear
from surgeon.recipe import Recipe
from surgeon.store import Reference
from tasks.context import Context, ModelState
from tasks.curvature import read_statistics
from tasks.progress import report
from tasks.stage import Outcome, Product, Request, Stage, produce
from tasks.units import block_sub_layers, unit_costs
from tasks.weights import read_linears

LIVE_SOURCES = (
    "surgeon.curvature.damping",
    "surgeon.curvature.diagonal",
    "surgeon.curvature.diagonalised",
    "surgeon.curvature.factors",
    "surgeon.curvature.interface",
    "surgeon.curvature.kronecker",
    "surgeon.curvature.triangular",
    "surgeon.pruning.linear",
    "surgeon.pruning.live",
)
"""What costs and updates share: a linear's live part and its curvature."""
COSTS = Stage(
    "costs",
    3,
    (*LIVE_SOURCES, "surgeon.curvature.groups", "surgeon.pruning.costs", "surgeon.pruning.elimination", "tasks.units"),
)


@dataclass(frozen=True)
class BlockWork:
    """One block of one shot: what its costs and its update start from.

    Attributes:
        state: the model before the shot.
        block: index.
        statistics: of the block, by kind.
        recipe: how to prune.
        label: of the shot.
    """

    state: ModelState
    block: int
    statistics: Mapping[Statistic, Reference]
    recipe: Recipe
    label: str

    @property
    def inputs(self) -> dict[str, str]:
        """Digests of what costs and updates are computed from."""
        statistics = {statistic.value: reference.digest for statistic, reference in self.statistics.items()}
        return {"weights": self.state.block_digest(self.block), **statistics}

    def name(self, kind: str) -> str:
        """Label of a result of this block."""
        return f"{self.label}/block-{self.block:02d}/{kind}"


def cost_request(work: BlockWork) -> Request:
    """The request for the costs of one block; damping counts only where something is inverted."""
    recipe = work.recipe
    parameters: dict[str, Any] = {
        "block": work.block,
        "curvature": recipe.curvature.kind,
        "cost": recipe.cost,
        "of": _kind(recipe.granularity),
        "damping": damping_parameters(recipe) if recipe.cost is Cost.OBS else None,
    }
    if recipe.units is not None:
        parameters["rescorings"] = recipe.units.rescorings
    return Request(COSTS, parameters, _without(work.inputs, Statistic.LOSS_GRADIENT), work.name("costs"))


def _kind(granularity: Granularity) -> str:
    """What costs are of: those of rows and columns serve several granularities."""
    if granularity is Structure.UNITS:
        return "units"
    return "structures" if is_structured(granularity) else "weights"


def damping_parameters(recipe: Recipe) -> list[float | None]:
    """Damping of inputs and outputs, as far as the curvature has them."""
    kind = recipe.curvature.kind
    if kind in (Curvature.IDENTITY, Curvature.DIAGONAL):
        return [None, None]
    return [recipe.damping.activations, None if kind is Curvature.ACTIVATIONS else recipe.damping.gradients]


def cost_task(context: Context, work: BlockWork) -> Outcome[Reference]:
    """Costs of all rows and columns, or of all weights, of the linears of one block."""

    def compute() -> Product:
        linears = read_linears(context, work.state, work.block)
        if work.recipe.granularity is Structure.UNITS:
            return _unit_product(context, work, linears)
        structured = is_structured(work.recipe.granularity)
        arrays: dict[str, list[torch.Tensor]] = {}
        facts = {}
        for name, factors in read_statistics(context, _second_order(work.statistics), list(linears)):
            where = f"block {work.block}, {name}"
            live = live_linear(
                linears[name],
                factors,
                work.recipe.curvature.kind,
                work.recipe.damping,
                where,
                torch.float64 if structured else torch.float32,
            )
            if structured:
                costs = structure_costs(live, work.recipe.cost, where)
                for part in ("rows", "columns"):
                    arrays.setdefault(f"{part[:-1]}_costs", []).append(getattr(costs, part))
                    arrays.setdefault(f"live_{part}", []).append(getattr(costs, f"live_{part}"))
            else:
                arrays[f"{name}/costs"] = [weight_costs(live, work.recipe.cost, where)]
            facts[name] = _facts(live, work.recipe.cost)
        return Product({n: torch.cat(part).cpu().numpy() for n, part in arrays.items()}, {"linears": facts})

    report(f"{work.label}: costs", work.block, context.model.n_blocks)
    return produce(context, cost_request(work), compute)


def _unit_product(context: Context, work: BlockWork, linears: Mapping[str, PrunedLinear]) -> Product:
    parts = block_sub_layers(context.model, work.block)
    statistics = read_statistics(context, _second_order(work.statistics), [sub.output for sub in parts])
    arrays, facts = unit_costs(parts, linears, statistics, work.recipe, f"block {work.block}")
    for part in ("live_rows", "live_columns"):
        arrays[part] = torch.cat([getattr(linear, part) for linear in linears.values()]).cpu().numpy()
    return Product(arrays, {"linears": facts})


def _facts(live: LiveLinear, cost: Cost) -> dict[str, object]:
    facts: dict[str, object] = {"dead_rows": live.n_dead_rows, "dead_columns": live.n_dead_columns}
    if cost is Cost.OBS:  # elsewhere costs are the same with any damping, so it is neither in their key nor here
        facts |= {"damping": list(live.curvature.damping), "escalations": live.curvature.escalations}
    return facts


def _without(inputs: dict[str, str], statistic: Statistic) -> dict[str, str]:
    return {name: digest for name, digest in inputs.items() if name != statistic.value}


def _second_order(statistics: Mapping[Statistic, Reference]) -> dict[Statistic, Reference]:
    """Costs are of second order: the gradient of the loss is not read."""
    return {s: reference for s, reference in statistics.items() if s is not Statistic.LOSS_GRADIENT}

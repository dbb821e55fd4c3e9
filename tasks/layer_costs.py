"""What the weights of a block are worth: one number a block, the sum over its linears."""

from collections.abc import Mapping
from dataclasses import dataclass

from surgeon.choices import Selector
from surgeon.curvature.factors import LinearFactors
from surgeon.curvature.spec import Statistic
from surgeon.layers.costs import magnitude_score, removal_cost, taylor_score
from surgeon.pruning.linear import PrunedLinear
from surgeon.store import Reference
from tasks.context import Context, ModelState
from tasks.curvature import read_statistics
from tasks.progress import report
from tasks.stage import Outcome, Product, Request, Stage, produce
from tasks.weights import read_linears

BLOCK_COST = Stage("block-cost", 1, ("surgeon.layers.costs", "surgeon.curvature.factors", "surgeon.pruning.linear"))


@dataclass(frozen=True)
class BlockCostWork:
    """One block whose cost is wanted.

    Attributes:
        state: the model.
        block: index.
        selector: `magnitude`, `taylor` or `curvature`.
        statistics: of the block, by kind: nothing, the gradient of the loss, or factors of K-FAC and, optionally, the
            gradient of the loss.
        label: of the shot.
    """

    state: ModelState
    block: int
    selector: Selector
    statistics: Mapping[Statistic, Reference]
    label: str

    @property
    def name(self) -> str:
        """Label of the result."""
        return f"{self.label}/block-{self.block:02d}/{BLOCK_COST.kind}"


def block_cost_request(work: BlockCostWork) -> Request:
    """The request for the cost of one block."""
    statistics = {statistic.value: reference.digest for statistic, reference in work.statistics.items()}
    inputs = {"weights": work.state.block_digest(work.block), **statistics}
    return Request(BLOCK_COST, {"block": work.block, "score": work.selector.value}, inputs, work.name)


def block_cost_task(context: Context, work: BlockCostWork) -> Outcome[Reference]:
    """What a block is worth, in the attribute "score", and each of its linears, in "linears"."""

    def compute() -> Product:
        linears = read_linears(context, work.state, work.block)
        if work.selector is Selector.MAGNITUDE:
            scores = {name: magnitude_score(linear.weight, linear.bias) for name, linear in linears.items()}
        else:
            found = read_statistics(context, work.statistics, list(linears))
            scores = {name: _score(work.selector, linears[name], factors) for name, factors in found}
        return Product({}, {"score": sum(scores.values()), "linears": scores})

    report(f"{work.label}: costs of blocks", work.block, context.model.n_blocks)
    return produce(context, block_cost_request(work), compute)


def _score(selector: Selector, linear: PrunedLinear, factors: LinearFactors) -> float:
    if selector is Selector.TAYLOR:
        return taylor_score(linear.weight, linear.bias, factors)
    return removal_cost(linear.weight, linear.bias, factors)

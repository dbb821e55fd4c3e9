"""The work of choosing whole layers."""

from collections.abc import Callable, Sequence
from typing import Any

from flows.session import Session
from flows.work_after import block_shapes
from surgeon.choices import Selector
from surgeon.planning.passes import forward_work, head_work
from surgeon.planning.work import NOTHING, Work
from tasks.context import ModelSpec
from tasks.layer_costs import BlockCostWork, block_cost_task
from tasks.layers import LayerWork, losses_task, similarity_task, sub_layer_task
from tasks.selection import dropped_task, selection_task
from tasks.sizes import n_arrays, shared_inputs

_SELECTION_S = 0.01
_DIRECTIONS = 40
"""Bytes moved for each number of the hidden states that are compared: turned to float64, normalised, multiplied."""
_VALUES = 24
"""Bytes moved for each weight that is turned to float64, multiplied and summed."""


def layer_works(session: Session) -> dict[Callable[..., Any], Callable[..., Work]]:
    """Work of each task, from what it is called with after the context."""
    return {
        similarity_task: lambda work: _similarity(session, work),
        sub_layer_task: lambda work: _sub_layer(session, work),
        losses_task: lambda work: _losses(session, work),
        block_cost_task: lambda work: _block_cost(session, work),
        selection_task: lambda *_: Work.of(seconds=_SELECTION_S),
        dropped_task: lambda _state, dropped, _label: _dropped(session, [block for block, _ in dropped]),
    }


def _similarity(session: Session, _work: LayerWork) -> Work:
    """One forward pass, and a comparison for each block."""
    return _forward(session, runs=1) + Work.of(arrays=2)


def _sub_layer(session: Session, _work: LayerWork) -> Work:
    """The same, with each block run twice and compared twice."""
    return _forward(session, runs=2) + Work.of(arrays=2)


def _losses(session: Session, work: LayerWork) -> Work:
    """One run without each block that is left, from that block on; blocks of later groups are loaded again."""
    blocks = block_shapes(session)
    tokens, length = _calibration(session)
    live = [index for index in range(len(blocks)) if index not in work.state.removed]
    total = Work.of(openings=1)
    for rank, index in enumerate(live):
        total += (rank + 1) * forward_work([blocks[index]], tokens, length)
    total += len(live) * head_work(session.model.width * session.model.n_vocabulary, tokens)
    for number, group in enumerate(session.context.groups, start=1):
        total += number * _loads(session.model, group)
    return total


def _block_cost(session: Session, work: BlockCostWork) -> Work:
    """Weights and statistics of a block read, and two products for each linear."""
    model = session.model
    shapes = model.blocks[work.block]
    n_weights = sum(s.n_weights for s in shapes)
    total = _loads(model, [work.block]) + Work.of(copies=_VALUES * n_weights)
    for statistic in work.statistics:
        total += Work.of(opened=n_arrays(model, statistic.value, work.block, session.recipe, None))
    if work.selector is Selector.CURVATURE:
        inputs = sum(s.n_in**2 for s in shared_inputs(model, work.block))
        total += Work.of(reads=2 * (inputs + sum(s.n_out**2 for s in shapes)))
        total += Work.of(products=sum(s.n_weights * (s.n_out + s.n_in) for s in shapes))
    elif work.statistics:
        total += Work.of(reads=4 * n_weights)
    return total


def _dropped(session: Session, blocks: Sequence[int]) -> Work:
    """Linears of some blocks read and written."""
    model, total = session.model, NOTHING
    for block in blocks:
        n_weights = sum(s.n_weights for s in model.blocks[block])
        number = n_arrays(model, "update", block, session.recipe, None)
        total += _loads(model, [block]) + Work.of(writes=4 * n_weights, arrays=number + 1)
    return total


def _forward(session: Session, runs: int) -> Work:
    tokens, length = _calibration(session)
    blocks = block_shapes(session)
    compared = (runs + 1) * tokens * session.model.width * len(blocks)
    total = Work.of(openings=1, copies=_DIRECTIONS * compared) + _loads(session.model, range(len(blocks)))
    return total + runs * forward_work(blocks, tokens, length)


def _calibration(session: Session) -> tuple[int, int]:
    given = session.params.calibrate
    return given.sequences * given.length, given.length


def _loads(model: ModelSpec, blocks: Sequence[int]) -> Work:
    n_weights = sum(s.n_weights for block in blocks for s in model.blocks[block])
    return Work.of(loads=n_weights * model.torch_dtype.itemsize)

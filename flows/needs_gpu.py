"""Memory where models run on a GPU: what its memory holds, and what of it the machine holds too."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flows.session import Session
from surgeon.choices import Curvature, Device
from surgeon.memory import solve_gib
from surgeon.pruning.granularity import is_structured
from tasks.costs import cost_task
from tasks.evaluation import evaluation_task
from tasks.layer_costs import block_cost_task
from tasks.measuring import boundary_task, curvature_task
from tasks.refining import kronecker_terms_task, moments_task
from tasks.selection import dropped_task
from tasks.update import update_task

_GIB = 2**30
_FLOAT32 = 4
_ON_THE_WAY = 3
"""Matrices of the size of the largest factor that the machine holds while a solve reads or stores: as a triangle and
whole, and what is computed from it."""


@dataclass(frozen=True)
class Split:
    """GiB at the peak of a task.

    Attributes:
        host: of the machine.
        gpu: of the GPU.
    """

    host: float
    gpu: float


def largest_solve_gib(session: Session) -> float:
    """What costs and updates of the largest block hold where they are computed, GiB."""
    model, recipe = session.model, session.recipe
    diagonalised = (Curvature.EKFAC, Curvature.KRONECKER_SUM)
    is_plain = recipe.curvature.kind not in diagonalised and not recipe.update.newton_step
    in_place = is_plain and is_structured(recipe.granularity)
    has_bias = any(shape.has_bias for shape in model.blocks[0])
    pairs = zip(model.shapes(), model.shapes(session.measured_linears), strict=True)
    return max((solve_gib(*pair, in_place=in_place, has_bias=has_bias) for pair in pairs), default=0.0)


def split_by_body(session: Session) -> dict[Any, Callable[[], Split]]:
    """What tasks hold where, of those for which it differs; of the others it is all in both. Empty without a GPU."""
    if session.device != Device.CUDA:
        return {}
    estimate = session.memory_estimate(session.context.blocks_per_group)
    model = session.model
    pairs = list(zip(model.shapes(), model.shapes(session.measured_linears), strict=True))
    solve = largest_solve_gib(session)
    weights = max((sum(n_out * n_in for n_out, n_in in block) for block, _ in pairs), default=0)
    side = max((max(pair) for _, measured in pairs for pair in measured), default=0)
    on_the_way = _FLOAT32 * (2 * weights + _ON_THE_WAY * side**2) / _GIB
    handed_over = estimate.boundaries / _GIB

    def a_pass() -> Split:
        return Split(estimate.host_gib, estimate.device_gib)

    def an_evaluation() -> Split:
        return Split(handed_over + estimate.weights / _GIB, estimate.evaluation_gib - handed_over)

    def a_solve() -> Split:
        return Split(on_the_way, solve)

    return {
        **dict.fromkeys((curvature_task, moments_task, kronecker_terms_task), a_pass),
        **dict.fromkeys((evaluation_task, boundary_task), an_evaluation),
        **dict.fromkeys((cost_task, update_task, block_cost_task, dropped_task), a_solve),
    }

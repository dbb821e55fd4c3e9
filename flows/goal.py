"""How much is to go: a sparsity, or a number of parameters, a size on disk or a speed-up turned into the like.

Every target comes down to a fraction of what the decoder blocks use of some resource, which shots reach step by step.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from surgeon.choices import Resource
from surgeon.errors import ParameterError
from surgeon.layers.spec import SPECS, LayerGranularity
from surgeon.models.checkpoint import find_weight_files, read_headers
from tasks.rule import WEIGHTS, MaskRule, Usage
from tasks.units import block_sub_layers, dense_usage, require_reachable

if TYPE_CHECKING:
    from flows.session import Session

_HEADER_LENGTH_BYTES = 8
BATCH, LENGTH = 8, 64
"""Sequences and tokens of the forward pass that a speed-up is of."""


@dataclass(frozen=True)
class Goal:
    """What all shots together are to reach.

    Attributes:
        fraction: of what the dense decoder blocks use, to be gone.
        usage: of which resource, and how much of it a sub-layer uses.
        asked: the target in the words of the parameters.
    """

    fraction: float
    usage: Usage
    asked: str


def find_goal(session: "Session") -> Goal:
    """Turns the target of the parameters into a fraction.

    Raises:
        ParameterError: if the target is above what the dense model has, or below what is left without any unit.
    """
    given = session.params.prune
    model = session.model
    if given.parameters is not None:
        return _parameters(session, model.n_parameters, given.parameters, f"parameters: {given.parameters:,}")
    if given.size is not None:
        itemsize = _itemsize(session)
        stored = sum(math.prod(t.shape) for t in read_headers(model.checkpoint.path).values())
        target = (given.size - _header_bytes(session)) // itemsize
        return _parameters(session, stored, target, f"size: {int(given.size):,} bytes")
    if given.speedup is not None:
        return _speedup(session, given.speedup)
    if given.layerchop.blocks is not None:
        # Of blocks, or of the attentions and MLPs that a selector takes apart; the shot counts what they free.
        halves = SPECS[given.layerchop.selector].granularity is LayerGranularity.SUB_LAYER
        fraction = min(given.layerchop.blocks / (model.n_blocks * (2 if halves else 1)), 1.0)
        return Goal(fraction, WEIGHTS, f"layerchop.blocks: {given.layerchop.blocks}")
    return Goal(given.target_sparsity, WEIGHTS, f"sparsity: {given.target_sparsity:g}")


def require_goal(session: "Session") -> None:
    """Refuses a target that no widths of the model reach.

    Raises:
        ParameterError: saying what is left at least.
    """
    goal = session.goal
    if session.recipe.units is not None:
        try:
            require_reachable(session.model, MaskRule(goal.fraction, session.recipe, goal.usage))
        except ParameterError as error:
            raise ParameterError(f"prune.{goal.asked}: {error}") from error


def _parameters(session: "Session", dense: int, target: int, asked: str) -> Goal:
    usage = Usage(Resource.PARAMETERS)
    in_units = dense_usage(session.model, usage)
    fraction = (dense - target) / in_units
    each = _itemsize(session) if asked.startswith("size") else 1
    if fraction <= 0:
        raise ParameterError(f"prune.{asked} is not below what the dense model has: {dense * each:,}")
    if fraction >= 1:
        raise ParameterError(
            f"prune.{asked} is out of reach: without any unit in its blocks the model still has "
            f"{(dense - int(in_units)) * each:,} (embeddings, head, norms and biases stay)"
        )
    return Goal(fraction, usage, asked)


def _speedup(session: "Session", speedup: float) -> Goal:
    from tasks.block_times import block_times_task, read_block_times

    reference = session.engine.task(block_times_task, session.context, BATCH, LENGTH, name="block-times")
    session.block_times = reference
    times = read_block_times(session.context, reference)
    n_neurons, n_groups = (sub.n_units for sub in reversed(block_sub_layers(session.model, 0)))
    usage = Usage(
        Resource.SECONDS,
        tuple(float(times.mlp(k)) for k in range(n_neurons + 1)),
        tuple(float(times.attention(k)) for k in range(n_groups + 1)),
    )
    in_units = dense_usage(session.model, usage)
    fraction = times.dense_s * (1.0 - 1.0 / speedup) / in_units
    if fraction >= 1:
        raise ParameterError(
            f"prune.speedup: {speedup:g} is out of reach: without any unit in its blocks the model would be "
            f"{times.dense_s / (times.dense_s - in_units):.2f} times as fast here (embeddings, norms and head stay)"
        )
    return Goal(fraction, usage, f"speedup: {speedup:g}")


def _itemsize(session: "Session") -> int:
    dtype: torch.dtype = getattr(torch, session.params.export.dtype or session.params.model.dtype)
    return dtype.itemsize


def _header_bytes(session: "Session") -> int:
    """Bytes of the weight files that are not weights; those of the pruned files are as many."""
    total = 0
    for file in find_weight_files(session.model.checkpoint.path):
        with file.open("rb") as opened:
            total += _HEADER_LENGTH_BYTES + int.from_bytes(opened.read(_HEADER_LENGTH_BYTES), "little")
    return total

"""Attention and MLP dropped apart: attention first.

Reference: He et al. 2024, *What Matters in Transformers? Not All Attention is Needed* (LLM-Drop).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from surgeon.errors import NonFiniteError, ParameterError
from surgeon.pruning.units import SubLayerKind

_ROUNDING = 1e-9


@dataclass(frozen=True)
class SubLayerScore:
    """What is known of the attention or the MLP of one block.

    Attributes:
        block: index.
        kind: which of the two.
        score: how much it changes the hidden states.
        weights: of decoder linears that go with it.
    """

    block: int
    kind: SubLayerKind
    score: float
    weights: int


def drop_count(scores: Sequence[SubLayerScore], n_remove: int) -> tuple[SubLayerScore, ...]:
    """A number of sub-layers: attentions by rising score, then MLPs; of equal ones the earlier block's.

    Args:
        scores: of the sub-layers that may go.
        n_remove: how many go.

    Raises:
        ParameterError: fewer than one, or more than may go.
        NonFiniteError: a score is not finite; names block and sub-layer.
    """
    if not 1 <= n_remove <= len(scores):
        raise ParameterError(
            f"layerchop.blocks: got {n_remove} sub-layers, allowed: 1 to {len(scores)}, as each block that may go has "
            "an attention and an MLP"
        )
    return tuple(_in_order(scores))[:n_remove]


def drop_weights(scores: Sequence[SubLayerScore], n_weights: float) -> tuple[SubLayerScore, ...]:
    """As few sub-layers, in the same order, as have at least a number of weights.

    Args:
        scores: of the sub-layers that may go.
        n_weights: how many weights of decoder linears go at least.

    Raises:
        ParameterError: all that may go have fewer.
        NonFiniteError: a score is not finite; names block and sub-layer.
    """
    dropped: list[SubLayerScore] = []
    reached = 0
    for score in _in_order(scores):
        if reached >= n_weights * (1 - _ROUNDING):
            break
        dropped.append(score)
        reached += score.weights
    if reached < n_weights * (1 - _ROUNDING):
        raise ParameterError(
            f"layerchop: {math.ceil(n_weights):,} weights shall go, but the sub-layers that may go have {reached:,}; "
            "lower the target, protect_first or protect_last"
        )
    return tuple(dropped)


def _in_order(scores: Sequence[SubLayerScore]) -> Iterator[SubLayerScore]:
    for each in scores:
        if not math.isfinite(each.score):
            raise NonFiniteError(
                f"the score of the {each.kind} of block {each.block} is {each.score}, so sub-layers cannot be "
                "compared. Try model.dtype float32."
            )
    for kind in (SubLayerKind.ATTENTION, SubLayerKind.MLP):
        yield from sorted((s for s in scores if s.kind is kind), key=lambda s: (s.score, s.block))

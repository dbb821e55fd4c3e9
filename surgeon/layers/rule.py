"""One rule and one function for all selectors: scores in, blocks and sub-layers that go out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from surgeon.choices import Selector
from surgeon.errors import ParameterError
from surgeon.layers.choosing import Choice, allowed_blocks, closest_span, greedy_blocks, lowest_blocks
from surgeon.layers.dropping import SubLayerScore, drop_count, drop_weights
from surgeon.layers.patterns import pattern_blocks
from surgeon.layers.spec import SPECS, LayerGranularity, SelectorSpec
from surgeon.pruning.units import SubLayerKind

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LayerRule:
    """How much goes, of what, and how it is chosen.

    Attributes:
        selector: how it is chosen.
        n_blocks: of the model.
        protect_first: blocks at the beginning that stay.
        protect_last: blocks at the end that stay.
        n_remove: how many blocks go (sub-layers, if the selector is about these); None if `n_weights` says how much.
        n_weights: how many weights of decoder linears go at least; for sub-layers only.
        weights: of the attention and of the MLP of each block, for sub-layers only.

    Raises:
        ParameterError: nothing or everything would go, or less may go than shall.
        ValueError: the selector needs an amount or weights that are not given.
    """

    selector: Selector
    n_blocks: int
    protect_first: int
    protect_last: int
    n_remove: int | None = None
    n_weights: float | None = None
    weights: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        if self.spec.granularity is LayerGranularity.BLOCK:
            _ = self.choice
        elif self.weights is None or len(self.weights) != self.n_blocks:
            raise ValueError(
                f"{self.selector} needs the weights of attention and MLP of each of {self.n_blocks} blocks"
            )
        elif (self.n_remove is None) == (self.n_weights is None):
            raise ValueError(f"{self.selector} needs either a number of sub-layers or a number of weights")
        else:
            select(self, np.zeros((2, self.n_blocks)))

    @property
    def spec(self) -> SelectorSpec:
        """What the selector reads and how it goes about it."""
        return SPECS[self.selector]

    @property
    def choice(self) -> Choice:
        """How many blocks go, and which may."""
        if self.n_remove is None:
            raise ValueError(f"{self.selector} needs a number of blocks")
        return Choice(self.n_blocks, self.n_remove, self.protect_first, self.protect_last)

    @property
    def allowed(self) -> range:
        """Indices of the blocks that may go or lose a sub-layer."""
        return allowed_blocks(self.n_blocks, self.protect_first, self.protect_last)


@dataclass(frozen=True)
class Selected:
    """What goes.

    Attributes:
        removed: indices of the blocks that go whole, ascending.
        order: the same blocks in the order in which they were chosen.
        dropped: sub-layers that go from blocks that stay, by block.
        scores: by what they are of ("block", "attention", "mlp"), one for each block; None where there is none.
    """

    removed: tuple[int, ...]
    order: tuple[int, ...]
    dropped: tuple[tuple[int, SubLayerKind], ...]
    scores: dict[str, list[float | None]]


def select(rule: LayerRule, scores: Array | None) -> Selected:
    """Chooses what goes.

    Args:
        rule: how much, of what, and how.
        scores: None for patterns; `[n_blocks]` of blocks; `[n_blocks + 1, n_blocks + 1]` distances for `angular`;
            `[n_steps, n_blocks]` losses before each removal for `sleb`; `[2, n_blocks]` of attention and MLP for
            `llm-drop`. What is not looked at may be NaN.

    Raises:
        ParameterError: less may go than shall.
        NonFiniteError: a score is not finite; names the block.
    """
    if rule.spec.is_pattern:
        chosen = pattern_blocks(rule.selector, rule.choice)
        return Selected(chosen, chosen, (), {})
    assert scores is not None, f"{rule.selector} needs scores"
    if rule.selector is Selector.LLM_DROP:
        return _select_sub_layers(rule, scores)
    if rule.selector is Selector.ANGULAR:
        chosen = closest_span(scores, rule.choice)
        n = len(chosen)
        spans = [float(scores[i, i + n]) if i + n <= rule.n_blocks else math.nan for i in range(rule.n_blocks)]
        return _of_blocks(chosen, spans)
    if rule.selector is Selector.SLEB:
        chosen = greedy_blocks(scores, rule.choice)
        losses = {block: float(scores[step, block]) for step, block in enumerate(chosen)}
        return _of_blocks(chosen, [losses.get(block, math.nan) for block in range(rule.n_blocks)])
    values = [float(score) for score in scores]
    return _of_blocks(lowest_blocks(values, rule.choice), values)


def _of_blocks(chosen: tuple[int, ...], scores: Sequence[float]) -> Selected:
    return Selected(tuple(sorted(chosen)), chosen, (), {"block": _plain(scores)})


def _select_sub_layers(rule: LayerRule, scores: Array) -> Selected:
    assert rule.weights is not None, "checked before"
    kinds = (SubLayerKind.ATTENTION, SubLayerKind.MLP)
    candidates = [
        SubLayerScore(block, kind, float(scores[row, block]), rule.weights[block][row])
        for block in rule.allowed
        for row, kind in enumerate(kinds)
    ]
    if rule.n_remove is not None:
        gone = drop_count(candidates, rule.n_remove)
    else:
        assert rule.n_weights is not None, "checked before"
        gone = drop_weights(candidates, rule.n_weights)
    if len(gone) == 2 * rule.n_blocks:
        raise ParameterError(
            f"layerchop: attention and MLP of all {rule.n_blocks} blocks would go, and nothing is left of the model; "
            "lower the target"
        )
    of = {kind: {each.block for each in gone if each.kind is kind} for kind in kinds}
    whole = of[SubLayerKind.ATTENTION] & of[SubLayerKind.MLP]
    order = tuple(each.block for each in gone if each.block in whole and each.kind is SubLayerKind.MLP)
    dropped = tuple(sorted((each.block, each.kind) for each in gone if each.block not in whole))
    named = {kind.value: _plain(scores[row]) for row, kind in enumerate(kinds)}
    return Selected(tuple(sorted(whole)), order, dropped, named)


def _plain(scores: Sequence[float] | Array) -> list[float | None]:
    return [float(score) if math.isfinite(score) else None for score in scores]

"""Coupled units: what must go together so that a block becomes smaller and stays whole.

A *sub-layer* is the MLP or the attention of a block. Its units are read by the columns of one *output linear* (down or
o), in a product that is exactly linear, and made by rows of the others: an MLP neuron is one column of down and one row
of gate and up, a key/value group is the columns of o that read its query heads, its rows of key and value, and the rows
of its query heads. Without the columns the rows do nothing, so a unit costs what its columns cost, once, and frees all.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from surgeon.models import AttentionCoupling, BlockCouplings, MlpCoupling


class SubLayerKind(StrEnum):
    """The two halves of a block."""

    MLP = "mlp"
    ATTENTION = "attention"


@dataclass(frozen=True)
class Shape:
    """Of a linear, with what a row takes with it."""

    n_out: int
    n_in: int
    has_bias: bool


@dataclass(frozen=True)
class SubLayer:
    """Where the units of the MLP or of the attention of a block are.

    Attributes:
        kind: which of the two.
        output: the linear whose columns read the units.
        n_units: neurons, or key/value groups.
        width: columns of the output linear that read one unit, which adjoin.
        rows: for each linear that makes the units, the unit of each of its rows, `[n_out]` int64.
        weights_per_unit: weights of decoder linears that one unit frees.
        parameters_per_unit: the same with biases.
    """

    kind: SubLayerKind
    output: str
    n_units: int
    width: int
    rows: Mapping[str, Tensor]
    weights_per_unit: int
    parameters_per_unit: int

    def owner(self, live_columns: Tensor) -> Tensor:
        """The unit of each live column of the output linear, `[n_live_in]` int64."""
        return live_columns.nonzero()[:, 0] // self.width

    def live_units(self, live_columns: Tensor) -> Tensor:
        """Which units live, `[n_units]` bool: those with a live column in the output linear."""
        return live_columns.view(self.n_units, self.width).any(dim=1)

    def live_parts(self, live: Tensor) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        """Live rows and live columns of the linears of the sub-layer; None where units say nothing of them.

        Args:
            live: `[n_units]` bool.
        """
        parts: dict[str, tuple[Tensor | None, Tensor | None]] = {
            name: (live[unit], None) for name, unit in self.rows.items()
        }
        return parts | {self.output: (None, live.repeat_interleave(self.width))}


def sub_layers(couplings: BlockCouplings, shapes: Mapping[str, Shape]) -> tuple[SubLayer, SubLayer]:
    """The attention and the MLP of a block.

    Args:
        couplings: what is coupled in it.
        shapes: of all its linears.
    """
    return _attention(couplings.attention, shapes), _mlp(couplings.mlp, shapes)


def _mlp(coupling: MlpCoupling, shapes: Mapping[str, Shape]) -> SubLayer:
    n_units = shapes[coupling.column_linear].n_in
    rows = {name: torch.arange(n_units) for name in coupling.row_linears}
    return _sub_layer(SubLayerKind.MLP, coupling.column_linear, n_units, rows, shapes)


def _attention(coupling: AttentionCoupling, shapes: Mapping[str, Shape]) -> SubLayer:
    rows = {}
    for name in coupling.input_linears:
        rows[name] = torch.empty(shapes[name].n_out, dtype=torch.int64)
        for group in range(coupling.n_kv_heads):
            rows[name][list(coupling.rows(group)[name])] = group
    return _sub_layer(SubLayerKind.ATTENTION, coupling.output, coupling.n_kv_heads, rows, shapes)


def _sub_layer(
    kind: SubLayerKind, output: str, n_units: int, rows: Mapping[str, Tensor], shapes: Mapping[str, Shape]
) -> SubLayer:
    width = shapes[output].n_in // n_units
    weights, biases = width * shapes[output].n_out, 0
    for name in rows:
        per_unit = shapes[name].n_out // n_units
        weights += per_unit * shapes[name].n_in
        biases += per_unit * shapes[name].has_bias
    return SubLayer(kind, output, n_units, width, rows, weights, weights + biases)

"""Which rows and columns of every linear are written, and what the model around them sees.

A side of a linear (its rows, or its columns) is *seen* by the code around it: MLP neurons that stay, whole key/value
groups that stay, and on the side of the residual stream everything. Of what is seen, some is *stored*. Where that is
less, an index map says which.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from surgeon.export.dead_code import BlockFacts, ClosedBlock, LiveSets, close
from surgeon.models import AttentionCoupling, BlockCouplings


@dataclass(frozen=True)
class Side:
    """Rows or columns of a linear, as indices of the dense one in order.

    Attributes:
        seen: int64 `[n_seen]`, what the code around the linear sees.
        stored: int64 `[n_stored]`, the part of it that is written.
    """

    seen: Tensor
    stored: Tensor

    @property
    def index_map(self) -> Tensor | None:
        """Positions of what is stored in what is seen, int64 `[n_stored]`; None if that is all of it."""
        return None if len(self.seen) == len(self.stored) else torch.searchsorted(self.seen, self.stored)


@dataclass(frozen=True)
class LinearLayout:
    """Both sides of a linear, and the sizes of the dense one.

    Attributes:
        rows: outputs.
        columns: inputs.
        dense: `(n_out, n_in)` of the dense linear.
        has_bias: whether the dense one has a bias.
    """

    rows: Side
    columns: Side
    dense: tuple[int, int]
    has_bias: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the stored weight."""
        return len(self.rows.stored), len(self.columns.stored)

    @property
    def sizes(self) -> list[int]:
        """Rows stored and seen, columns stored and seen."""
        return [len(self.rows.stored), len(self.rows.seen), len(self.columns.stored), len(self.columns.seen)]

    @property
    def is_gone(self) -> bool:
        """Whether no weight is left."""
        return 0 in self.shape

    @property
    def is_constant(self) -> bool:
        """Whether a bias is left of it, and no weight."""
        return self.is_gone and self.has_bias and len(self.rows.stored) > 0

    @property
    def has_maps(self) -> bool:
        """Whether it needs an index map."""
        return not self.is_gone and (self.rows.index_map is not None or self.columns.index_map is not None)


@dataclass(frozen=True)
class BlockLayout:
    """What is written of a block.

    Attributes:
        linears: layout by name, in module order.
        n_live: weights in live rows and columns.
        n_neurons: MLP neurons, None if not known.
        n_query_heads: query heads, None if not known.
        n_kv_heads: key/value heads, None if not known.
        folded: MLP neurons whose constant output belongs into the bias of the down linear, int64 indices.
    """

    linears: Mapping[str, LinearLayout]
    n_live: int
    n_neurons: int | None = None
    n_query_heads: int | None = None
    n_kv_heads: int | None = None
    folded: Tensor | None = None

    @cached_property
    def n_gone(self) -> int:
        """Weights of the dense linears that are not written."""
        return sum(layout.dense[0] * layout.dense[1] - _product(layout.shape) for layout in self.linears.values())


@dataclass(frozen=True)
class Layout:
    """What is written of the blocks that are left.

    Attributes:
        kept: their indices in the dense model, ascending.
        blocks: the layout of each.
    """

    kept: Sequence[int]
    blocks: Sequence[BlockLayout]

    def of(self, index: int) -> BlockLayout:
        """The layout of a block by its index in the dense model."""
        return self.blocks[self.kept.index(index)]

    @property
    def is_dense(self) -> bool:
        """Whether nothing is gone of the blocks that are left."""
        return all(block.n_gone == 0 for block in self.blocks)

    @property
    def not_uniform(self) -> str | None:
        """Why a stock configuration, which has one width for all blocks, cannot describe this; None if it can."""
        for index, block in zip(self.kept, self.blocks, strict=True):
            if block.n_neurons == 0 or block.n_kv_heads == 0:
                return f"block {index} has no {'MLP' if block.n_neurons == 0 else 'attention'} any more"
            for name, layout in block.linears.items():
                if layout.is_gone or layout.has_maps:
                    n_out, n_in = layout.shape
                    return (
                        f"block {index}, linear {name} keeps {n_out} of {len(layout.rows.seen)} rows and {n_in} of "
                        f"{len(layout.columns.seen)} columns, which are not whole neurons or key/value groups"
                    )
            first = self.blocks[0]
            for what, here, there in (
                ("MLP neurons", block.n_neurons, first.n_neurons),
                ("key/value groups", block.n_kv_heads, first.n_kv_heads),
            ):
                if here != there:
                    return f"block {index} keeps {here} {what} and block {self.kept[0]} keeps {there}"
        return None


def block_layout(live: LiveSets, facts: BlockFacts) -> BlockLayout:
    """Lays out a block.

    Args:
        live: what pruning left of each linear.
        facts: of the block.
    """
    closed = close(live, facts)
    seen = _seen(closed, facts.couplings)
    n_live = sum(int(rows.sum()) * int(columns.sum()) for rows, columns in live.values())
    linears = {}
    for name, (live_rows, live_columns) in live.items():
        all_rows, all_columns = (
            torch.ones(len(live_rows), dtype=torch.bool),
            torch.ones(len(live_columns), dtype=torch.bool),
        )
        rows, columns = (_indices(seen.get((name, side), whole)) for side, whole in ((0, all_rows), (1, all_columns)))
        linears[name] = LinearLayout(
            Side(rows, _indices(closed.rows[name])),
            Side(columns, _indices(closed.columns[name])),
            (len(live_rows), len(live_columns)),
            facts.has_bias[name],
        )
    if facts.couplings is None:
        return BlockLayout(linears, n_live)
    assert closed.neurons is not None and closed.groups is not None and closed.folded is not None
    attention, n_groups = facts.couplings.attention, int(closed.groups.sum())
    n_query_heads = n_groups * attention.n_query_heads // attention.n_kv_heads
    return BlockLayout(linears, n_live, int(closed.neurons.sum()), n_query_heads, n_groups, _indices(closed.folded))


def _seen(closed: ClosedBlock, couplings: BlockCouplings | None) -> dict[tuple[str, int], Tensor]:
    """(Name of a linear, 0 for rows or 1 for columns) → what is seen of it, bool; what is not there is seen whole."""
    if couplings is None:
        return {}
    assert closed.neurons is not None and closed.groups is not None
    seen = {(name, 0): closed.neurons for name in couplings.mlp.row_linears}
    seen[couplings.mlp.column_linear, 1] = closed.neurons
    attention = couplings.attention
    for name in attention.input_linears:
        seen[name, 0] = _of_groups(attention, name, closed.groups, len(closed.rows[name]))
    seen[attention.output, 1] = closed.groups.repeat_interleave(
        len(closed.columns[attention.output]) // len(closed.groups)
    )
    return seen


def _of_groups(attention: AttentionCoupling, name: str, groups: Tensor, n_rows: int) -> Tensor:
    """Rows of an input linear that belong to groups that stay, bool `[n_rows]`."""
    rows = torch.zeros(n_rows, dtype=torch.bool)
    for group in groups.nonzero().flatten().tolist():
        span = attention.rows(group)[name]
        rows[span.start : span.stop] = True
    return rows


def _indices(mask: Tensor) -> Tensor:
    return mask.nonzero().flatten()


def _product(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]

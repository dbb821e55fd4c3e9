"""What of a block can go without changing a bit of what it computes, beyond what pruning removed.

The linears of a block feed one another. Let `phi` be the activation of the MLP.

- An MLP neuron whose column of the down linear is removed, or whose row of the up linear is, adds nothing: all of it
  goes. A removed row of the gate (or of the one up-like linear of an MLP without gate) gives `phi(0)`: where that is
  zero the neuron goes too. Without a gate it adds `phi(0)` times its column of the down linear whatever the input,
  which goes into the bias of that linear if there is one. Else the neuron stays, with a row of zeros.
- A value channel that is removed adds nothing through the columns that read it, one for each query head of its group;
  a channel that no column reads is of no use. A query head without columns needs no query rows. A key/value group
  without channels goes whole.
- A linear without live columns and without a bias gives zero; one without live rows reads nothing.

A removed row has taken its bias with it, so that it gives exactly zero.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from surgeon.models import AttentionCoupling, BlockCouplings, QkvLayout

LiveSets = Mapping[str, tuple[Tensor, Tensor]]
"""Name of a linear → its live rows `[n_out]` bool and live columns `[n_in]` bool."""


@dataclass(frozen=True)
class BlockFacts:
    """What the dead code of a block depends on besides its live sets.

    Attributes:
        couplings: which rows and columns belong together; None if that is not known, and then nothing more is dead.
        has_bias: name of a linear → whether it has a bias.
        at_zero: the activation of the MLP at zero.
    """

    couplings: BlockCouplings | None
    has_bias: Mapping[str, bool]
    at_zero: float


@dataclass(frozen=True)
class ClosedBlock:
    """What is left of a block.

    Attributes:
        rows: name of a linear → rows that are of use, `[n_out]` bool; a removed row among them is a row of zeros.
        columns: name of a linear → columns that are of use, `[n_in]` bool.
        neurons: MLP neurons that stay, `[n_neurons]` bool; None if couplings are not known.
        groups: key/value groups that stay, `[n_kv_heads]` bool; None if couplings are not known.
        folded: MLP neurons that gave a constant, which belongs into the bias of the down linear, `[n_neurons]` bool.
    """

    rows: dict[str, Tensor]
    columns: dict[str, Tensor]
    neurons: Tensor | None = None
    groups: Tensor | None = None
    folded: Tensor | None = None


def close(live: LiveSets, facts: BlockFacts) -> ClosedBlock:
    """Finds all that is dead in a block.

    Args:
        live: what pruning left of each linear.
        facts: of the block.
    """
    rows = {name: sets[0].cpu().clone() for name, sets in live.items()}
    columns = {name: sets[1].cpu().clone() for name, sets in live.items()}
    couplings = facts.couplings
    if couplings is None:
        _settle(rows, columns, facts.has_bias, lambda: None)
        return ClosedBlock(rows, columns)
    folded = torch.zeros_like(columns[couplings.mlp.column_linear])

    def spread() -> None:
        _close_neurons(rows, columns, facts, folded)
        _close_groups(rows, columns, couplings.attention)

    _settle(rows, columns, facts.has_bias, spread)
    neurons = columns[couplings.mlp.column_linear].clone()
    for name in couplings.mlp.row_linears:  # a row of zeros that must stay
        rows[name] = neurons.clone()
    groups = _value_rows(rows, couplings.attention).any(dim=1)
    return ClosedBlock(rows, columns, neurons, groups, folded)


def _settle(
    rows: dict[str, Tensor], columns: dict[str, Tensor], has_bias: Mapping[str, bool], spread: Callable[[], None]
) -> None:
    """Applies all rules until nothing changes."""
    while True:
        before = sum(int(mask.sum()) for mask in (*rows.values(), *columns.values()))
        for name in rows:
            if not columns[name].any() and not has_bias[name]:
                rows[name].zero_()
            if not rows[name].any():
                columns[name].zero_()
        spread()
        if before == sum(int(mask.sum()) for mask in (*rows.values(), *columns.values())):
            return


def _close_neurons(rows: dict[str, Tensor], columns: dict[str, Tensor], facts: BlockFacts, folded: Tensor) -> None:
    assert facts.couplings is not None
    mlp = facts.couplings.mlp
    activated, *others = mlp.row_linears  # the activation is applied to the first: gate, or fc1
    stays = columns[mlp.column_linear].clone()
    for name in others:
        stays &= rows[name]
    if facts.at_zero == 0:
        stays &= rows[activated]
    elif not others and facts.has_bias[mlp.column_linear]:
        folded |= stays & ~rows[activated]
        stays &= rows[activated]
    columns[mlp.column_linear] &= stays
    for name in mlp.row_linears:
        rows[name] &= stays


def _close_groups(rows: dict[str, Tensor], columns: dict[str, Tensor], attention: AttentionCoupling) -> None:
    n_groups, head_dim = attention.n_kv_heads, attention.head_dim
    read = columns[attention.output].view(n_groups, -1, head_dim)  # [group, query head of it, channel]
    values = _value_rows(rows, attention)
    values &= read.any(dim=1)
    read &= values[:, None, :]
    heads = read.any(dim=2)
    queries, keys = _query_rows(rows, attention), _key_rows(rows, attention)
    queries &= heads[:, :, None]
    keys &= heads.any(dim=1)[:, None]


def _query_rows(rows: dict[str, Tensor], attention: AttentionCoupling) -> Tensor:
    """View `[n_kv_heads, query heads of a group, head_dim]` of the live query rows."""
    if attention.layout is QkvLayout.FUSED_PER_HEAD:
        return _fused(rows, attention)[:, 0:1]
    return rows[attention.query].view(attention.n_kv_heads, -1, attention.head_dim)


def _key_rows(rows: dict[str, Tensor], attention: AttentionCoupling) -> Tensor:
    """View `[n_kv_heads, head_dim]` of the live key rows."""
    if attention.layout is QkvLayout.FUSED_PER_HEAD:
        return _fused(rows, attention)[:, 1]
    return rows[attention.key].view(attention.n_kv_heads, attention.head_dim)


def _value_rows(rows: dict[str, Tensor], attention: AttentionCoupling) -> Tensor:
    """View `[n_kv_heads, head_dim]` of the live value rows."""
    if attention.layout is QkvLayout.FUSED_PER_HEAD:
        return _fused(rows, attention)[:, 2]
    return rows[attention.value].view(attention.n_kv_heads, attention.head_dim)


def _fused(rows: dict[str, Tensor], attention: AttentionCoupling) -> Tensor:
    return rows[attention.query].view(attention.n_kv_heads, 3, attention.head_dim)

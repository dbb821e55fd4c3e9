"""The state of one linear while it is pruned: its weight, its bias, and what of it still lives."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LiveSet:
    """What of a linear lives; attributes as those of `PrunedLinear`, on the CPU."""

    rows: Tensor
    columns: Tensor
    weights: Tensor | None = None

    def alive(self) -> Tensor:
        """Which weights live, `[n_out, n_in]` bool."""
        return self.rows[:, None] & self.columns[None, :] if self.weights is None else self.weights


@dataclass(frozen=True)
class PrunedLinear:
    """A linear and what of it lives. Everything else is exactly zero.

    Attributes:
        weight: `[n_out, n_in]`.
        bias: `[n_out]`, or None.
        live_rows: `[n_out]` bool; a removed row has taken its bias with it.
        live_columns: `[n_in]` bool.
        live_weights: `[n_out, n_in]` bool where single weights go, false outside live rows and columns; None where all
            weights of live rows and columns live.
    """

    weight: Tensor
    bias: Tensor | None
    live_rows: Tensor
    live_columns: Tensor
    live_weights: Tensor | None = None

    @classmethod
    def dense(cls, weight: Tensor, bias: Tensor | None) -> "PrunedLinear":
        """A linear of which nothing is removed yet."""
        n_out, n_in = weight.shape
        on = weight.device
        return cls(
            weight, bias, torch.ones(n_out, dtype=torch.bool, device=on), torch.ones(n_in, dtype=torch.bool, device=on)
        )

    @property
    def n_weights(self) -> int:
        """Weights of the dense linear, the bias not counted."""
        return self.weight.numel()

    @property
    def n_live_weights(self) -> int:
        """Weights that live."""
        if self.live_weights is not None:
            return int(self.live_weights.sum())
        return int(self.live_rows.sum()) * int(self.live_columns.sum())

    def augmented(self, dtype: torch.dtype) -> Tensor:
        """``[W b]`` `[n_out, n_in + 1]`, or ``W`` where there is no bias."""
        if self.bias is None:
            return self.weight.to(dtype)
        return torch.cat([self.weight, self.bias[:, None]], dim=1).to(dtype)

    def with_bias(self, live: Tensor) -> Tensor:
        """What lives of the inputs, `[..., n_in]` bool, and with a bias a last column for it, which always lives."""
        return live if self.bias is None else torch.cat([live, live.new_ones(*live.shape[:-1], 1)], dim=-1)

    def alive(self) -> Tensor:
        """Which weights live, `[n_out, n_in]` bool."""
        if self.live_weights is not None:
            return self.live_weights
        return self.live_rows[:, None] & self.live_columns[None, :]

    def restricted(self, live_rows: Tensor, live_columns: Tensor) -> "PrunedLinear":
        """The same linear with fewer live structures, everything else set to zero (no weight makes up for it)."""
        live = live_rows[:, None] & live_columns[None, :]
        bias = None if self.bias is None else self.bias * live_rows
        live_weights = None if self.live_weights is None else self.live_weights & live
        return PrunedLinear(self.weight * live, bias, live_rows, live_columns, live_weights)

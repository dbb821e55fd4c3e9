"""The state of one linear while it is pruned: its weight, its bias, and which rows and columns still live."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PrunedLinear:
    """A linear and its live structures. Everything outside live rows and live columns is exactly zero.

    Attributes:
        weight: `[n_out, n_in]`.
        bias: `[n_out]`, or None.
        live_rows: `[n_out]` bool; a removed row has taken its bias with it.
        live_columns: `[n_in]` bool.
    """

    weight: Tensor
    bias: Tensor | None
    live_rows: Tensor
    live_columns: Tensor

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
        """Weights in live rows and live columns."""
        return int(self.live_rows.sum()) * int(self.live_columns.sum())

    def augmented(self, dtype: torch.dtype) -> Tensor:
        """``[W b]`` `[n_out, n_in + 1]`, or ``W`` where there is no bias."""
        if self.bias is None:
            return self.weight.to(dtype)
        return torch.cat([self.weight, self.bias[:, None]], dim=1).to(dtype)

    def restricted(self, live_rows: Tensor, live_columns: Tensor) -> "PrunedLinear":
        """The same linear with fewer live structures, everything else set to zero (no weight makes up for it)."""
        weight = self.weight * (live_rows[:, None] & live_columns[None, :])
        bias = None if self.bias is None else self.bias * live_rows
        return PrunedLinear(weight, bias, live_rows, live_columns)

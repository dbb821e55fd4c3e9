"""The parts of a model that Bonsai masks: in every block the units that the MLP's and the attention's output read.

A unit is switched off by setting the inputs that the *output linear* reads from it to zero, which a forward pre-hook
does: the same as taking the unit out of the model, in any architecture whose couplings are known.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from surgeon.pruning.units import SubLayerKind

BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class MaskedPart:
    """The MLP or the attention of one block, as far as it lives.

    Attributes:
        block: index of the block in the dense model.
        kind: MLP or attention.
        linear: the output linear, of which all columns live: `n_live * width` of them.
        n_live: units that live: neurons, or key/value groups.
        width: columns that read one unit, which adjoin.
    """

    block: int
    kind: SubLayerKind
    linear: nn.Linear
    n_live: int
    width: int

    def __post_init__(self) -> None:
        if self.linear.in_features != self.n_live * self.width:
            raise ValueError(
                f"{self.name}: {self.n_live} units of {self.width} columns, but its output linear has "
                f"{self.linear.in_features}"
            )

    @property
    def name(self) -> str:
        """For messages."""
        return f"block {self.block}, {self.kind}"

    def columns(self, keep: BoolArray) -> Tensor:
        """Ones and zeros for the columns of the output linear, in its dtype, on its device.

        Args:
            keep: units that stay, `[n_live]` bool.
        """
        weight = self.linear.weight
        return torch.from_numpy(np.repeat(keep, self.width)).to(device=weight.device, dtype=weight.dtype)

    def by_unit(self, values: Tensor) -> NDArray[np.float64]:
        """Means over the columns of each unit, `[n_live]` float64, from values `[n_live * width]`."""
        means: NDArray[np.float64] = values.view(self.n_live, self.width).mean(dim=1).double().cpu().numpy()
        return means


@contextmanager
def masked(parts: Sequence[MaskedPart], masks: Sequence[BoolArray]) -> Iterator[None]:
    """Switches units off for as long as the context lasts.

    Args:
        parts: of the model.
        masks: for each part the units that stay, `[n_live]` bool.
    """
    with ExitStack() as stack:
        for part, keep in zip(parts, masks, strict=True):
            if not keep.all():
                handle = part.linear.register_forward_pre_hook(partial(_multiply, part.columns(keep)))
                stack.callback(handle.remove)
        yield


def _multiply(mask: Tensor, _linear: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0] * mask, *inputs[1:])

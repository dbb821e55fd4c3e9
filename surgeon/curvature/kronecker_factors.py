"""Observers of the two factors of K-FAC: ``A`` of inputs and ``G`` of gradients at outputs.

They are independent of each other: ``A`` needs no backward pass, and where linears read the same input there is one.

Reference: Martens & Grosse 2015, section 3; van der Ouderaa et al. 2024 (LLM Surgeon), section 3.1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from surgeon.curvature.gram import add_gram, mirror_lower
from surgeon.curvature.observer import GRADIENT, INPUT, LinearObserver, ObservedBlock


@dataclass(frozen=True)
class InputFactors:
    """Second and first moments of the inputs of a block's linears; an input with several readers is held once.

    Attributes:
        activations: ``A = mean_t a aᵀ`` `[n_in, n_in]` float32, by the first linear of each group with one input.
        mean_inputs: ``mean_t a`` `[n_in]` float32, by the same names.
        reads: for every linear, the name under which its input is found.
        n_tokens: number of tokens behind the means.
    """

    activations: Mapping[str, Tensor]
    mean_inputs: Mapping[str, Tensor]
    reads: Mapping[str, str]
    n_tokens: int


class InputObserver(LinearObserver):
    """Accumulates ``A`` and the mean input."""

    needs_gradient: ClassVar[bool] = False

    def __init__(self, block: ObservedBlock) -> None:
        super().__init__(block)
        self._reads = block.reads
        sides = {group[0]: block.linears[group[0]].in_features for group in block.shared}
        self._squares = {name: self._zeros(n, n) for name, n in sides.items()}
        self._sums = {name: self._zeros(n) for name, n in sides.items()}

    def _on_input(self, name: str, x: Tensor) -> None:
        if self._reads[name] != name:
            return
        flat = x.reshape(-1, x.shape[-1])
        add_gram(self._squares[name], flat)
        self._sums[name] += flat.sum(dim=0, dtype=torch.float32)
        # Any NaN or infinity of a batch shows on the diagonal of the sums, which is cheap to look at.
        self._require_finite(self._squares[name].diagonal().sum(), x, name, INPUT)

    def _on_gradient(self, name: str, kept: None, gradient: Tensor) -> None:
        raise NotImplementedError("inputs are observed without gradients")

    def result(self) -> InputFactors:
        """The means over all tokens seen; the observer's sums are used up by this call."""
        for square in self._squares.values():
            mirror_lower(square.div_(self.n_tokens))
        means = {name: total / self.n_tokens for name, total in self._sums.items()}
        return InputFactors(self._squares, means, self._reads, self.n_tokens)


class OutputObserver(LinearObserver):
    """Accumulates ``G = mean_t g gᵀ`` `[n_out, n_out]`."""

    def __init__(self, block: ObservedBlock) -> None:
        super().__init__(block)
        self._squares = {name: self._zeros(li.out_features, li.out_features) for name, li in block.linears.items()}

    def _on_input(self, name: str, x: Tensor) -> None:
        """Inputs do not matter here."""

    def _on_gradient(self, name: str, kept: None, gradient: Tensor) -> None:  # noqa: ARG002
        add_gram(self._squares[name], gradient.reshape(-1, gradient.shape[-1]))
        self._require_finite(self._squares[name].diagonal().sum(), gradient, name, GRADIENT)

    def result(self) -> dict[str, Tensor]:
        """``G`` by linear, float32; the observer's sums are used up by this call."""
        return {name: mirror_lower(square.div_(self.n_gradients)) for name, square in self._squares.items()}

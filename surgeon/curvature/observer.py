"""Hooks that turn what flows through the linears of a block into Kronecker factors.

Nothing is kept of a batch but its contribution to the sums; gradients with respect to weights are never formed.
"""

from collections.abc import Sequence
from functools import partial
from types import TracebackType

import torch
from torch import Tensor, nn

from surgeon.curvature.factors import BlockFactors
from surgeon.curvature.gram import add_gram, mirror_lower
from surgeon.errors import NonFiniteError


class BlockObserver:
    """Accumulates the factors of one block while batches run forward and backward through it.

    Args:
        label: how the block is called in error messages, for example "block 7".
        linears: name and module of each linear of the block.
        shared: groups of names of linears that read the same input; each linear is in exactly one group.
    """

    def __init__(self, label: str, linears: dict[str, nn.Linear], shared: Sequence[Sequence[str]]) -> None:
        self._label = label
        self._linears = linears
        self._reads = {name: group[0] for group in shared for name in group}
        self._activations = {group[0]: self._zeros(linears[group[0]], "in") for group in shared}
        self._sums = {
            name: torch.zeros(square.shape[0], device=square.device) for name, square in self._activations.items()
        }
        self._gradients = {name: self._zeros(linear, "out") for name, linear in linears.items()}
        self._n_tokens = 0
        self._first_sequence = 0
        self._n_sequences = 0
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    @staticmethod
    def _zeros(linear: nn.Linear, side: str) -> Tensor:
        n = linear.in_features if side == "in" else linear.out_features
        return torch.zeros(n, n, device=linear.weight.device)

    def __enter__(self) -> "BlockObserver":
        for name, linear in self._linears.items():
            self._handles.append(linear.register_forward_hook(partial(self._on_forward, name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def start_batch(self, first_sequence: int, n_sequences: int, length: int) -> None:
        """Announces a batch of sequences of some length; the index of its first sequence is for error messages."""
        self._first_sequence = first_sequence
        self._n_sequences = n_sequences
        self._n_tokens += n_sequences * length

    def _on_forward(self, name: str, _linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].detach()
        if self._reads[name] == name:
            flat = x.reshape(-1, x.shape[-1])
            add_gram(self._activations[name], flat)
            self._sums[name] += flat.sum(dim=0, dtype=torch.float32)
            self._require_finite(self._activations[name], x, name, "input activation")
        output.register_hook(partial(self._on_gradient, name))  # type: ignore[no-untyped-call]

    def _on_gradient(self, name: str, gradient: Tensor) -> None:
        add_gram(self._gradients[name], gradient.reshape(-1, gradient.shape[-1]))
        self._require_finite(self._gradients[name], gradient, name, "output gradient")

    def _require_finite(self, total: Tensor, values: Tensor, name: str, what: str) -> None:
        """Any NaN or infinity of a batch shows on the diagonal of the sums, which is cheap to look at."""
        if torch.isfinite(total.diagonal().sum()):
            return
        # Some models (OPT) give a linear one row a token, not one matrix a sequence.
        bad = ~torch.isfinite(values.reshape(self._n_sequences, -1)).all(dim=1)
        where = f"sequence {self._first_sequence + int(bad.nonzero()[0])}" if bad.any() else "the sum over sequences"
        raise NonFiniteError(
            f"non-finite {what} in {self._label}, linear {name}, {where}. The model or the calibration text makes its "
            f"numbers overflow: try model.dtype float32 or bfloat16, or leave that sequence out with another seed."
        )

    def factors(self) -> BlockFactors:
        """The means over all tokens seen; the observer's sums are used up by this call."""
        for square in (*self._activations.values(), *self._gradients.values()):
            mirror_lower(square.div_(self._n_tokens))
        means = {name: total / self._n_tokens for name, total in self._sums.items()}
        return BlockFactors(self._activations, means, self._gradients, self._reads, self._n_tokens)

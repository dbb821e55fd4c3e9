"""Hooks on the linears of one block: what all observers of a calibration pass have in common.

An observer sees the input of a linear when the block runs forward and the gradient of the loss at its output when it
runs backward, batch by batch, and keeps nothing of a batch but its contribution to some sums. Where a sum needs both,
what it needs of the input lives as long as the graph does.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from surgeon.choices import Precision
from surgeon.curvature.finite import Address, Watch, finite_sequences
from surgeon.curvature.gram import stays_short
from surgeon.precision import float32_products

INPUT = "input activation"
GRADIENT = "output gradient"


@dataclass(frozen=True)
class ObservedBlock:
    """The linears of one block, as an observer needs to know them.

    Attributes:
        label: how the block is called in error messages, for example "block 7".
        linears: by name, in module order. Their weights need not be in memory yet.
        shared: groups of names of linears that read the same input; each linear is in exactly one group.
        device: where the block runs.
    """

    label: str
    linears: Mapping[str, nn.Linear]
    shared: Sequence[Sequence[str]]
    device: str = "cpu"

    @property
    def reads(self) -> dict[str, str]:
        """For every linear, the first linear that reads the same input."""
        return {name: group[0] for group in self.shared for name in group}

    def augmented_features(self, name: str) -> int:
        """Inputs of a linear, and one more for its bias."""
        linear = self.linears[name]
        return linear.in_features + (linear.bias is not None)


class LinearObserver(ABC):
    """Accumulates sums over tokens for the linears of one block, while batches run through it.

    A context manager: the hooks are there inside. Sums are exact in float32 whatever the pass multiplies in.

    Attributes:
        needs_gradient: whether a backward pass has to follow the forward pass.
        block: what is observed.
        n_tokens: tokens seen by forward passes.
        n_gradients: tokens whose gradients are seen: each once for every draw of its sequence's targets.
    """

    needs_gradient: ClassVar[bool] = True

    def __init__(self, block: ObservedBlock) -> None:
        self.block = block
        self.n_tokens = 0
        self.n_gradients = 0
        self._first_sequence = 0
        self._n_sequences = 0
        self._watch: Watch | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        for name, linear in self.block.linears.items():
            self._handles.append(linear.register_forward_hook(partial(self._forward_hook, name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def leave_to(self, watch: Watch) -> None:
        """From now on what is not finite is found when the watch looks, at the end of a batch, not at once."""
        self._watch = watch

    def start_batch(self, first_sequence: int, n_sequences: int, length: int, n_draws: int = 1) -> None:
        """Announces a batch: the index of its first sequence (for error messages), its size, backward passes of it."""
        self._first_sequence = first_sequence
        self._n_sequences = n_sequences
        self.n_tokens += n_sequences * length
        self.n_gradients += n_sequences * length * n_draws

    def _forward_hook(self, name: str, _linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        with float32_products(Precision.FLOAT32):
            kept = self._on_input(name, inputs[0].detach())
        if self.needs_gradient:
            hook = partial(self._gradient_hook, name, kept)
            output.register_hook(hook)  # type: ignore[no-untyped-call]

    def _gradient_hook(self, name: str, kept: Any, gradient: Tensor) -> None:
        with float32_products(Precision.FLOAT32):
            self._on_gradient(name, kept, gradient.detach())

    def _on_input(self, name: str, x: Tensor) -> Any:
        """Sees the input of a linear, `[..., n_in]`, and says what its gradient will be met with: the input itself."""
        self._require_finite(x.sum(dtype=torch.float32), x, name, INPUT)
        return x

    @abstractmethod
    def _on_gradient(self, name: str, kept: Any, gradient: Tensor) -> None:
        """Sees the gradient at the output of a linear, `[..., n_out]`, once for every draw."""

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self.block.device)

    def _require_finite(self, witness: Tensor, values: Tensor, name: str, what: str) -> None:
        """Looks at a number that is not finite if any of the values is not; only then at the values themselves.

        Raises:
            NonFiniteError: naming block, linear and sequence.
        """
        address = Address(what, self.block.label, name, self._first_sequence)
        if self._watch is not None:
            self._watch.note(address, finite_sequences(values, self._n_sequences), witness)
        elif not torch.isfinite(witness):
            raise address.error(finite_sequences(values, self._n_sequences))


def tokens_of(x: Tensor) -> Tensor:
    """All tokens of a batch one after the other, `[n_tokens, n]` float32."""
    return x.reshape(-1, x.shape[-1]).float()


def short_tokens_of(x: Tensor) -> Tensor:
    """The same in the dtype of ``x`` where products of such numbers are summed in float32 as they are."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if stays_short(flat) else flat.float()


def augmented(x: Tensor, has_bias: bool) -> Tensor:
    """The input a linear with a bias sees, `[x, 1]` `[n_tokens, n_in + 1]`; without one, ``x`` itself."""
    return torch.cat([x, x.new_ones(len(x), 1)], dim=1) if has_bias else x

"""Curvature of all linears, one group of blocks at a time, and the forward pass that leads there.

1. `forward_group` carries hidden states through a group, without a graph: the *boundaries*.
2. `curvature_group` recomputes a group from its boundary with a graph, sends the gradient from above through it
   (from the loss itself for the last group), accumulates ``A`` and ``G`` of its linears on the way and returns the
   gradient at its input for the group below.

With one group for all blocks there is one forward and one backward and nothing is recomputed. Peak memory is one
group's weights and factors and one batch. Gradients are taken with respect to activations only.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from surgeon.curvature.factors import BlockFactors
from surgeon.curvature.observer import BlockObserver
from surgeon.errors import NonFiniteError
from surgeon.passes.blockwise import BlockwiseModel, Embedded
from surgeon.passes.groups import batches
from surgeon.passes.loss import next_token_loss

FloatArray = NDArray[np.float32]
TokenArray = NDArray[np.int64]
Progress = Callable[[int, int], None]
"""Called with (batches done, batches in all)."""


def no_progress(_done: int, _total: int) -> None:
    """Shows nothing."""


@dataclass(frozen=True)
class GroupCurvature:
    """What one group's pass gives.

    Attributes:
        factors: by block index.
        gradient_below: gradient of the loss at the group's input, `[n_sequences, length, width]` float32; None for
            the first group, below which nothing is pruned.
    """

    factors: dict[int, BlockFactors]
    gradient_below: FloatArray | None


def forward_group(
    model: BlockwiseModel,
    sequences: TokenArray,
    group: range,
    boundary: FloatArray | None,
    batch_size: int,
    progress: Progress = no_progress,
) -> FloatArray:
    """Carries hidden states through one group of blocks without a graph.

    Args:
        model: its blocks of the group are loaded for the duration of the call.
        sequences: `[n_sequences, length]` token ids.
        group: block indices.
        boundary: input of the group's first block, `[n_sequences, length, width]` float32; None for the first group.
        batch_size: sequences at a time.
        progress: told after each batch.

    Returns:
        Input of the block after the group, `[n_sequences, length, width]` float32.

    Raises:
        NonFiniteError: if hidden states are not finite; names the group and the sequence.
    """
    result: FloatArray | None = None
    parts = batches(len(sequences), batch_size)
    with torch.no_grad(), model.loaded(group):
        for done, part in enumerate(parts, start=1):
            embedded = _start(model, sequences[part], boundary, part)
            hidden = embedded.hidden
            for index in group:
                hidden = model.run_block(index, hidden, embedded.calls[index])
            _require_finite_hidden(hidden, group, part)
            if result is None:
                result = np.empty((len(sequences), *hidden.shape[1:]), dtype=np.float32)
            result[part] = hidden.float().cpu().numpy()
            progress(done, len(parts))
    assert result is not None, "no sequences"
    return result


def curvature_group(
    model: BlockwiseModel,
    sequences: TokenArray,
    group: range,
    boundary: FloatArray | None,
    gradient_above: FloatArray | None,
    batch_size: int,
    progress: Progress = no_progress,
) -> GroupCurvature:
    """Factors of all linears of one group of blocks, and the gradient at its input.

    Args:
        model: its blocks of the group are loaded for the duration of the call.
        sequences: `[n_sequences, length]` token ids.
        group: block indices.
        boundary: input of the group's first block, `[n_sequences, length, width]`; None for the first group.
        gradient_above: gradient of the loss at the group's output, same shape; None for the last group, which takes
            it from the loss (summed over tokens).
        batch_size: sequences at a time; the factors are sums over batches, so it changes their last bits.
        progress: told after each batch.

    Raises:
        NonFiniteError: if an activation or gradient is not finite; names block, linear and sequence.
    """
    first = group.start == 0
    below: FloatArray | None = None
    parts = batches(len(sequences), batch_size)
    with model.loaded(group), ExitStack() as stack:
        observers = {
            index: stack.enter_context(BlockObserver(f"block {index}", model.linears(index), model.shared(index)))
            for index in group
        }
        for done, part in enumerate(parts, start=1):
            tokens = sequences[part]
            for observer in observers.values():
                observer.start_batch(part.start, *tokens.shape)
            embedded = _start(model, tokens, boundary, part)
            above = None if gradient_above is None else torch.from_numpy(gradient_above[part])
            gradient = _backward(model, tokens, embedded, group, above)
            if not first:
                if below is None:
                    below = np.empty((len(sequences), *gradient.shape[1:]), dtype=np.float32)
                below[part] = gradient.float().cpu().numpy()
            progress(done, len(parts))
        factors = {index: observer.factors() for index, observer in observers.items()}
    return GroupCurvature(factors, below)


def _start(model: BlockwiseModel, tokens: TokenArray, boundary: FloatArray | None, part: slice) -> Embedded:
    """Input of a group for one batch: embedded tokens, or the stored boundary with the blocks' arguments."""
    embedded = model.embed(torch.from_numpy(tokens))
    if boundary is None:
        return embedded
    hidden = torch.from_numpy(boundary[part]).to(device=model.device, dtype=model.dtype)
    return Embedded(hidden, embedded.calls)


def _backward(
    model: BlockwiseModel, tokens: TokenArray, embedded: Embedded, group: range, above: Tensor | None
) -> Tensor:
    """Forward with a graph through the group, backward to its input: `[n_sequences, length, width]`."""
    start = embedded.hidden.detach().requires_grad_()
    hidden = start
    for index in group:
        hidden = model.run_block(index, hidden, embedded.calls[index])
    if above is not None:
        return torch.autograd.grad(hidden, start, above.to(hidden))[0]
    input_ids = torch.from_numpy(tokens)
    loss = next_token_loss(model.head(input_ids, hidden), input_ids)
    return torch.autograd.grad(loss, start)[0]


def _require_finite_hidden(hidden: Tensor, group: range, part: slice) -> None:
    # In float16 a sum of finite numbers overflows easily.
    finite = torch.isfinite(hidden.flatten(1).sum(dim=1, dtype=torch.float32))
    if not finite.all():
        where = f"sequence {part.start + int((~finite).nonzero()[0])}"
        raise NonFiniteError(
            f"non-finite hidden states after blocks {group.start} to {group.stop - 1}, {where}. "
            "Try model.dtype float32 or bfloat16, or leave that sequence out with another seed."
        )

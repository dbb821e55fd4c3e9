"""Statistics of all linears, one group of blocks at a time, and the forward pass that leads there.

1. `forward_group` carries hidden states through a group, without a graph: the *boundaries*.
2. `curvature_group` recomputes a group from its boundary with a graph, sends the gradient from above through it
   (from the loss itself for the last group), lets observers see what flows through its linears on the way and returns
   the gradient at its input for the group below. With sampled targets it does so once for every draw.

With one group for all blocks there is one forward and one backward and nothing is recomputed. Peak memory is one
group's weights and statistics and one batch. Gradients are taken with respect to activations only.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from surgeon.choices import Device
from surgeon.curvature.finite import Watch
from surgeon.curvature.observer import LinearObserver, ObservedBlock
from surgeon.errors import NonFiniteError
from surgeon.passes.blockwise import BlockwiseModel, Embedded
from surgeon.passes.groups import batches
from surgeon.passes.loss import target_loss
from surgeon.passes.targets import EMPIRICAL, TokenTargets
from surgeon.repeatable import repeatable
from surgeon.transfer import host_buffer

FloatArray = NDArray[np.float32]
TokenArray = NDArray[np.int64]
Progress = Callable[[int, int], None]
"""Called with (batches done, batches in all)."""


def no_progress(_done: int, _total: int) -> None:
    """Shows nothing."""


@dataclass(frozen=True)
class GroupPass:
    """What a pass through one group of blocks runs on.

    Attributes:
        sequences: `[n_sequences, length]` token ids.
        group: block indices.
        batch_size: sequences at a time; statistics are sums over batches, so it changes their last bits.
        boundary: input of the group's first block, `[n_sequences, length, width]` float32; None for the first group.
        gradient_above: gradient of the loss at the group's output, as the pass of the group above returned it; None
            for the last group, which takes it from the loss (summed over tokens).
        targets: next tokens the loss is taken for.
        needs_gradient: without, the pass ends at the last block: there is no graph, no loss and no gradient.
        first_sequence: index of the first sequence among all, where these are a shard of them.
    """

    sequences: TokenArray
    group: range
    batch_size: int
    boundary: FloatArray | None = None
    gradient_above: FloatArray | None = None
    targets: TokenTargets = EMPIRICAL
    needs_gradient: bool = True
    first_sequence: int = 0


def forward_group(
    model: BlockwiseModel,
    sequences: TokenArray,
    group: range,
    boundary: FloatArray | None,
    batch_size: int,
    progress: Progress = no_progress,
    first_sequence: int = 0,
) -> FloatArray:
    """Carries hidden states through one group of blocks without a graph.

    Args:
        model: its blocks of the group are loaded for the duration of the call.
        sequences: `[n_sequences, length]` token ids.
        group: block indices.
        boundary: input of the group's first block, `[n_sequences, length, width]` float32; None for the first group.
        batch_size: sequences at a time.
        progress: told after each batch.
        first_sequence: index of the first sequence among all, where these are a shard of them.

    Returns:
        Input of the block after the group, `[n_sequences, length, width]` float32.

    Raises:
        NonFiniteError: if hidden states are not finite; names the group and the sequence.
    """
    result: Tensor | None = None
    parts = batches(len(sequences), batch_size)
    with torch.no_grad(), model.loaded(group):
        for done, part in enumerate(parts, start=1):
            embedded = _start(model, sequences[part], boundary, part)
            hidden = _forward(model, group, embedded.hidden, embedded)
            _require_finite_hidden(hidden, group, first_sequence + part.start)
            if result is None:
                result = host_buffer((len(sequences), *hidden.shape[1:]), hidden)
            result[part].copy_(hidden, non_blocking=True)
            progress(done, len(parts))
    assert result is not None, "no sequences"
    return _arrived(result, hidden)


def curvature_group(
    model: BlockwiseModel,
    what: GroupPass,
    observers: Mapping[int, Sequence[LinearObserver]],
    progress: Progress = no_progress,
) -> FloatArray | None:
    """Feeds observers with what flows through the linears of one group of blocks.

    Args:
        model: its blocks of the group are loaded for the duration of the call.
        what: the group, and what enters it from below and from above.
        observers: by block of the group; a block may have none.
        progress: told after each batch.

    Returns:
        Gradient of the loss at the group's input for the group below: `[n_sequences, length, width]` float32, with
        sampled targets `[n_draws, n_sequences, length, width]`. None for the first group, below which nothing is
        pruned, and if no gradient is needed.

    Raises:
        NonFiniteError: if an activation or gradient is not finite; names block, linear and sequence.
        ValueError: if an observer needs gradients and the pass gives none.
    """
    everyone = [observer for index in what.group for observer in observers.get(index, ())]
    if not what.needs_gradient and any(observer.needs_gradient for observer in everyone):
        raise ValueError("an observer needs gradients, but the pass is forward only (needs_gradient=False)")
    below: Tensor | None = None
    parts = batches(len(what.sequences), what.batch_size)
    n_draws = what.targets.draws
    with model.loaded(what.group), ExitStack() as stack:
        watch = _watched(everyone, model.device)
        for observer in everyone:
            stack.enter_context(observer)
        for done, part in enumerate(parts, start=1):
            tokens = what.sequences[part]
            n_sequences, length = tokens.shape
            for observer in everyone:
                observer.start_batch(what.first_sequence + part.start, n_sequences, length, n_draws)
            embedded = _start(model, tokens, what.boundary, part)
            if what.needs_gradient:
                for draw, gradient in enumerate(_gradients(model, what, embedded, part)):
                    if what.group.start == 0:
                        continue
                    if below is None:
                        below = host_buffer((n_draws, len(what.sequences), *gradient.shape[1:]), gradient)
                    below[draw, part].copy_(gradient, non_blocking=True)
            else:
                with torch.no_grad():
                    _forward(model, what.group, embedded.hidden, embedded)
            watch.end_batch()
            progress(done, len(parts))
    if below is None:
        return None
    arrived = _arrived(below, gradient)
    return arrived if what.targets.sampled else arrived[0]


def _arrived(values: Tensor, source: Tensor) -> FloatArray:
    """Values as an array, once all copies from where they were computed have ended."""
    if source.is_cuda:
        torch.cuda.current_stream(source.device).synchronize()
    return values.numpy()


def observed_block(model: BlockwiseModel, index: int, names: Collection[str] | None = None) -> ObservedBlock:
    """The linears of one block for its observers, all or those named; the block need not be loaded yet."""
    linears, shared = model.linears(index), model.shared(index)
    if names is not None:
        linears = {name: linear for name, linear in linears.items() if name in names}
        groups = (tuple(name for name in group if name in names) for group in shared)
        shared = tuple(group for group in groups if group)
    return ObservedBlock(f"block {index}", linears, shared, model.device)


def _watched(observers: Sequence[LinearObserver], device: str) -> Watch:
    """What the observers of a GPU leave to look at to, once a batch; on a CPU they look themselves, at once."""
    watch = Watch()
    if device != Device.CPU:
        for observer in observers:
            observer.leave_to(watch)
    return watch


def _start(model: BlockwiseModel, tokens: TokenArray, boundary: FloatArray | None, part: slice) -> Embedded:
    """Input of a group for one batch: embedded tokens, or the stored boundary with the blocks' arguments."""
    embedded = model.embed(torch.from_numpy(tokens))
    if boundary is None:
        return embedded
    hidden = torch.from_numpy(boundary[part]).to(device=model.device, dtype=model.dtype)
    return Embedded(hidden, embedded.calls)


def _forward(model: BlockwiseModel, group: range, hidden: Tensor, embedded: Embedded) -> Tensor:
    """Runs the blocks of a group one after the other."""
    for index in group:
        hidden = model.run_block(index, hidden, embedded.calls[index])
    return hidden


def _gradients(model: BlockwiseModel, what: GroupPass, embedded: Embedded, part: slice) -> Iterator[Tensor]:
    """One forward with a graph through the group, and for each draw a backward to its input.

    Yields:
        `[n_sequences, length, width]`.
    """
    start = embedded.hidden.detach().requires_grad_()
    with repeatable(model.device, strict=True):  # attention chooses here how it will go backward
        hidden = _forward(model, what.group, start, embedded)
    last = what.targets.draws - 1
    if what.gradient_above is not None:
        # Without draws the array has no axis for them.
        by_draw = what.gradient_above if what.targets.sampled else what.gradient_above[None]
        for draw in range(last + 1):
            above = torch.from_numpy(by_draw[draw, part]).to(hidden)
            yield _backward(hidden, start, above, retain_graph=draw < last)
        return
    input_ids = torch.from_numpy(what.sequences[part])
    logits = model.head(input_ids, hidden)
    first = what.first_sequence + part.start
    for draw in range(last + 1):
        loss = target_loss(logits, what.targets.next_tokens(logits, input_ids, first, draw))
        yield _backward(loss, start, None, retain_graph=draw < last)


def _backward(output: Tensor, start: Tensor, above: Tensor | None, *, retain_graph: bool) -> Tensor:
    with repeatable(start.device, strict=True):
        return torch.autograd.grad(output, start, above, retain_graph=retain_graph)[0]


def _require_finite_hidden(hidden: Tensor, group: range, first_sequence: int) -> None:
    # In float16 a sum of finite numbers overflows easily.
    finite = torch.isfinite(hidden.flatten(1).sum(dim=1, dtype=torch.float32))
    if not finite.all():
        where = f"sequence {first_sequence + int((~finite).nonzero()[0])}"
        raise NonFiniteError(
            f"non-finite hidden states after blocks {group.start} to {group.stop - 1}, {where}. "
            "Try model.dtype float32 or bfloat16, or leave that sequence out with another seed."
        )

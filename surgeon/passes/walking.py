"""One forward pass through all blocks, group by group, that lets a visitor run each of them.

Peak memory is one group's weights, one batch, and hidden states of all sequences twice where there are several groups.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from surgeon.errors import NonFiniteError
from surgeon.passes.blockwise import BlockCall, BlockwiseModel, Embedded
from surgeon.passes.curvature import FloatArray, Progress, TokenArray, no_progress
from surgeon.passes.groups import batches

Visit = Callable[[int, slice, Tensor, BlockCall], Tensor]
"""Runs one loaded block: gets its index, which sequences these are, their hidden states and the block's arguments."""


def walk_blocks(
    model: BlockwiseModel,
    sequences: TokenArray,
    groups: list[range],
    batch_size: int,
    visit: Visit,
    progress: Progress = no_progress,
) -> None:
    """Carries hidden states through all blocks without a graph.

    Args:
        model: its blocks are loaded one group at a time.
        sequences: `[n_sequences, length]` token ids.
        groups: blocks in consecutive groups, first to last.
        batch_size: sequences at a time.
        visit: runs each block.
        progress: told after each batch of each group.

    Raises:
        NonFiniteError: hidden states are not finite; names the block and the sequence.
    """
    boundary: FloatArray | None = None
    parts = batches(len(sequences), batch_size)
    for n_before, group in enumerate(groups):
        leaving: FloatArray | None = None
        with torch.no_grad(), model.loaded(group):
            for done, part in enumerate(parts, start=1):
                embedded = start_batch(model, sequences[part], boundary, part)
                hidden = embedded.hidden
                for index in group:
                    hidden = visit(index, part, hidden, embedded.calls[index])
                    require_finite(hidden, f"after block {index}", part)
                if group is not groups[-1]:
                    if leaving is None:
                        leaving = empty_hidden(len(sequences), hidden)
                    leaving[part] = hidden.float().cpu().numpy()
                progress(n_before * len(parts) + done, len(groups) * len(parts))
        boundary = leaving


def start_batch(model: BlockwiseModel, tokens: TokenArray, boundary: FloatArray | None, part: slice) -> Embedded:
    """What enters a group for one batch, with the blocks' arguments.

    Args:
        model: opened block-wise.
        tokens: of the batch, `[n, length]`.
        boundary: hidden states of all sequences that enter the group, float32; None for the first group.
        part: which sequences these are.
    """
    embedded = model.embed(torch.from_numpy(tokens))
    if boundary is None:
        return embedded
    return Embedded(torch.from_numpy(boundary[part]).to(device=model.device, dtype=model.dtype), embedded.calls)


def empty_hidden(n_sequences: int, like: Tensor) -> FloatArray:
    """Room for hidden states of all sequences, `[n_sequences, length, width]` float32."""
    return np.empty((n_sequences, *like.shape[1:]), dtype=np.float32)


def require_finite(values: Tensor, where: str, part: slice) -> None:
    """Refuses values `[n_sequences, ...]` that are not finite.

    Raises:
        NonFiniteError: names the place and the first sequence.
    """
    # In float16 a sum of finite numbers overflows easily.
    finite = torch.isfinite(values.flatten(1).sum(dim=1, dtype=torch.float32))
    if not finite.all():
        sequence = part.start + int((~finite).nonzero()[0])
        raise NonFiniteError(
            f"values that are not finite {where}, sequence {sequence}. Try model.dtype float32 or bfloat16, or leave "
            "that sequence out with another seed."
        )

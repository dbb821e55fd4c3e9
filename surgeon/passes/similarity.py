"""How much blocks, and their attention and MLP apart, turn the hidden states.

With ``x_i`` what enters block i for one token (``x_L`` leaves the last block), ``cos`` the cosine of two vectors:

- block influence ``1 - E cos(x_i, x_{i+1})`` over all tokens;
- angular distance ``E arccos(cos(x_i, x_j)) / π`` over sequences, of the last token, for every pair ``i, j``;
- for sub-layers, with ``h_i`` what leaves block i without the output of its MLP: attention ``1 - E cos(x_i, h_i)``, MLP
  ``1 - E cos(h_i, x_{i+1})``. In a block whose attention and MLP run beside each other, ``h_i`` is the input and the
  attention's output, so that the MLP is measured on top of the attention there too.

All sums are in float64. Hidden states of the last token are held for all blocks: ``(n_blocks + 1)`` vectors a sequence.

Reference: Men et al. 2024, *ShortGPT*; Gromov et al. 2024; He et al. 2024 (LLM-Drop).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from surgeon.passes.blockwise import BlockCall, BlockwiseModel
from surgeon.passes.curvature import Progress, TokenArray, no_progress
from surgeon.passes.walking import require_finite, walk_blocks

Array = NDArray[np.float64]


@dataclass(frozen=True)
class BlockSimilarity:
    """What one forward pass says of all blocks.

    Attributes:
        influence: block influence, `[n_blocks]` float64.
        angles: angular distance of every pair, `[n_blocks + 1, n_blocks + 1]` float64, symmetric, 0 to 1.
        n_tokens: behind the influence.
        n_sequences: behind the angles.
    """

    influence: Array
    angles: Array
    n_tokens: int
    n_sequences: int


@dataclass(frozen=True)
class SubLayerSimilarity:
    """The same for the attention and the MLP of every block.

    Attributes:
        attention: `[n_blocks]` float64.
        mlp: `[n_blocks]` float64.
        n_tokens: behind both.
    """

    attention: Array
    mlp: Array
    n_tokens: int


def measure_blocks(
    model: BlockwiseModel,
    sequences: TokenArray,
    groups: list[range],
    batch_size: int,
    progress: Progress = no_progress,
) -> BlockSimilarity:
    """Block influence of all blocks and angular distances of all pairs from one forward pass.

    Args:
        model: opened block-wise.
        sequences: `[n_sequences, length]` token ids.
        groups: blocks in consecutive groups, first to last.
        batch_size: sequences at a time.
        progress: told after each batch of each group.

    Raises:
        NonFiniteError: a hidden state is not finite, or zero so that it has no direction; names block and sequence.
    """
    n_blocks, n_sequences = model.n_blocks, len(sequences)
    cosines = np.zeros(n_blocks)
    directions: list[list[Tensor]] = [[] for _ in range(n_blocks + 1)]

    def visit(index: int, part: slice, hidden: Tensor, call: BlockCall) -> Tensor:
        output = model.run_block(index, hidden, call)
        before, after = _directions(hidden, index, part), _directions(output, index + 1, part)
        cosines[index] += float((before * after).sum())
        directions[index].append(before[:, -1].cpu())
        if index == n_blocks - 1:
            directions[n_blocks].append(after[:, -1].cpu())
        return output

    walk_blocks(model, sequences, groups, batch_size, visit, progress)
    last = torch.stack([torch.cat(parts) for parts in directions])
    return BlockSimilarity(1.0 - cosines / sequences.size, mean_angles(last), int(sequences.size), n_sequences)


def mean_angles(directions: Tensor) -> Array:
    """Mean angle over π of every pair, `[n, n]` float64.

    Args:
        directions: `[n, n_sequences, width]` float64, each of length 1.
    """
    total = torch.zeros(len(directions), len(directions), dtype=torch.float64)
    for vectors in directions.unbind(1):
        # Half of the angle from chord and sum: the arccosine of a cosine close to 1 has half of the digits.
        chord = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist")
        opposite = torch.cdist(vectors, -vectors, compute_mode="donot_use_mm_for_euclid_dist")
        total += 2 * torch.atan2(chord, opposite)
    angles: Array = (total / (directions.shape[1] * torch.pi)).numpy()
    return angles


def measure_sub_layers(
    model: BlockwiseModel,
    sequences: TokenArray,
    groups: list[range],
    batch_size: int,
    mlp_outputs: Sequence[str],
    progress: Progress = no_progress,
) -> SubLayerSimilarity:
    """How much attention and MLP turn the hidden states, block by block; each block runs twice.

    Args:
        model: opened block-wise.
        sequences: `[n_sequences, length]` token ids.
        groups: blocks in consecutive groups, first to last.
        batch_size: sequences at a time.
        mlp_outputs: for each block, the name of the linear that writes the output of its MLP.
        progress: told after each batch of each group.

    Raises:
        NonFiniteError: a hidden state is not finite, or zero so that it has no direction; names block and sequence.
    """
    totals = np.zeros((2, model.n_blocks))

    def visit(index: int, part: slice, hidden: Tensor, call: BlockCall) -> Tensor:
        with silenced(model.linears(index)[mlp_outputs[index]]):
            between = model.run_block(index, hidden, call)
        output = model.run_block(index, hidden, call)
        before, half, after = (_directions(x, index, part) for x in (hidden, between, output))
        totals[0, index] += float((before * half).sum())
        totals[1, index] += float((half * after).sum())
        return output

    walk_blocks(model, sequences, groups, batch_size, visit, progress)
    attention, mlp = 1.0 - totals / sequences.size
    return SubLayerSimilarity(attention, mlp, int(sequences.size))


@contextmanager
def silenced(linear: nn.Linear) -> Iterator[None]:
    """While open, the linear gives zeros, its bias left out too."""
    handle = linear.register_forward_hook(lambda _module, _inputs, output: torch.zeros_like(output))
    try:
        yield
    finally:
        handle.remove()


def _directions(hidden: Tensor, index: int, part: slice) -> Tensor:
    """Vectors of length 1, `[n_sequences, length, width]` float64."""
    exact = hidden.double()
    directions: Tensor = exact / exact.norm(dim=-1, keepdim=True)
    require_finite(directions, f"among the directions of hidden states near block {index}", part)
    return directions

"""Driving the passes over all groups as documented: boundaries first to last, curvature last to first."""

import numpy as np

from surgeon.passes.blockwise import BlockwiseModel
from surgeon.passes.curvature import curvature_group, forward_group
from surgeon.passes.groups import block_groups

N_SEQUENCES = 5
LENGTH = 12


def sequences_of(n_sequences=N_SEQUENCES, length=LENGTH, seed=0):
    """Random tokens without the special ones, and without those from 260 on, which tests use for themselves."""
    return np.random.default_rng(seed).integers(4, 260, (n_sequences, length))


def grouped_curvature(model: BlockwiseModel, sequences, blocks_per_group, batch_size):
    """Factors by block, boundaries and gradients below by the first block of each group but the first."""
    groups = block_groups(model.n_blocks, blocks_per_group)
    boundaries = {0: None}
    for group in groups[:-1]:
        boundaries[group.stop] = forward_group(model, sequences, group, boundaries[group.start], batch_size)
    factors, gradients, above = {}, {}, None
    for group in reversed(groups):
        result = curvature_group(model, sequences, group, boundaries[group.start], above, batch_size)
        factors.update(result.factors)
        gradients[group.start] = above = result.gradient_below
    return factors, boundaries, gradients

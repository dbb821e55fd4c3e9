"""Driving the passes over all groups as documented: boundaries first to last, curvature last to first."""

from dataclasses import dataclass, replace

import numpy as np

from surgeon.curvature.factors import LinearFactors
from surgeon.curvature.kronecker_factors import InputObserver, OutputObserver
from surgeon.passes.blockwise import BlockwiseModel
from surgeon.passes.curvature import GroupPass, curvature_group, forward_group, no_progress, observed_block
from surgeon.passes.groups import block_groups
from surgeon.passes.targets import EMPIRICAL

N_SEQUENCES = 5
LENGTH = 12


def sequences_of(n_sequences=N_SEQUENCES, length=LENGTH, seed=0):
    """Random tokens without the special ones, and without those from 260 on, which tests use for themselves."""
    return np.random.default_rng(seed).integers(4, 260, (n_sequences, length))


@dataclass
class Kfac:
    """Factors of K-FAC of one block."""

    activations: dict
    mean_inputs: dict
    gradients: dict
    reads: dict
    n_tokens: int

    def linear(self, name):
        source = self.reads[name]
        return LinearFactors(self.activations[source], self.mean_inputs[source], self.gradients[name])


def kfac_of(observers):
    """What the observers of one block for K-FAC have found."""
    inputs, outputs = (observer.result() for observer in observers)
    return Kfac(inputs.activations, inputs.mean_inputs, outputs, inputs.reads, inputs.n_tokens)


def kfac_observers(block):
    return InputObserver(block), OutputObserver(block)


def kfac_group(model, sequences, group, boundary, above, batch_size, progress=no_progress):
    """Factors of K-FAC by block of one group, and the gradient below it."""
    observers = {index: kfac_observers(observed_block(model, index)) for index in group}
    below = curvature_group(model, GroupPass(sequences, group, batch_size, boundary, above), observers, progress)
    return {index: kfac_of(each) for index, each in observers.items()}, below


def observe(model: BlockwiseModel, sequences, make, blocks_per_group=3, batch_size=2, targets=EMPIRICAL):
    """Runs over all groups with the observers that ``make`` gives for each observed block.

    Returns:
        The observers by block, boundaries by the block they enter, and gradients below by the first block of a group.
    """
    groups = block_groups(model.n_blocks, blocks_per_group)
    boundaries = {0: None}
    for group in groups[:-1]:
        boundaries[group.stop] = forward_group(model, sequences, group, boundaries[group.start], batch_size)
    observers, gradients, above = {}, {}, None
    for group in reversed(groups):
        mine = {index: make(index, observed_block(model, index)) for index in group}
        what = GroupPass(sequences, group, batch_size, boundaries[group.start], targets=targets)
        gradients[group.start] = above = curvature_group(model, replace(what, gradient_above=above), mine)
        observers.update(mine)
    return observers, boundaries, gradients


def grouped_curvature(model: BlockwiseModel, sequences, blocks_per_group, batch_size):
    """Factors by block, boundaries and gradients below by the first block of each group but the first."""
    found = observe(model, sequences, lambda _index, block: kfac_observers(block), blocks_per_group, batch_size)
    return {index: kfac_of(each) for index, each in found[0].items()}, *found[1:]

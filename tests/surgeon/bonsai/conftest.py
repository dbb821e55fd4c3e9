"""Whole tiny models with their parts, as the library of Bonsai takes them."""

from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from surgeon.bonsai.parts import MaskedPart
from surgeon.passes.blockwise import BlockwiseModel
from surgeon.pruning.units import Shape, SubLayer, sub_layers


@dataclass
class Whole:
    """A model with all blocks loaded."""

    blockwise: BlockwiseModel
    sub_layers: list[SubLayer]
    parts: list[MaskedPart]
    tokens: np.ndarray

    @property
    def model(self):
        return self.blockwise.model


@pytest.fixture
def whole_of(checkpoint_of):
    """Family → its tiny model, all parts of it and six sequences of twelve tokens."""

    stack = ExitStack()

    def get(family):
        blockwise = BlockwiseModel(checkpoint_of(family))
        stack.enter_context(blockwise.loaded(range(blockwise.n_blocks)))
        subs, parts = [], []
        for block, couplings in enumerate(blockwise.architecture.couplings):
            linears = blockwise.linears(block)
            shapes = {n: Shape(li.out_features, li.in_features, li.bias is not None) for n, li in linears.items()}
            for sub in sub_layers(couplings, shapes):
                subs.append(sub)
                parts.append(MaskedPart(block, sub.kind, linears[sub.output], sub.n_units, sub.width))
        tokens = torch.randint(4, 272, (6, 12), generator=torch.Generator().manual_seed(1)).numpy()
        return Whole(blockwise, subs, parts, tokens)

    with stack:
        yield get

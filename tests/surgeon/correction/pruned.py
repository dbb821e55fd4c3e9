"""Tiny models with some weights removed, and what their live weights are."""

import torch

from surgeon.models import Checkpoint
from surgeon.passes.blockwise import BlockwiseModel


def pruned_model(checkpoint: Checkpoint, single_weights: bool, seed: int = 0, dtype: torch.dtype = torch.float32):
    """A model opened block-wise with removed rows, columns and, if asked for, single weights; and its live weights.

    Row 1 of every linear is dead, with its bias; so is column 2; the second linear of each block lives in full.
    """
    dense = BlockwiseModel(checkpoint)
    generator = torch.Generator().manual_seed(seed)
    live, tensors = {}, {}
    with dense.loaded(range(dense.n_blocks)):
        for index in range(dense.n_blocks):
            for place, (name, linear) in enumerate(dense.linears(index).items()):
                full = f"{dense.prefix(index)}.{name}"
                mask = torch.ones_like(linear.weight, dtype=torch.bool)
                if single_weights:
                    mask &= torch.rand(mask.shape, generator=generator) > 0.3
                if place != 1:
                    mask[1], mask[:, 2] = False, False
                live[full] = mask
                tensors[f"{full}.weight"] = torch.where(mask, linear.weight, 0.0)
                if linear.bias is not None:
                    tensors[f"{full}.bias"] = linear.bias * mask.any(dim=1)

    def overrides(index):
        inside = f"{dense.prefix(index)}."
        return {name: tensor for name, tensor in tensors.items() if name.startswith(inside)}

    return BlockwiseModel(checkpoint, overrides=overrides, dtype=dtype), live, tensors

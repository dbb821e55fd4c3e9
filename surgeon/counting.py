"""Counting parameters, zeros and bytes of a model, a block at a time."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from surgeon.passes.blockwise import BlockwiseModel


@dataclass(frozen=True)
class ModelCounts:
    """How large a model is.

    Attributes:
        parameters: all parameters, tied ones once.
        nonzero: those that are not exactly zero.
        linear_weights: weights of all decoder linears, biases not counted: what sparsity is a fraction of.
        linear_nonzero: those that are not exactly zero.
        bytes: of all parameters as stored in the model's dtype.
    """

    parameters: int
    nonzero: int
    linear_weights: int
    linear_nonzero: int
    bytes: int


def count_model(model: BlockwiseModel) -> ModelCounts:
    """Counts a model, loading one block at a time. What is removed counts as zeros, whole blocks too."""
    in_blocks = {id(p) for index in range(model.n_blocks) for p in model.block(index).parameters()}
    parameters, nonzero, size = _tally(p for p in _unique(model.model.parameters()) if id(p) not in in_blocks)
    linear_weights = linear_nonzero = 0
    for index in range(model.n_blocks):
        with model.loaded(range(index, index + 1)):
            counts = _tally(model.block(index).parameters())
            parameters, nonzero, size = parameters + counts[0], nonzero + counts[1], size + counts[2]
            for name in model.architecture.linear_names(index):
                weight = model.architecture.linear(model.model, index, name).weight
                linear_weights += weight.numel()
                linear_nonzero += _count_nonzero(weight)
    return ModelCounts(parameters, nonzero, linear_weights, linear_nonzero, size)


def _unique(parameters: Iterable[Tensor]) -> list[Tensor]:
    return list({id(p): p for p in parameters}.values())


def _tally(parameters: Iterable[Tensor]) -> tuple[int, int, int]:
    """Number, number of non-zeros and bytes."""
    tensors = list(parameters)
    return (
        sum(p.numel() for p in tensors),
        sum(map(_count_nonzero, tensors)),
        sum(p.numel() * p.element_size() for p in tensors),
    )


def _count_nonzero(tensor: Tensor) -> int:
    return 0 if tensor.is_meta else int(torch.count_nonzero(tensor))

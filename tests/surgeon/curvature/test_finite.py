"""Non-finite values are found at the end of a batch with the same address as at once."""

import pytest
import torch
from torch import nn

from surgeon.curvature.finite import Watch
from surgeon.curvature.kronecker_factors import InputObserver, OutputObserver
from surgeon.curvature.observer import ObservedBlock
from surgeon.errors import NonFiniteError


def run(inputs: torch.Tensor, above: torch.Tensor, watch: Watch | None) -> None:
    """A batch of three sequences of two tokens, the first of which is sequence 6, through a block of two linears."""
    linears = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    for linear in linears.values():
        nn.init.eye_(linear.weight)
    block = ObservedBlock("block 5", dict(linears.items()), [("a",), ("b",)])
    observers = [InputObserver(block), OutputObserver(block)]
    for observer in observers:
        if watch is not None:
            observer.leave_to(watch)
        observer.start_batch(6, 3, 2)
    with observers[0], observers[1]:
        start = inputs.clone().requires_grad_()
        torch.autograd.grad(linears["b"](linears["a"](start)), start, above)
    if watch is not None:
        watch.end_batch()


@pytest.mark.parametrize("watched", [False, True])
def test_names_block_linear_and_sequence(watched: bool):
    inputs, above = torch.ones(3, 2, 4), torch.ones(3, 2, 4)
    run(inputs, above, Watch() if watched else None)
    inputs[2, 1, 3] = torch.nan
    with pytest.raises(NonFiniteError, match="non-finite input activation in block 5, linear a, sequence 8"):
        run(inputs, above, Watch() if watched else None)
    above[1, 0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match="non-finite output gradient in block 5, linear b, sequence 7"):
        run(torch.ones(3, 2, 4), above, Watch() if watched else None)


@pytest.mark.parametrize("watched", [False, True])
def test_finite_values_whose_sum_overflows(watched: bool):
    with pytest.raises(NonFiniteError, match="linear a, the sum over sequences"):
        run(torch.full((3, 2, 4), 3e38), torch.ones(3, 2, 4), Watch() if watched else None)


def test_nothing_of_a_batch_is_left_for_the_next():
    watch, inputs = Watch(), torch.ones(3, 2, 4)
    inputs[0] = torch.nan
    with pytest.raises(NonFiniteError):
        run(inputs, torch.ones(3, 2, 4), watch)
    watch.end_batch()
    run(torch.ones(3, 2, 4), torch.ones(3, 2, 4), watch)

"""Finds which linears of a block read the same input, and so share one input factor of the curvature."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class _SeenInput:
    """An input tensor as a linear got it; holding it keeps its memory from being used for another tensor."""

    tensor: torch.Tensor
    version: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "_SeenInput":
        # Tensors made in inference mode do not count their in-place changes.
        return cls(tensor, 0 if tensor.is_inference() else tensor._version)

    def same_as(self, other: "_SeenInput") -> bool:
        """Says whether both have the same values for certain: same memory, read the same way, not changed between."""
        if self.version != other.version:
            return False
        a, b = self.tensor, other.tensor
        if a is b:
            return True
        if a.device.type == "meta" or b.device.type == "meta":
            return False
        same_view = a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
        return same_view and a.device == b.device and a.data_ptr() == b.data_ptr()


def shared_inputs(block: nn.Module, run: Callable[[], object], linears: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Groups the linears of a block by the tensor they read.

    Nothing is assumed from names: the block is run once and what each linear is given is compared by identity. Views of
    the same memory with the same shape and strides, unchanged in between, count as the same.

    Args:
        block: A decoder block with its weights loaded.
        run: Runs the block once, for instance on one captured batch. Not under `torch.inference_mode`, where in-place
            changes between two linears could not be seen.
        linears: Dotted names of the linears relative to the block.

    Returns:
        Groups of names that share an input, in the order of `linears`. A linear that did not run is alone in its group.
    """
    seen: dict[str, _SeenInput] = {}

    def remember(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensor = args[0] if args else kwargs["input"]
            seen.setdefault(name, _SeenInput.of(tensor))

        return hook

    handles = [
        block.get_submodule(name).register_forward_pre_hook(remember(name), with_kwargs=True) for name in linears
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    groups: list[list[str]] = []
    for name in linears:
        home = next((group for group in groups if _share(seen, group[0], name)), None)
        if home is None:
            groups.append([name])
        else:
            home.append(name)
    return tuple(tuple(group) for group in groups)


def _share(seen: dict[str, _SeenInput], first: str, second: str) -> bool:
    return first in seen and second in seen and seen[first].same_as(seen[second])

"""Configurations of models that have lost whole decoder blocks."""

from collections.abc import Mapping, Sequence
from typing import Any

COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""Names by which configurations give the number of decoder blocks."""


def per_layer_changes(config: Mapping[str, Any], n_blocks: int, kept: Sequence[int]) -> dict[str, Any]:
    """What changes in a configuration when only some blocks are left.

    Args:
        config: flat part of the configuration that describes the decoder.
        n_blocks: blocks it describes.
        kept: indices of those that stay, ascending.

    Returns:
        New values by name: the number of blocks, lists with an entry for each block, limits on the index of a block.
    """
    changes: dict[str, Any] = {}
    for name, value in config.items():
        if name in COUNTS and value == n_blocks:
            changes[name] = len(kept)
        elif isinstance(value, list | tuple) and len(value) == n_blocks:
            changes[name] = [value[index] for index in kept]
        elif name == "max_window_layers" and isinstance(value, int):
            changes[name] = sum(index < value for index in kept)
    return changes

"""Configurations of models that have lost whole decoder blocks."""

from collections.abc import Mapping, Sequence
from typing import Any

COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""Names by which configurations give the number of decoder blocks."""
_LIMITS = ("max_window_layers", "first_k_dense_replace")
"""Names of numbers of blocks from the first on that differ from the others."""
_INDICES = ("mlp_only_layers", "moe_layers")
"""Names of lists of indices of blocks."""
_NOT_BY_BLOCK = ("bos_token_id", "eos_token_id", "pad_token_id", "architectures", "keys_to_ignore_at_inference")
"""Names of lists that may have as many entries as there are blocks, and say nothing of them."""


def per_layer_changes(config: Mapping[str, Any], n_blocks: int, kept: Sequence[int]) -> dict[str, Any]:
    """What changes in a configuration when only some blocks are left.

    Args:
        config: flat part of the configuration that describes the decoder.
        n_blocks: blocks it describes.
        kept: indices of those that stay, ascending.

    Returns:
        New values by name: the number of blocks, lists with an entry for each block, limits on the index of a block and
        lists of indices.
    """
    changes: dict[str, Any] = {}
    for name, value in config.items():
        if name in COUNTS and value == n_blocks:
            changes[name] = len(kept)
        elif name in _INDICES and isinstance(value, list | tuple):
            changes[name] = [position for position, index in enumerate(kept) if index in value]
        elif isinstance(value, list | tuple) and len(value) == n_blocks and name not in _NOT_BY_BLOCK:
            changes[name] = [value[index] for index in kept]
        elif name in _LIMITS and isinstance(value, int):
            changes[name] = sum(index < value for index in kept)
    return changes


def shorter_config(
    config: Mapping[str, Any], described: Mapping[str, Any], n_blocks: int, kept: Sequence[int]
) -> dict[str, Any]:
    """The content of a `config.json` for a model of which only some blocks are left.

    Args:
        config: content of that of the whole model; the decoder may be described in a part of it, `text_config`.
        described: the decoder's configuration with every default written out, for what the file leaves to them.
        n_blocks: blocks of the whole model.
        kept: indices of those that stay, ascending.
    """
    changes = per_layer_changes(described, n_blocks, kept)
    nested = config.get("text_config")
    shorter = dict(config)
    if isinstance(nested, Mapping):
        shorter["text_config"] = {**nested, **changes}
    else:
        shorter |= changes
    if isinstance(pruned := config.get("pruned"), Mapping):  # a compact export describes its blocks one by one
        shorter["pruned"] = {**pruned, "layers": [pruned["layers"][index] for index in kept]}
    return shorter

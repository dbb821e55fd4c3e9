"""Cutting the blocks into groups that fit into memory."""

from surgeon.errors import ParameterError


def block_groups(n_blocks: int, blocks_per_group: int) -> list[range]:
    """Consecutive groups of blocks, first to last; the last may be smaller.

    Raises:
        ParameterError: if blocks_per_group is below 1.
    """
    if blocks_per_group < 1:
        raise ParameterError(f"run.blocks_per_group: got {blocks_per_group}, allowed: 1 or more, or null to choose")
    return [range(start, min(start + blocks_per_group, n_blocks)) for start in range(0, n_blocks, blocks_per_group)]


def batches(n_sequences: int, batch_size: int) -> list[slice]:
    """Consecutive batches of sequences; the last may be smaller."""
    return [slice(start, min(start + batch_size, n_sequences)) for start in range(0, n_sequences, batch_size)]

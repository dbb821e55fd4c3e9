"""Cutting the blocks into groups that fit into memory."""

from itertools import pairwise

from surgeon.errors import ParameterError


def block_groups(n_blocks: int, blocks_per_group: int) -> list[range]:
    """Consecutive groups of blocks, first to last; the last may be smaller.

    Raises:
        ParameterError: if blocks_per_group is below 1.
    """
    if blocks_per_group < 1:
        raise ParameterError(f"run.blocks_per_group: got {blocks_per_group}, allowed: 1 or more, or null to choose")
    return [range(start, min(start + blocks_per_group, n_blocks)) for start in range(0, n_blocks, blocks_per_group)]


def shards(n_sequences: int, n_shards: int) -> list[slice]:
    """Consecutive parts of sequences, the longer ones first; their lengths differ by one at most.

    Raises:
        ParameterError: if there are not as many sequences as parts.
    """
    if not 1 <= n_shards <= n_sequences:
        raise ParameterError(
            f"run.shards: got {n_shards}, allowed: 1 to {n_sequences}, the number of calibration sequences. Lower it, "
            "or draw more sequences."
        )
    size, longer = divmod(n_sequences, n_shards)
    starts = [index * size + min(index, longer) for index in range(n_shards + 1)]
    return [slice(*pair) for pair in pairwise(starts)]


def batches(n_sequences: int, batch_size: int) -> list[slice]:
    """Consecutive batches of sequences; the last may be smaller."""
    return [slice(start, min(start + batch_size, n_sequences)) for start in range(0, n_sequences, batch_size)]

import pytest

from surgeon.errors import ParameterError
from surgeon.passes.groups import batches, block_groups


@pytest.mark.parametrize(
    ("n_blocks", "blocks_per_group", "expected"),
    [
        (3, 1, [range(0, 1), range(1, 2), range(2, 3)]),
        (3, 2, [range(0, 2), range(2, 3)]),
        (3, 3, [range(0, 3)]),
        (3, 9, [range(0, 3)]),
        (4, 2, [range(0, 2), range(2, 4)]),
    ],
)
def test_groups_are_consecutive_and_cover_all_blocks(n_blocks, blocks_per_group, expected):
    assert block_groups(n_blocks, blocks_per_group) == expected


@pytest.mark.parametrize("blocks_per_group", [0, -2])
def test_a_group_has_a_block(blocks_per_group):
    with pytest.raises(ParameterError, match=rf"run.blocks_per_group: got {blocks_per_group}, allowed: 1 or more"):
        block_groups(3, blocks_per_group)


@pytest.mark.parametrize(
    ("n_sequences", "batch_size", "expected"),
    [
        (5, 2, [slice(0, 2), slice(2, 4), slice(4, 5)]),
        (4, 2, [slice(0, 2), slice(2, 4)]),
        (2, 8, [slice(0, 2)]),
        (0, 2, []),
    ],
)
def test_batches_are_consecutive_and_end_with_the_sequences(n_sequences, batch_size, expected):
    assert batches(n_sequences, batch_size) == expected

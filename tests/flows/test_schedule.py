"""How sparsity is reached over shots."""

import pytest

from flows.schedule import shot_target


def test_linear_and_ends_at_the_target() -> None:
    assert [shot_target(0.5, number, 5) for number in range(1, 6)] == [0.1, 0.2, 0.3, 0.4, 0.5]
    for shots in range(1, 41):
        assert shot_target(0.37, shots, shots) == 0.37


@pytest.mark.parametrize(("sparsity", "shots"), [(0.3, 3), (0.7, 7), (0.6, 6)])
def test_equal_targets_of_other_schedules_are_equal_numbers(sparsity: float, shots: int) -> None:
    """0.3 * 1 / 3 is 0.09999999999999999 in floating point: another key, and so the same work twice."""
    assert shot_target(sparsity, 1, shots) == shot_target(0.1, 1, 1) == 0.1

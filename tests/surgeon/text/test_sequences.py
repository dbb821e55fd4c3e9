import numpy as np
import pytest

from surgeon.errors import ParameterError, TextError
from surgeon.text import SequenceOrder, consecutive_windows, sample_sequences

TOKENS = np.random.default_rng(0).integers(1000, size=1003)
"""100 sequences of 10 tokens and 3 tokens over."""


def covered(offsets: np.ndarray, length: int) -> np.ndarray:
    return (offsets[:, None] + np.arange(length)).ravel()


class TestGrid:
    @pytest.mark.parametrize("n_sequences", [1, 16, 99, 100])
    def test_sequences_are_cut_at_their_offsets_without_overlap(self, n_sequences: int) -> None:
        for seed in range(20):
            drawn = sample_sequences(TOKENS, n_sequences, 10, seed)
            assert drawn.tokens.shape == (n_sequences, 10)
            assert drawn.tokens.dtype == drawn.offsets.dtype == np.int64
            np.testing.assert_array_equal(drawn.tokens.ravel(), TOKENS[covered(drawn.offsets, 10)])
            assert np.unique(covered(drawn.offsets, 10)).size == 10 * n_sequences

    def test_offsets_lie_on_a_grid_of_random_phase(self) -> None:
        phases = [np.unique(sample_sequences(TOKENS, 5, 10, seed).offsets % 10) for seed in range(100)]
        assert all(phase.size == 1 for phase in phases)
        assert {int(phase[0]) for phase in phases} == set(range(10))

    def test_every_place_is_drawn(self) -> None:
        offsets = np.concatenate([sample_sequences(TOKENS, 10, 10, seed).offsets for seed in range(100)])
        assert np.unique(offsets // 10).size >= 99

    def test_keyed_by_seed(self) -> None:
        np.testing.assert_array_equal(
            sample_sequences(TOKENS, 5, 10, (1, 2)).offsets, sample_sequences(TOKENS, 5, 10, (1, 2)).offsets
        )
        keys: list[int | tuple[int, ...]] = [0, 1, (1, 2), (2, 1)]
        drawn = {tuple(sample_sequences(TOKENS, 5, 10, key).offsets) for key in keys}
        assert len(drawn) == len(keys)

    def test_more_sequences_start_with_the_same_ones(self) -> None:
        np.testing.assert_array_equal(
            sample_sequences(TOKENS, 40, 10, 3).offsets[:10], sample_sequences(TOKENS, 10, 10, 3).offsets
        )

    def test_too_short(self) -> None:
        with pytest.raises(TextError, match="101 calibration sequences of 10 tokens: it has 1003 tokens, so 100 fit"):
            sample_sequences(TOKENS, 101, 10, 0)


class TestRandomOffsets:
    def test_offsets_are_independent_and_uniform(self) -> None:
        drawn = sample_sequences(TOKENS[:13], 4000, 10, 0, SequenceOrder.RANDOM_OFFSETS)
        np.testing.assert_array_equal(drawn.tokens.ravel(), TOKENS[covered(drawn.offsets, 10)])
        counts = np.bincount(drawn.offsets, minlength=4)
        assert counts.size == 4
        assert np.abs(counts - 1000).max() < 150  # five standard deviations

    def test_differs_from_grid(self) -> None:
        drawn = sample_sequences(TOKENS, 20, 10, 0, SequenceOrder.RANDOM_OFFSETS)
        assert np.unique(drawn.offsets % 10).size > 1

    def test_too_short_for_one(self) -> None:
        with pytest.raises(TextError, match="it has 9 tokens, so 0 fit"):
            sample_sequences(TOKENS[:9], 1, 10, 0, SequenceOrder.RANDOM_OFFSETS)


class TestConsecutiveWindows:
    def test_adjoining_from_the_start(self) -> None:
        windows = consecutive_windows(TOKENS, 10)
        assert windows.shape == (100, 10)
        np.testing.assert_array_equal(windows.ravel(), TOKENS[:1000])

    def test_limit(self) -> None:
        np.testing.assert_array_equal(consecutive_windows(TOKENS, 10, 7).ravel(), TOKENS[:70])

    def test_does_not_share_memory_with_the_tokens(self) -> None:
        assert not np.shares_memory(consecutive_windows(TOKENS, 10, 7), TOKENS)

    def test_too_short(self) -> None:
        with pytest.raises(TextError, match=r"101 evaluation windows of 10 tokens: .* so 100 fit\. Ask for fewer"):
            consecutive_windows(TOKENS, 10, 101)
        with pytest.raises(TextError, match="so 0 fit"):
            consecutive_windows(TOKENS, 1004)


@pytest.mark.parametrize(("n_sequences", "length", "name"), [(0, 10, "n_sequences"), (3, -1, "length")])
def test_numbers_must_be_positive(n_sequences: int, length: int, name: str) -> None:
    with pytest.raises(ParameterError, match=f"{name} must be at least 1"):
        sample_sequences(TOKENS, n_sequences, length, 0)


@pytest.mark.parametrize("seed", [-1, (0, -1)])
def test_negative_seed(seed: int | tuple[int, ...]) -> None:
    with pytest.raises(ParameterError, match="seed must be at least 0"):
        sample_sequences(TOKENS, 1, 10, seed)


@pytest.mark.parametrize("limit", [0, -3])
def test_limit_must_be_positive(limit: int) -> None:
    with pytest.raises(ParameterError, match="limit must be at least 1"):
        consecutive_windows(TOKENS, 10, limit)

"""Blocks chosen by position: the formulas on numbers worked out by hand, and what cannot be asked for."""

import pytest

from surgeon.choices import Selector
from surgeon.errors import ParameterError
from surgeon.layers.choosing import Choice
from surgeon.layers.patterns import pattern_blocks
from surgeon.layers.spec import SPECS

PATTERNS = [selector for selector, spec in SPECS.items() if spec.is_pattern]


def chosen(pattern: str, n_blocks: int, n_remove: int, first: int = 1, last: int = 1) -> list[int]:
    return list(pattern_blocks(Selector(pattern), Choice(n_blocks, n_remove, first, last)))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("input", range(1, 13)),
        ("output", range(11, 23)),
        ("deepest", range(11, 23)),
        ("middle", range(6, 18)),
        ("both", [1, 2, 3, 4, 5, 6, 17, 18, 19, 20, 21, 22]),
        ("max-gap", [1, 3, 5, 7, 9, 11, 12, 14, 16, 18, 20, 22]),
    ],
)
def test_half_of_24_blocks(pattern, expected):
    assert chosen(pattern, 24, 12) == list(expected)


@pytest.mark.parametrize(
    ("pattern", "n", "expected"),
    [
        ("input", 3, [1, 2, 3]),
        ("output", 3, [6, 7, 8]),
        ("middle", 3, [3, 4, 5]),
        ("middle", 2, [4, 5]),
        ("both", 3, [1, 2, 8]),
        ("both", 1, [1]),
        ("max-gap", 1, [4]),
        ("max-gap", 3, [2, 4, 6]),
    ],
)
def test_a_few_of_10_blocks_or_9(pattern, n, expected):
    """10 blocks for all but max-gap, whose 7 blocks between the ends have one in the middle."""
    assert chosen(pattern, 9 if pattern == "max-gap" else 10, n) == expected


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_right_number_of_different_blocks_within_what_may_go(pattern):
    for n_blocks in range(2, 14):
        for first, last in ((0, 0), (1, 1), (2, 3), (0, 1)):
            for n in range(1, min(n_blocks, n_blocks - first - last + 1)):
                found = chosen(pattern, n_blocks, n, first, last)
                assert found == sorted(set(found))
                assert len(found) == n
                assert min(found) >= first
                assert max(found) < n_blocks - last


@pytest.mark.parametrize("n", range(1, 15))
def test_max_gap_leaves_runs_of_nearly_equal_length(n):
    gone = set(chosen("max-gap", 30, n))
    stays = [str(int(index in gone)) for index in range(1, 29)]
    runs = [len(run) for run in "".join(stays).strip("0").split("1") if run]
    assert max(runs, default=0) - min(runs, default=0) <= 1


def test_more_than_may_go_is_refused():
    with pytest.raises(
        ParameterError, match=r"3 blocks shall go, but of 4 the first 1 and the last 1 are protected, so 2"
    ):
        chosen("max-gap", 4, 3)
    with pytest.raises(ParameterError, match=r"1 blocks shall go, but of 3 the first 2 and the last 2 .* so 0 may"):
        chosen("input", 3, 1, 2, 2)


def test_removing_all_is_refused():
    with pytest.raises(ParameterError, match=r"4 of 4 blocks would go, and nothing is left of the model; .* at most 3"):
        chosen("output", 4, 4, 0, 0)


def test_removing_none_is_refused():
    with pytest.raises(ParameterError, match=r"layerchop.blocks: got 0, allowed: 1 or more"):
        chosen("output", 4, 0)
    with pytest.raises(ParameterError, match=r"got -1 and 0, allowed: 0 or more"):
        chosen("output", 4, 1, -1, 0)


def test_a_selector_by_scores_is_no_pattern():
    with pytest.raises(
        ParameterError, match=r"selector sleb goes by scores, not by position; patterns are input, outp"
    ):
        chosen("sleb", 4, 1)

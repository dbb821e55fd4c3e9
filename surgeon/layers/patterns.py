"""Blocks chosen by position alone.

With ``L`` blocks of which the first ``f`` and the last ``l`` are protected, ``m = L - f - l`` in between, ``n`` go:

- `input`: ``f … f+n-1``, just after the first;
- `output`, `deepest`: ``L-l-n … L-l-1``, just before the last (the same blocks; `deepest` protects no first one);
- `middle`: ``n`` in a row from ``f + ⌊(m-n)/2⌋``;
- `both`: ``⌈n/2⌉`` as `input` has them and ``⌊n/2⌋`` as `output` has them;
- `max-gap`: ``f + ⌊(2k+1)m/(2n)⌋`` for ``k = 0 … n-1``: the centres of ``n`` equal stretches.

Reference: Jha et al. 2023, *Just CHOP*, for the names; Gromov et al. 2024 for `deepest`. The index formulas
are ours.
"""

from collections.abc import Callable, Iterable

from surgeon.choices import Selector
from surgeon.errors import ParameterError
from surgeon.layers.choosing import Choice


def _input(between: range, n: int) -> Iterable[int]:
    return between[:n]


def _output(between: range, n: int) -> Iterable[int]:
    return between[len(between) - n :]


def _middle(between: range, n: int) -> Iterable[int]:
    start = (len(between) - n) // 2
    return between[start : start + n]


def _both(between: range, n: int) -> Iterable[int]:
    return (*_input(between, n - n // 2), *_output(between, n // 2))


def _max_gap(between: range, n: int) -> Iterable[int]:
    return (between.start + (2 * k + 1) * len(between) // (2 * n) for k in range(n))


_PATTERNS: dict[Selector, Callable[[range, int], Iterable[int]]] = {
    Selector.INPUT: _input,
    Selector.OUTPUT: _output,
    Selector.MIDDLE: _middle,
    Selector.BOTH: _both,
    Selector.MAX_GAP: _max_gap,
    Selector.DEEPEST: _output,
}


def pattern_blocks(pattern: Selector, choice: Choice) -> tuple[int, ...]:
    """Indices of the blocks that go by a pattern, ascending.

    Args:
        pattern: one that goes by position alone.
        choice: how many of how many blocks.

    Raises:
        ParameterError: the selector is no pattern, or fewer blocks may go than shall.
    """
    if pattern not in _PATTERNS:
        names = ", ".join(_PATTERNS)
        raise ParameterError(f"selector {pattern} goes by scores, not by position; patterns are {names}")
    return tuple(_PATTERNS[pattern](choice.allowed, choice.n_remove))

"""Calibration sequences and evaluation windows, cut from the tokens of a text."""

from dataclasses import dataclass

import numpy as np

from surgeon.choices import SequenceOrder
from surgeon.errors import ParameterError, TextError
from surgeon.text.tokenizers import TokenArray


@dataclass(frozen=True)
class Sequences:
    """Sequences of equal length cut from one text.

    Attributes:
        tokens: `[n_sequences, length]` int64 token ids.
        offsets: `[n_sequences]` int64 position of each sequence's first token in the text.
    """

    tokens: TokenArray
    offsets: TokenArray

    def __len__(self) -> int:
        return int(self.offsets.size)


def sample_sequences(
    tokens: TokenArray,
    n_sequences: int,
    length: int,
    seed: int | tuple[int, ...],
    order: SequenceOrder = SequenceOrder.GRID,
) -> Sequences:
    """Draws calibration sequences.

    `grid` lays a grid of adjoining windows over the text at a random phase and takes windows of it in random order, so
    no token is drawn twice. `random-offsets` draws every offset independently and uniformly, as is usual in the field:
    sequences may overlap.

    Args:
        tokens: `[n_tokens]` int64 token ids of a text.
        n_sequences: Sequences to draw.
        length: Tokens per sequence.
        seed: What the draw is keyed by, such as (seed of the run, shot). Draws of different keys are independent.
        order: Where sequences are cut.

    Returns:
        `[n_sequences, length]` token ids and their offsets, in the order drawn.

    Raises:
        TextError: The text is too short.
        ParameterError: A number is not positive, or the seed is negative.

    Reference:
        Frantar et al. 2022 (GPTQ), section 5, for independent random offsets.
    """
    _require_positive(n_sequences=n_sequences, length=length)
    key = (seed,) if isinstance(seed, int) else seed
    if min(key) < 0:
        raise ParameterError(f"seed must be at least 0; got {seed}.")
    order = SequenceOrder(order)
    n_needed = 1 if order is SequenceOrder.RANDOM_OFFSETS else n_sequences
    _require_fit(tokens, n_needed, length, "calibration sequences")
    generator = np.random.default_rng(key)
    if order is SequenceOrder.RANDOM_OFFSETS:
        offsets = generator.integers(tokens.size - length + 1, size=n_sequences)
    else:
        n_spare_tokens = tokens.size - n_sequences * length
        phase = int(generator.integers(min(length, n_spare_tokens + 1)))
        n_places = (tokens.size - phase) // length
        offsets = phase + length * generator.permutation(n_places)[:n_sequences]
    offsets = offsets.astype(np.int64)
    return Sequences(_cut(tokens, offsets, length), offsets)


def consecutive_windows(tokens: TokenArray, length: int, limit: int | None = None) -> TokenArray:
    """Cuts a text into adjoining windows from its start, the standard protocol for perplexity.

    Tokens behind the last whole window are dropped.

    Args:
        tokens: `[n_tokens]` int64 token ids of a text.
        length: Tokens per window.
        limit: Windows to return; None returns all.

    Returns:
        `[n_windows, length]` int64 token ids.

    Raises:
        TextError: The text has fewer windows than asked for, or none.
        ParameterError: A number is not positive.

    Reference:
        Frantar & Alistarh 2023 (SparseGPT), section 4, evaluation of perplexity.
    """
    _require_positive(length=length)
    if limit is not None:
        _require_positive(limit=limit)
    _require_fit(tokens, limit or 1, length, "evaluation windows")
    n_windows = limit or tokens.size // length
    return tokens[: n_windows * length].reshape(n_windows, length).copy()


def _cut(tokens: TokenArray, offsets: TokenArray, length: int) -> TokenArray:
    sequences: TokenArray = tokens[offsets[:, None] + np.arange(length)]
    return sequences


def _require_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ParameterError(f"{name} must be at least 1; got {number}.")


def _require_fit(tokens: TokenArray, n_windows: int, length: int, what: str) -> None:
    n_fit = tokens.size // length
    if n_fit < n_windows:
        raise TextError(
            f"The text is too short for {n_windows} {what} of {length} tokens: it has {tokens.size} tokens, so "
            f"{n_fit} fit. Ask for fewer, make them shorter, or give a longer text."
        )

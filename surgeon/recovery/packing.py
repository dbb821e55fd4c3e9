"""Packed rows of tokens to train on, and rows that are held out.

All documents of a text are one stream of tokens, cut into rows of equal length, so that no token is padding. Which rows
are held out, and the order of the others, are drawn by the seed. A row is seen once in an epoch.

Reference:
    Raffel et al. 2020 (T5), section 2.4, for packing; Jha et al. 2023, *Just CHOP*, section 3.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from surgeon.errors import TextError
from surgeon.recovery.settings import RecoverySettings
from surgeon.text.tokenizers import TokenArray

_HELD_OUT, _ORDER = range(2)
"""What is drawn: the rows held out, the order of an epoch. Each has a generator of its own."""


@dataclass(frozen=True)
class PackedRows:
    """Rows of a text.

    Attributes:
        training: `[n_rows, length]` int64 token ids, in the order of the text.
        validation: `[n_validation_rows, length]` likewise; none of them is a training row.
        training_places: `[n_rows]` int64, which row of the text each is.
        validation_places: `[n_validation_rows]` likewise.
    """

    training: TokenArray
    validation: TokenArray
    training_places: TokenArray
    validation_places: TokenArray


def pack_rows(tokens: TokenArray, settings: RecoverySettings) -> PackedRows:
    """Cuts a text into rows, and draws those that are held out and those that are trained on.

    No more rows are kept than the training reads.

    Args:
        tokens: `[n_tokens]` token ids of all documents, one after the other.
        settings: length, batches, number of tokens and of those held out, seed.

    Raises:
        TextError: the text has not enough rows for one batch beside those held out.
    """
    length, n_held_out = settings.length, settings.validation_rows
    n_rows = tokens.size // length
    n_needed = n_held_out + settings.rows_per_step
    if n_rows < n_needed:
        raise TextError(
            f"The text is too short for recovery: it has {tokens.size} tokens, {n_rows} rows of {length}; needed are "
            f"{settings.rows_per_step} for a batch and {n_held_out} held out. Give a longer text, or lower "
            "recovery.batch_tokens, recovery.validation_tokens or recovery.length."
        )
    drawn = np.random.default_rng((settings.seed, _HELD_OUT)).permutation(n_rows).astype(np.int64)
    n_trained = min(n_rows - n_held_out, settings.steps * settings.rows_per_step)
    held_out, trained = np.sort(drawn[:n_held_out]), np.sort(drawn[n_held_out : n_held_out + n_trained])
    rows: TokenArray = tokens[: n_rows * length].reshape(n_rows, length)
    return PackedRows(rows[trained], rows[held_out], trained, held_out)


def step_rows(n_rows: int, step: int, settings: RecoverySettings) -> NDArray[np.int64]:
    """Which training rows a step reads, `[rows_per_step]`; it depends on the seed and the step alone.

    A step may read the last rows of one epoch and the first of the next.

    Args:
        n_rows: number of training rows.
        step: from 0.
        settings: batches and seed.
    """
    places = np.arange(step * settings.rows_per_step, (step + 1) * settings.rows_per_step)
    epochs = places // n_rows
    chosen = np.empty(len(places), dtype=np.int64)
    for epoch in np.unique(epochs):
        order = np.random.default_rng((settings.seed, _ORDER, int(epoch))).permutation(n_rows)
        chosen[epochs == epoch] = order[places[epochs == epoch] % n_rows]
    return chosen

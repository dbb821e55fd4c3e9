"""Rows of a text: which are held out, which a step reads."""

import numpy as np
import pytest

from surgeon.errors import TextError
from surgeon.recovery.packing import pack_rows, step_rows
from tests.surgeon.recovery.small import settings

TOKENS = np.arange(1000, 1000 + 6 * 20 + 3)


def test_rows_are_cuts_of_the_text_and_none_is_in_both_parts():
    rows = pack_rows(TOKENS, settings(tokens=10**6))
    assert rows.training.shape == (18, 6)
    assert rows.validation.shape == (2, 6)
    seen = np.concatenate([rows.training, rows.validation])
    assert np.array_equal(np.sort(seen.ravel()), TOKENS[: 6 * 20])  # each token once: nothing is in both
    assert (np.diff(seen, axis=1) == 1).all()
    assert np.array_equal(rows.training[:, 0], 1000 + 6 * rows.training_places)
    assert np.array_equal(rows.validation[:, 0], 1000 + 6 * rows.validation_places)


def test_the_seed_decides_which_rows_are_held_out():
    first, again = (pack_rows(TOKENS, settings(seed=1)) for _ in range(2))
    assert np.array_equal(first.training, again.training)
    assert np.array_equal(first.validation, again.validation)
    places = {tuple(pack_rows(TOKENS, settings(seed=seed)).validation_places) for seed in range(8)}
    assert len(places) > 4


def test_no_more_rows_are_kept_than_are_read():
    rows = pack_rows(TOKENS, settings(tokens=48, warmup=0))
    assert rows.training.shape == (8, 6)
    assert rows.validation.shape == (2, 6)


def test_a_row_is_seen_once_in_an_epoch():
    given = settings(tokens=24 * 30)
    n_rows = 10  # not a multiple of the four rows of a step
    seen = np.concatenate([step_rows(n_rows, step, given) for step in range(10)])
    for epoch in range(4):
        assert sorted(seen[epoch * n_rows : (epoch + 1) * n_rows]) == list(range(n_rows))
    assert list(seen[:n_rows]) != list(seen[n_rows : 2 * n_rows])
    assert list(seen[:4]) == list(step_rows(n_rows, 0, given))
    assert list(seen) != list(np.concatenate([step_rows(n_rows, s, settings(seed=6)) for s in range(10)]))


def test_a_text_that_is_too_short():
    with pytest.raises(TextError, match="too short for recovery: it has 35 tokens, 5 rows of 6; needed are 4 for a b"):
        pack_rows(TOKENS[:35], settings())
    assert pack_rows(TOKENS[:36], settings()).training.shape == (4, 6)

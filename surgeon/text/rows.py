"""Rows of a data set, joined to one text."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from surgeon.errors import TextError
from surgeon.text.suggest import did_you_mean

_STRING_TYPES = ("string", "large_string")


def join_rows(rows: Any, column: str, where: str) -> str:
    """Joins a column of a `datasets.Dataset` by empty lines. Rows without a value are left out, empty ones are kept.

    Args:
        rows: The data set.
        column: Name of the column.
        where: File or data set, for the message.

    Raises:
        TextError: There is no such column, or it does not hold text.
    """
    names = list(rows.column_names)
    if column not in names:
        raise TextError(
            f"{where} has no column {column!r}; its columns are {', '.join(names)}.{did_you_mean(column, names)} "
            "Set `column` to the one that holds the text."
        )
    kind = getattr(rows.features[column], "dtype", "nested")
    if kind not in _STRING_TYPES:
        raise TextError(f"Column {column!r} of {where} holds {kind} values; it must hold text.")
    return "\n\n".join(value for value in rows[column] if value is not None)


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Turns the progress bars of datasets off inside a `with` block, and back on after it if they were on."""
    import datasets  # takes a second; most runs need no data set

    were_off = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_off:
            datasets.enable_progress_bars()

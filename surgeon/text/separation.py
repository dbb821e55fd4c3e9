"""Keeps the text a model is pruned with apart from the text it is scored on.

Scoring on calibration text measures memory, not quality. Two checks: by name and digest before anything is computed,
and by content, for spans of tokens that occur in both.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from surgeon.errors import TextError
from surgeon.text.ranges import is_range, parse_range
from surgeon.text.spec import Text
from surgeon.text.tokenizers import TokenArray

SPAN_TOKENS = 32

_HashArray = npt.NDArray[np.uint64]


def require_disjoint(calibration: Text, evaluation: Text, what: str = "calibration") -> None:
    """Checks that two texts are not the same and are not overlapping parts of one local file or directory.

    Args:
        calibration: what the model is changed with.
        evaluation: what it is scored on.
        what: the first is for, as messages call it.

    Raises:
        TextError: They are.
    """
    names = (
        f"{what} on {calibration.source!r}, split {calibration.split!r}, and evaluation on "
        f"{evaluation.source!r}, split {evaluation.split!r}"
    )
    if _is_local(calibration) and _is_local(evaluation):
        if _is_same_path(calibration, evaluation) and parse_range(calibration.split).overlaps(
            parse_range(evaluation.split)
        ):
            raise TextError(
                f"Overlapping ranges: {names}. Use ranges without a common part, such as 'first:80%' and 'last:20%'."
            )
    elif (calibration.source, calibration.split) == (evaluation.source, evaluation.split):
        raise TextError(
            f"{what.capitalize()} and evaluation use the same split: {names}. Choose another split for one of them."
        )
    if calibration.digest == evaluation.digest:
        raise TextError(f"Both texts hold the same characters: {names}. Choose another text for one of them.")


def require_low_overlap(
    calibration_sequences: TokenArray,
    evaluation_windows: TokenArray,
    limit: float = 0.1,
    span: int = SPAN_TOKENS,
    what: str = "calibration sequences",
) -> float:
    """Checks that little of the evaluation text occurs in the calibration sequences.

    Args:
        calibration_sequences: `[n_sequences, length]` int64 token ids.
        evaluation_windows: `[n_windows, length]` int64 token ids; the lengths may differ.
        limit: Largest allowed fraction.
        span: Tokens that count as a repetition.
        what: The first are, as the message calls them.

    Returns:
        The fraction of `shared_fraction`.

    Raises:
        TextError: The fraction is above the limit.
    """
    fraction = shared_fraction(calibration_sequences, evaluation_windows, span)
    if fraction > limit:
        raise TextError(
            f"{fraction:.1%} of the evaluation tokens occur word for word in the {what} (spans of "
            f"{span} tokens; allowed is {limit:.1%}). The score would measure memory: choose another evaluation text."
        )
    return fraction


def shared_fraction(
    calibration_sequences: TokenArray, evaluation_windows: TokenArray, span: int = SPAN_TOKENS
) -> float:
    """Fraction of evaluation tokens that lie in a span which occurs in the calibration sequences.

    Spans do not cross from one sequence or window to the next. Where sequences or windows are shorter than the span,
    the span is as long as the shortest of them. Spans are compared by 64-bit hashes: a chance match among a million
    tokens on each side has a probability of about 1e-7.

    Args:
        calibration_sequences: `[n_sequences, length]` int64 token ids.
        evaluation_windows: `[n_windows, length]` int64 token ids; the lengths may differ.
        span: Tokens that count as a repetition.

    Returns:
        A number from 0 to 1.
    """
    span = min(span, calibration_sequences.shape[1], evaluation_windows.shape[1])
    known = np.unique(_span_hashes(calibration_sequences, span))
    hits = np.isin(_span_hashes(evaluation_windows, span), known)
    # +1 where a repeated span starts and -1 behind its end: the running sum counts the repeated spans over each token.
    steps = np.zeros((evaluation_windows.shape[0], evaluation_windows.shape[1] + 1), dtype=np.int64)
    steps[:, : hits.shape[1]] += hits
    steps[:, span:] -= hits
    return float((steps[:, :-1].cumsum(axis=1) > 0).mean())


def _span_hashes(rows: TokenArray, span: int) -> _HashArray:
    """Polynomial hash of every span of each row: `[n_rows, length]` to `[n_rows, length - span + 1]` uint64."""
    mixed = _mix(rows.astype(np.uint64))
    n_spans = rows.shape[1] - span + 1
    hashes = np.zeros((rows.shape[0], n_spans), dtype=np.uint64)
    for place in range(span):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + mixed[:, place : place + n_spans]
    return hashes


def _mix(values: _HashArray) -> _HashArray:
    """Spreads token ids over 64 bits.

    Reference: Steele, Lea & Flood 2014, *Fast splittable pseudorandom number generators*, function mix64 (variant 13).
    """
    values = (values + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _is_local(text: Text) -> bool:
    return text.revision == "local" and is_range(text.split)


def _is_same_path(first: Text, second: Text) -> bool:
    """Whether two local sources are one file or directory, or one lies in the other."""
    one, other = (Path(text.source).expanduser().resolve() for text in (first, second))
    return one == other or one in other.parents or other in one.parents

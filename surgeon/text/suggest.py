"""The end of an error message that says what may have been meant."""

import difflib
from collections.abc import Iterable


def did_you_mean(got: str, allowed: Iterable[str]) -> str:
    """Returns ` Did you mean 'x'?` for the allowed word closest to the one got, or nothing when none is close."""
    close = difflib.get_close_matches(got, list(allowed), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""

"""Ranges such as `first:80%` that let one local text serve as calibration and as evaluation text."""

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from surgeon.errors import TextError

WHOLE = "all"
_RANGE = re.compile(r"(first|last):(\d+(?:\.\d+)?)%")


@dataclass(frozen=True)
class TextRange:
    """A part of a text, from `start` to `stop` as fractions of its characters."""

    start: Fraction
    stop: Fraction

    def cut(self, text: str) -> str:
        """Returns this part of a text. Ranges that do not overlap never share a character."""
        n_characters = len(text)
        return text[math.floor(n_characters * self.start) : math.floor(n_characters * self.stop)]

    def overlaps(self, other: "TextRange") -> bool:
        """Whether both ranges hold a common part."""
        return self.start < other.stop and other.start < self.stop


def is_range(split: str) -> bool:
    """Whether a split is written as a range of a local text (or is the whole of it)."""
    return split == WHOLE or _RANGE.fullmatch(split) is not None


def parse_range(split: str) -> TextRange:
    """Reads `first:80%`, `last:20%` or `all`.

    Raises:
        TextError: It is none of them, or its share is not between 0 and 100 percent.
    """
    if split == WHOLE:
        return TextRange(Fraction(0), Fraction(1))
    match = _RANGE.fullmatch(split)
    if match is None:
        raise TextError(
            f"split {split!r} of a local text: allowed are ranges such as 'first:80%' and 'last:20%', or no split "
            "(null) for the whole text."
        )
    share = Fraction(match[2]) / 100
    if not 0 < share < 1:
        raise TextError(
            f"split {split!r}: the share must lie between 0% and 100%. Give no split (null) for the whole text."
        )
    return TextRange(Fraction(0), share) if match[1] == "first" else TextRange(1 - share, Fraction(1))

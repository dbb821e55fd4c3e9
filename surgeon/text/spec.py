"""What text to read, and a text that was read."""

import hashlib
from dataclasses import dataclass, field


@dataclass(frozen=True)
class TextSpec:
    """Names a text.

    Attributes:
        source: `python-docs`, a local file or directory, or a hub data set as `name` or `name:config`.
        split: Part of the source: `calibration` or `held-out` of `python-docs`; `first:80%` or `last:20%` of local
            files, None for all of them; a split of a hub data set, such as `train`.
        column: Column that holds the text, for tables and hub data sets; None is `text`.
        revision: Branch, tag or commit of a hub data set.
    """

    source: str
    split: str | None = None
    column: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Text:
    """A text and where it comes from.

    Attributes:
        text: The characters.
        source: Source as it was named.
        split: Part of the source; `all` is the whole of local files.
        revision: Commit of a hub data set, `python-3.11.7` for `python-docs`, `local` for local files.
        digest: SHA-256 of the text in UTF-8, hexadecimal.
    """

    text: str = field(repr=False)
    source: str
    split: str
    revision: str
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        # A lone surrogate, which a JSON file can hold, has no UTF-8 form of its own.
        digest = hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()
        object.__setattr__(self, "digest", digest)

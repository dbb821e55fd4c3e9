"""From what the user names as a text to its characters."""

from enum import StrEnum
from pathlib import Path

from surgeon.errors import TextError
from surgeon.text import files
from surgeon.text.hub import is_hub_name, read_hub
from surgeon.text.python_docs import PYTHON_DOCS, SPLITS, python_docs_revision, python_docs_text
from surgeon.text.ranges import WHOLE, is_range, parse_range
from surgeon.text.spec import Text, TextSpec
from surgeon.text.suggest import did_you_mean

DEFAULT_COLUMN = "text"


class SourceKind(StrEnum):
    """How a source is read."""

    PYTHON_DOCS = PYTHON_DOCS
    PLAIN_FILE = "text file"
    DIRECTORY = "directory"
    TABLE = "table"
    HUB = "hub data set"


def source_kind(source: str) -> SourceKind:
    """Tells how a source is read, without reading it. A local file goes before a hub data set of the same name.

    Raises:
        TextError: The source is a file of an unknown kind, or nothing that can be named.
    """
    if source == PYTHON_DOCS:
        return SourceKind.PYTHON_DOCS
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    if path.is_dir():
        return SourceKind.DIRECTORY
    if suffix in files.PLAIN_SUFFIXES:
        return SourceKind.PLAIN_FILE
    if suffix in files.TABLE_SUFFIXES:
        return SourceKind.TABLE
    if path.exists():
        allowed = ", ".join((*files.PLAIN_SUFFIXES, *files.TABLE_SUFFIXES))
        raise TextError(f"{source} is a file of an unknown kind {suffix!r}; readable are {allowed}.")
    if is_hub_name(source):
        return SourceKind.HUB
    raise TextError(
        f"No text {source!r}. Tried: the built-in {PYTHON_DOCS!r}; a local file or directory ({path.absolute()} does "
        f"not exist); a hub data set (it is not of the form name or name:config).{did_you_mean(source, [PYTHON_DOCS])}"
    )


def check_spec(spec: TextSpec) -> SourceKind:
    """Checks that every option of a spec has an effect on its source, and that its split can exist. Reads no text.

    Returns:
        How the source is read.

    Raises:
        TextError: An option has no effect, or the split is missing or cannot exist.
    """
    kind = source_kind(spec.source)
    if spec.column is not None and kind not in (SourceKind.TABLE, SourceKind.HUB):
        raise TextError(f"column {spec.column!r} has no effect on {spec.source!r} ({kind}): it has no columns.")
    if spec.revision is not None and kind is not SourceKind.HUB:
        raise TextError(
            f"revision {spec.revision!r} has no effect on {spec.source!r} ({kind}): only hub data sets have one."
        )
    if kind is SourceKind.PYTHON_DOCS:
        if spec.split not in SPLITS:
            raise TextError(
                f"split {spec.split!r} of {PYTHON_DOCS!r}: allowed are {', '.join(SPLITS)}."
                f"{did_you_mean(spec.split or '', SPLITS)}"
            )
    elif kind is SourceKind.HUB:
        if spec.split is None or (spec.split != WHOLE and is_range(spec.split)):
            raise TextError(
                f"split {spec.split!r} of data set {spec.source!r}: name one of its splits, usually train, validation "
                "or test. Ranges are for local files."
            )
    elif spec.split is not None:
        parse_range(spec.split)
    return kind


def read_text(spec: TextSpec) -> Text:
    """Reads a text.

    Raises:
        TextError: An option has no effect on this source, or the text cannot be found, is unreadable or is empty.
    """
    kind = check_spec(spec)
    column = spec.column or DEFAULT_COLUMN
    if kind is SourceKind.PYTHON_DOCS:
        split, revision = spec.split or "", python_docs_revision()
        text = python_docs_text(split)
    elif kind is SourceKind.HUB:
        split = spec.split or ""
        text, revision = read_hub(spec, column)
    else:
        split, revision = spec.split or WHOLE, "local"
        text = parse_range(split).cut(_read_local(Path(spec.source).expanduser(), kind, column))
    if not text.strip():
        raise TextError(f"Text {spec.source!r}, split {split!r}, is empty. Choose another file, split or column.")
    return Text(text, spec.source, split, revision)


def _read_local(path: Path, kind: SourceKind, column: str) -> str:
    if kind is SourceKind.DIRECTORY:
        return files.read_directory(path)
    if kind is SourceKind.TABLE:
        return files.read_table(path, column)
    return files.read_plain(path)

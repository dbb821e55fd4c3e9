"""Text of local files: plain text, directories of plain text, and tables with a column of text.

`datasets` is imported where it is needed: it takes a second, and most runs read no table.
"""

import tempfile
from pathlib import Path
from typing import Any

from surgeon.errors import TextError
from surgeon.text.rows import join_rows, quiet_datasets
from surgeon.text.suggest import did_you_mean

PLAIN_SUFFIXES = (".md", ".txt")
TABLE_SUFFIXES = (".csv", ".jsonl", ".parquet")


def read_plain(path: Path) -> str:
    """Returns the text of a `.txt` or `.md` file in UTF-8.

    Raises:
        TextError: The file is missing, cannot be read, or is not UTF-8.
    """
    require_file(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 text (byte {error.start}). Convert it to UTF-8.") from error
    except OSError as error:
        raise TextError(f"{path} cannot be read: {error.strerror}.") from error


def read_directory(path: Path) -> str:
    """Returns the text of all `.txt` and `.md` files under a directory, in the order of their paths.

    Raises:
        TextError: There is no such file, or one of them cannot be read.
    """
    found = [file for file in path.rglob("*") if file.suffix.lower() in PLAIN_SUFFIXES and file.is_file()]
    if not found:
        raise TextError(
            f"{path} has no {' or '.join(PLAIN_SUFFIXES)} file under it. "
            f"Name the file itself to read a table ({', '.join(TABLE_SUFFIXES)})."
        )
    files = sorted(found, key=lambda file: file.relative_to(path).as_posix())
    return "\n\n".join(read_plain(file) for file in files)


def read_table(path: Path, column: str) -> str:
    """Returns a column of a `.parquet`, `.jsonl` or `.csv` file, rows joined by an empty line.

    Raises:
        TextError: The file is missing or damaged, or has no such column of text.
    """
    require_file(path)
    # Read into memory: a cache of datasets would outlive the file it was made from.
    with quiet_datasets(), tempfile.TemporaryDirectory() as cache_dir:
        try:
            rows = _load_table(path, cache_dir)
        except Exception as error:  # datasets raises errors of pandas, pyarrow and its own
            raise TextError(f"{path} cannot be read as {path.suffix[1:]}: {_first_cause(error)}") from error
        return join_rows(rows, column, str(path))


def require_file(path: Path) -> None:
    """Raises an error that names similar files when a file does not exist.

    Raises:
        TextError: There is no such file.
    """
    if path.is_file():
        return
    siblings = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    raise TextError(f"There is no text file {path} ({path.absolute()}).{did_you_mean(path.name, siblings)}")


def _load_table(path: Path, cache_dir: str) -> Any:
    import datasets

    if path.suffix.lower() == ".parquet":
        return datasets.Dataset.from_parquet(str(path), cache_dir=cache_dir, keep_in_memory=True)
    if path.suffix.lower() == ".jsonl":
        return datasets.Dataset.from_json(str(path), cache_dir=cache_dir, keep_in_memory=True)
    return datasets.Dataset.from_csv(str(path), cache_dir=cache_dir, keep_in_memory=True)


def _first_cause(error: BaseException) -> str:
    """The message of the error at the root: that of datasets only says that reading failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__

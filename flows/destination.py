"""Where an export may be written: what is there is only replaced if it is an export of ours, or if the user says so."""

from pathlib import Path

from surgeon.errors import InputError
from surgeon.export import is_intact, read_record
from surgeon.export.directory import RECORD_NAME


def require_destination(path: Path, *, is_own: bool, overwrite: bool, quick: bool = False) -> None:
    """Refuses to replace what was not exported.

    Args:
        path: destination of an export.
        is_own: whether it is the pipeline's own, which each export replaces.
        overwrite: whether anything may be replaced.
        quick: whether names of files are enough, so that nothing is read.

    Raises:
        InputError: naming what is there and what to do.
    """
    remedy = "give another destination, move it away, or replace it with `surgeon export --overwrite`"
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file, but an export is a directory; give another destination")
    if overwrite or not path.is_dir() or not any(path.iterdir()):
        return
    if not is_own:
        raise InputError(f"{path} exists and is not empty, so nothing was exported; {remedy}")
    record = read_record(path)
    if record is None:
        raise InputError(
            f"{path} would be replaced by the export, but it is not an export of Surgeon (no readable {RECORD_NAME}); "
            f"{remedy}"
        )
    foreign = sorted({file.name for file in path.iterdir()} - record["files"].keys() - {RECORD_NAME})
    if foreign:
        raise InputError(
            f"{path} would be replaced by the export, but it holds files that were not exported "
            f"({', '.join(foreign[:5])}); {remedy}"
        )
    if not quick and not is_intact(path, record):
        raise InputError(f"{path} would be replaced by the export, but files in it were changed or removed; {remedy}")

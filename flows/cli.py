"""The `surgeon` command: its version, and what becomes of errors. The commands themselves are in `flows/commands`."""

import sys
import traceback
from typing import Annotated

import typer

from flows.commands import pipeline, store
from flows.commands.shared import app
from surgeon import __version__
from surgeon.errors import CorruptObjectError, InputError, SurgeonError
from surgeon.store.files import is_full_disk

__all__ = ["app", "main", "pipeline", "store"]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"surgeon {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of the command itself."""
    del version


def _comes_from_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, says that there is no space left."""
    while error is not None:
        if is_full_disk(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def main() -> None:
    """Entry point: exit status 0 done, 2 bad input (one message, no traceback), 1 anything else."""
    try:
        app()
    except InputError as error:
        print(f"surgeon: {error}", file=sys.stderr)
        sys.exit(2)
    except CorruptObjectError as error:
        print(f"surgeon: {error} `surgeon run` computes it again.", file=sys.stderr)
        sys.exit(1)
    except SurgeonError as error:
        print(f"surgeon: {error}", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if _comes_from_full_disk(error):
            place = getattr(error, "filename", None) or "what was to be written"
            print(
                f"surgeon: no space left for {place}. What was finished is in the store. Free some space (`surgeon "
                "clean` shows what the store can do without) and run the command again: it goes on from there.",
                file=sys.stderr,
            )
            sys.exit(2)
        traceback.print_exc()
        print(
            "surgeon: this is a bug; what was finished is in the store, and a rerun goes on from there", file=sys.stderr
        )
        sys.exit(1)


if __name__ == "__main__":
    main()

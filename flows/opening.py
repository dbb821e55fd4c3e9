"""Opens parameters, files, engine and display for one command."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flows.display import Display
from flows.engine import InlineEngine
from flows.params import Params, load_params
from flows.prefect_engine import PrefectEngine
from flows.session import Session
from flows.workspace import Workspace


def parameter_file(root: Path, given: Path | None) -> Path | None:
    """The parameter file: the one given, or that of the project, if there."""
    default = root.resolve() / "params.yaml"
    return given or (default if default.is_file() else None)


def with_engine(overrides: Sequence[str] | None, engine: str | None) -> list[str]:
    """Overrides with the engine of the option of that name."""
    return [*(overrides or []), *([f"run.engine={engine}"] if engine else [])]


@contextmanager
def open_session(root: Path, params: Params, quiet: bool) -> Iterator[Session]:
    """A session in a project directory, with its progress on the terminal."""
    root = root.resolve()
    with Display(quiet) as display:
        engine = PrefectEngine(root, display) if params.run.engine == "prefect" else InlineEngine(display)
        session = Session(params, Workspace(root, params.run.store), engine, display.say, display.warn)
        try:
            yield session
        finally:
            session.close()


def open_workspace(root: Path, params_file: Path | None, overrides: Sequence[str] | None) -> Workspace:
    """The files of a project directory, for what needs no model and runs no task."""
    params = load_params(parameter_file(root, params_file), overrides or [])
    return Workspace(root.resolve(), params.run.store)


@contextmanager
def load_session(
    root: Path, params_file: Path | None, overrides: Sequence[str] | None, quiet: bool, engine: str | None
) -> Iterator[Session]:
    """A session with the parameters of a file and of the command line."""
    params = load_params(parameter_file(root, params_file), with_engine(overrides, engine))
    with open_session(root, params, quiet) as session:
        yield session

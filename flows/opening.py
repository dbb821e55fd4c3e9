"""Opens parameters, files, engine and display for one command."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flows.display import Display
from flows.engine import InlineEngine
from flows.params import Params, load_params
from flows.prefect_engine import PrefectEngine
from flows.project import parameter_file
from flows.session import Session
from flows.workspace import Workspace


def with_engine(overrides: Sequence[str] | None, engine: str | None) -> list[str]:
    """Overrides with the engine of the option of that name."""
    return [*(overrides or []), *([f"run.engine={engine}"] if engine else [])]


@contextmanager
def open_session(root: Path, params: Params, quiet: bool) -> Iterator[Session]:
    """A session in a project directory, with its progress on the terminal."""
    root = root.resolve()
    with Display(quiet) as display:
        engine = PrefectEngine(root, display) if params.run.engine == "prefect" else InlineEngine(display)
        workspace = Workspace(root, params.run.store, params.run.cache)
        session = Session(params, workspace, engine, display.say, display.warn)
        try:
            yield session
        finally:
            session.close()


@contextmanager
def load_session(
    root: Path, params_file: Path | None, overrides: Sequence[str] | None, quiet: bool, engine: str | None
) -> Iterator[Session]:
    """A session with the parameters of a file and of the command line."""
    params = load_params(parameter_file(root, params_file), with_engine(overrides, engine))
    with open_session(root, params, quiet) as session:
        yield session

"""Opens parameters, files, engine and display for one command."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from flows.dask_pool import DaskPool
from flows.display import Display
from flows.engine import InlineEngine
from flows.params import Params, RunParams, load_params
from flows.pool import Pool, ProcessPool, Runner, ThreadPool
from flows.prefect_artifacts import RunArtifacts
from flows.prefect_engine import PrefectEngine
from flows.prefect_runs import is_within_a_run
from flows.prefect_server import has_server
from flows.project import parameter_file
from flows.ray_pool import RayPool
from flows.session import Session, threads_of
from flows.workspace import Workspace
from tasks.progress import set_reporter


def with_engine(overrides: Sequence[str] | None, engine: str | None) -> list[str]:
    """Overrides with the engine of the option of that name."""
    return [*(overrides or []), *([f"run.engine={engine}"] if engine else [])]


@contextmanager
def open_session(root: Path, params: Params, quiet: bool) -> Iterator[Session]:
    """A session in a project directory, with its progress on the terminal, and on a Prefect server if there is one."""
    root = root.resolve()
    with Display(quiet) as display:
        shown = _shown(params, display)
        pool = open_pool(params.run)
        engine = PrefectEngine(root, shown, pool) if params.run.engine == "prefect" else InlineEngine(shown, pool)
        workspace = Workspace(root, params.run.store, params.run.cache)
        session = Session(params, workspace, engine, shown.say, shown.warn)
        try:
            with _same_threads():
                yield session
        finally:
            engine.close()
            session.close()
        shown.finished()


def _shown(params: Params, display: Display) -> Display | RunArtifacts:
    """What shows how far the run is.

    A server that lives no longer than the run gets no artifacts: nobody sees them, and the report says the same.
    """
    if not is_within_a_run() and not (params.run.engine == "prefect" and has_server()):
        return display
    artifacts = RunArtifacts(display)
    set_reporter(artifacts)
    return artifacts


def open_pool(run: RunParams) -> Pool | None:
    """The workers that parameters ask for; they are started when the first task needs them.

    Raises:
        ClusterError: a cluster does not answer, or what it takes is not installed.
    """
    threads = threads_of(run) or torch.get_num_threads()
    if run.runner is Runner.DASK:
        return DaskPool(run.workers, threads, run.cluster)
    if run.runner is Runner.RAY:
        return RayPool(run.workers, threads, run.cluster)
    if run.runner is Runner.PROCESSES:
        return ProcessPool(run.workers, threads)
    return ThreadPool(run.workers, threads) if run.workers > 1 else None


@contextmanager
def _same_threads() -> Iterator[None]:
    """Puts back the number of threads that torch uses in this process, which a session may set."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def load_session(
    root: Path, params_file: Path | None, overrides: Sequence[str] | None, quiet: bool, engine: str | None
) -> Iterator[Session]:
    """A session with the parameters of a file and of the command line."""
    params = load_params(parameter_file(root, params_file), with_engine(overrides, engine))
    with open_session(root, params, quiet) as session:
        yield session

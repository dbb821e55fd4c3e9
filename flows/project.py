"""Finds the parameters and the files of a project directory, without opening a model or an engine."""

from collections.abc import Sequence
from pathlib import Path

from flows.params import load_params
from flows.workspace import Workspace


def parameter_file(root: Path, given: Path | None) -> Path | None:
    """The parameter file: the one given, or that of the project, if there."""
    default = root.resolve() / "params.yaml"
    return given or (default if default.is_file() else None)


def open_workspace(root: Path, params_file: Path | None, overrides: Sequence[str] | None) -> Workspace:
    """The files of a project directory, for what needs no model and runs no task."""
    params = load_params(parameter_file(root, params_file), overrides or [])
    return Workspace(root.resolve(), params.run.store, params.run.cache)

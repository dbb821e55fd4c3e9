"""What all commands share: the application, its options, and how results are shown."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from flows.session import Session

app = typer.Typer(
    name="surgeon",
    help="Makes trained language models smaller without retraining them, with the curvature of their loss.\n\n"
    "`surgeon run` does the whole job; the other commands run one stage of it (what earlier stages found is taken from "
    "the store), or look at what is there. Killed at any moment, the same command goes on where it was.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
)


Override = Annotated[
    list[str] | None,
    typer.Option(
        "-S", "--set", metavar="KEY=VALUE", help="Override a parameter, e.g. `-S prune.sparsity=0.3`. Repeat."
    ),
]
ParamsFile = Annotated[
    Path | None, typer.Option("-p", "--params", help="Parameter file; default: params.yaml of the project, if there.")
]
Root = Annotated[
    Path, typer.Option("-C", "--project", help="Project directory; results go to its data/.", envvar="SURGEON_PROJECT")
]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress and no table.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout; nothing else goes there.")]
EngineName = Annotated[
    str | None,
    typer.Option("--engine", help="`prefect` or `inline` (no server); default: run.engine of the parameters."),
]
ModelArgument = Annotated[
    str | None, typer.Argument(help="Model directory, GGUF file or hub id; default: model.source.")
]


def open_project(
    root: Path, params_file: Path | None, overrides: list[str] | None, quiet: bool, engine: str | None
) -> "AbstractContextManager[Session]":
    """A session with the parameters of a file and of the command line, for as long as the command works."""
    from flows.opening import load_session

    return load_session(root, params_file, overrides, quiet, engine)


def show(value: Any, as_json: bool, draw: "Callable[[Any, Console], None]") -> None:
    """Puts a result on stdout, as JSON or as a table."""
    from flows.render import console

    if as_json:
        print(json.dumps(value, indent=2))
    else:
        draw(value, console())

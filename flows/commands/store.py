"""Commands that look at runs and at the store, and that keep it in order."""

from pathlib import Path
from typing import Annotated

import typer

from flows.commands.shared import (
    AsJson,
    EngineName,
    Override,
    ParamsFile,
    Quiet,
    Root,
    app,
    open_project,
    show,
)


@app.command()
def status(
    override: Override = None, params: ParamsFile = None, project: Root = Path(), as_json: AsJson = False
) -> None:
    """Show what is in the store for these parameters, and what a run would still do. Computes nothing."""
    from flows.render import render_status
    from flows.status import status_of

    with open_project(project, params, override, True, "inline") as session:
        lines = status_of(session)
    show(lines, as_json, render_status)


@app.command()
def plan(
    measure: Annotated[bool, typer.Option("--measure", help="Measure how fast this machine is again.")] = False,
    override: Override = None,
    params: ParamsFile = None,
    project: Root = Path(),
    quiet: Quiet = False,
    as_json: AsJson = False,
    engine: EngineName = None,
) -> None:
    """Say what a run will do and need: tasks, time, memory, disk. Computes nothing of it.

    The first time, measures this machine for about ten seconds. A run that will not fit is an error, as for `run`.
    """
    from flows.machine import measured_rates
    from flows.planning import outline_run, require_fits
    from flows.render_plan import render_plan
    from flows.stages import check_run

    with open_project(project, params, override, quiet or as_json, engine) as session:
        session.check()
        check_run(session)
        outline = outline_run(session)
        planned = outline.timed(measured_rates(session, again=measure))
    if as_json or not quiet:
        show(planned.to_json() if as_json else planned, as_json, render_plan)
    require_fits(session, planned.needs)


@app.command()
def inspect(
    block: Annotated[int | None, typer.Option("--block", min=0, help="Look into this block.")] = None,
    linear: Annotated[
        str | None, typer.Option("--linear", metavar="NAME", help="Only this linear of the block, e.g. `down_proj`.")
    ] = None,
    shot: Annotated[int | None, typer.Option("--shot", min=1, help="State after this shot; default: the last.")] = None,
    objects: Annotated[bool, typer.Option("--objects", help="List the objects of the last run.")] = False,
    store: Annotated[bool, typer.Option("--store", help="List everything in the store.")] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw it too: a .png, .svg or .pdf file.")
    ] = None,
    override: Override = None,
    params: ParamsFile = None,
    project: Root = Path(),
    as_json: AsJson = False,
) -> None:
    """Look into the last run, a block of it, or the store.

    Without options: what the shots did, by kind of linear and by block. With --block: its factors (condition numbers,
    effective ranks, damping), costs and what lives. With --objects or --store: shapes, sizes and digests.
    """
    from flows.inspection.command import Wanted, look_in
    from flows.render import console

    wanted = Wanted(block, linear, shot, objects, store, plot)
    wanted.check()
    with open_project(project, params, override, True, "inline") as session:
        seen = look_in(session, wanted)
    show(seen.value if as_json else seen, as_json, lambda view, on: view.draw(on))
    if plot is not None and not as_json:
        console().print(f"plot: {plot}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def clean(
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; without this nothing is changed.")] = False,
    older_than: Annotated[
        float, typer.Option("--older-than", metavar="DAYS", min=0, help="Younger results stay, needed or not.")
    ] = 14.0,
    ignore_unknown: Annotated[
        bool,
        typer.Option("--ignore-unknown", help="Go on though versions are tracked whose results are not on this disk."),
    ] = False,
    damaged: Annotated[bool, typer.Option("--damaged", help="Remove what was set aside as damaged, too.")] = False,
    forget: Annotated[
        list[Path] | None, typer.Option("--forget", help="A workspace that is gone: keep nothing for it. Repeat.")
    ] = None,
    override: Override = None,
    params: ParamsFile = None,
    project: Root = Path(),
    as_json: AsJson = False,
) -> None:
    """Say what in the store nothing needs any more; with --yes, remove it.

    Needed is what the last run, tags, branches and DVC experiments name, of every workspace that shares the store.
    """
    from flows.cleaning import CleanOptions
    from flows.cleaning import clean as clean_store
    from flows.project import open_workspace
    from flows.render_clean import render_clean

    options = CleanOptions(older_than, ignore_unknown, damaged, tuple(forget or ()))
    show(clean_store(open_workspace(project, params, override), options, remove=yes), as_json, render_clean)


@app.command()
def verify(
    override: Override = None,
    params: ParamsFile = None,
    project: Root = Path(),
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Read everything in the store and compare digests; what is damaged is named and moved aside.

    Runs find damage by themselves when they read it; this is for looking now. Exit status 1 if there was any.
    """
    from flows.display import Display
    from flows.project import open_workspace
    from flows.render import render_verified
    from flows.verification import verify_store

    with Display(quiet or as_json):
        found = verify_store(open_workspace(project, params, override))
    show(found, as_json, render_verified)
    if found["damaged"]:
        raise typer.Exit(1)


@app.command()
def restore(
    override: Override = None, params: ParamsFile = None, project: Root = Path(), as_json: AsJson = False
) -> None:
    """Take the results that data/run.zarr and data/manifest.json hold back into the store, checked and as hard links.

    For after `dvc checkout` of an old version whose results were cleaned. A new clone does it by itself.
    """
    from flows.project import open_workspace
    from flows.render_clean import render_restored
    from flows.restoring import restore as restore_run

    restored = restore_run(open_workspace(project, params, override))
    show(restored.to_json(), as_json, render_restored)
    restored.raise_damage()

"""The `surgeon` command."""

import errno
import json
import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgeon import __version__
from surgeon.errors import CorruptObjectError, InputError, SurgeonError

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


def _session(
    root: Path, params_file: Path | None, overrides: list[str] | None, quiet: bool, engine: str | None
) -> "AbstractContextManager[Session]":
    from flows.opening import load_session

    return load_session(root, params_file, overrides, quiet, engine)


def _show(value: Any, as_json: bool, draw: "Callable[[Any, Console], None]") -> None:
    """Puts a result on stdout, as JSON or as a table."""
    from flows.render import console

    if as_json:
        print(json.dumps(value, indent=2))
    else:
        draw(value, console())


def _stage_command(name: str, doc: str) -> Callable[..., None]:
    def command(
        override: Override = None,
        params: ParamsFile = None,
        project: Root = Path(),
        quiet: Quiet = False,
        engine: EngineName = None,
    ) -> None:
        from flows.stages import run_stage

        with _session(project, params, override, quiet, engine) as session:
            session.check()
            run_stage(session, name)

    command.__doc__ = doc
    return command


@app.command()
def run(
    override: Override = None,
    params: ParamsFile = None,
    project: Root = Path(),
    quiet: Quiet = False,
    as_json: AsJson = False,
    engine: EngineName = None,
) -> None:
    """Do the whole job: model, calibration, dense evaluation, shots, export, benchmark, report.

    Ends with a table, a page about the run (data/report/index.html), its numbers (data/metrics/run.json) and a
    smaller checkpoint in data/export.
    """
    from flows.render import render_results
    from flows.stages import run_all

    with _session(project, params, override, quiet or as_json, engine) as session:
        session.check()
        results = run_all(session)
    if as_json or not quiet:
        _show(results, as_json, render_results)


for _name, _doc in {
    "model": "Fetch or convert the model, and write down what it is.",
    "calibrate": "Draw calibration sequences and cut evaluation windows.",
    "prune": "Run the shots: curvature, costs, mask, update, evaluation.",
}.items():
    app.command(_name)(_stage_command(_name, _doc))


@app.command()
def export(
    destination: Annotated[
        Path | None, typer.Argument(help="Directory to write; default: data/export of the project.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace whatever is at the destination.")] = False,
    override: Override = None,
    params: ParamsFile = None,
    project: Root = Path(),
    quiet: Quiet = False,
    engine: EngineName = None,
) -> None:
    """Write the pruned checkpoint to data/export and load it back.

    What is at the default destination is replaced if it is an export, and nothing but that. With DESTINATION: an export
    beside the pipeline, which no other stage looks at.
    """
    from flows.stages import export_pruned

    with _session(project, params, override, quiet, engine) as session:
        session.check()
        export_pruned(session, destination, overwrite=overwrite)


@app.command()
def evaluate(
    model: ModelArgument = None,
    override: Override = None,
    params: ParamsFile = None,
    project: Root = Path(),
    quiet: Quiet = False,
    as_json: AsJson = False,
    engine: EngineName = None,
) -> None:
    """Evaluate a model: perplexity, parameters, zeros, bytes.

    Without MODEL: the dense model, as the stage of the pipeline. With MODEL: any checkpoint, for example data/export.
    """
    from flows.render import render_evaluation
    from flows.stages import evaluate_other, run_stage
    from flows.workspace import read_json

    given = [*(override or []), *([f"model.source={model}"] if model else [])]
    with _session(project, params, given, quiet or as_json, engine) as session:
        session.check(is_pruned=model is None)
        if model:
            facts = evaluate_other(session)
        else:
            run_stage(session, "evaluate")
            facts = read_json(session.workspace.stage_file("evaluate"))["facts"]
    if as_json or not quiet:
        _show(facts, as_json, render_evaluation)


@app.command()
def benchmark(
    model: Annotated[
        str | None, typer.Argument(help="Model to measure; default: data/export, the pruned model of the last run.")
    ] = None,
    against: Annotated[
        str | None, typer.Option("--against", metavar="DENSE", help="Model to compare with; default: model.source.")
    ] = None,
    batch_size: Annotated[
        list[int] | None, typer.Option("--batch-size", min=1, help="Sequences at a time; repeat for several.")
    ] = None,
    prompt: Annotated[int | None, typer.Option("--prompt", min=1, help="Tokens of each prompt.")] = None,
    new_tokens: Annotated[int | None, typer.Option("--new-tokens", min=1, help="Tokens one by one.")] = None,
    rounds: Annotated[
        int | None, typer.Option("--rounds", min=0, help="Measurements of each; 0 compares sizes only.")
    ] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="Load both models in it; default: as stored.")] = None,
    if_changed: Annotated[
        bool, typer.Option("--if-changed", help="Keep the last figures of the same export, settings and machine.")
    ] = False,
    override: Override = None,
    params: ParamsFile = None,
    project: Root = Path(),
    quiet: Quiet = False,
    as_json: AsJson = False,
    engine: EngineName = None,
) -> None:
    """Measure size, memory and speed of the exported model beside the dense one.

    Without MODEL and DENSE: the stage of the pipeline. Otherwise any two models, and nothing is written down.
    """
    from flows.benchmark import last_benchmark, measure_models, raise_failure
    from flows.render_benchmark import render_benchmark
    from flows.stages import benchmark_again, run_stage

    if if_changed and (model or against):
        raise InputError("--if-changed has no effect with MODEL or --against: what they name is always measured")
    options = {
        "batch_sizes": batch_size or None,
        **{"prompt": prompt, "new_tokens": new_tokens, "rounds": rounds, "dtype": dtype},
    }
    given = [*(override or []), *(f"benchmark.{name}={value}" for name, value in options.items() if value is not None)]
    with _session(project, params, given, quiet or as_json, engine) as session:
        if model or against:
            figures = measure_models(session, model, against)
        else:
            session.check()
            run_stage(session, "benchmark") if if_changed else benchmark_again(session)
            figures = (last_benchmark(session) or {})["figures"]
    if as_json or not quiet:
        _show(figures, as_json, render_benchmark)
    raise_failure(figures)


@app.command()
def report(
    override: Override = None,
    params: ParamsFile = None,
    project: Root = Path(),
    quiet: Quiet = False,
    as_json: AsJson = False,
    engine: EngineName = None,
) -> None:
    """Sample both models and put all results together: data/metrics/run.json and data/report; show the table."""
    from flows.render import render_results
    from flows.stages import run_stage, write_results

    with _session(project, params, override, quiet or as_json, engine) as session:
        session.check()
        run_stage(session, "report")
        results = write_results(session)
    if as_json or not quiet:
        _show(results, as_json, render_results)


@app.command()
def compare(
    file: Annotated[Path, typer.Argument(help="YAML file with the tables (docs/results.md).")],
    override: Override = None,
    params: ParamsFile = None,
    project: Root = Path(),
    quiet: Quiet = False,
    as_json: AsJson = False,
    engine: EngineName = None,
) -> None:
    """Compare methods at equal terms: tables of perplexity by sparsity and a plot, in data/compare.

    `-S` wins over what FILE sets. A cell that fails is reported, and the others go on.
    """
    from flows.compare import compare_all
    from flows.compare_spec import load_spec, plan_runs
    from flows.opening import open_session, with_engine
    from flows.project import parameter_file
    from flows.render import render_comparison

    runs = plan_runs(load_spec(file), file, parameter_file(project, params), with_engine(override, engine))
    with open_session(project, runs[0].params, quiet or as_json) as session:
        comparison = compare_all(session, runs)
    if as_json or not quiet:
        _show(comparison.metrics() if as_json else comparison, as_json, render_comparison)
    comparison.raise_failures(session.workspace.comparison)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    model: Annotated[str, typer.Option("--model", help="`dense`, `pruned` (the last run's), or a model.")] = "pruned",
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="New tokens at most.")] = 40,
    override: Override = None,
    params: ParamsFile = None,
    project: Root = Path(),
    as_json: AsJson = False,
) -> None:
    """Continue a prompt greedily with the dense model, the pruned one or any other."""
    from flows.stages import pruned_state
    from tasks.evaluation import sample_task

    given = [*(override or []), *([f"model.source={model}"] if model not in ("dense", "pruned") else [])]
    with _session(project, params, given, True, "inline") as session:
        state = pruned_state(session) if model == "pruned" else session.dense
        sample = session.engine.task(
            sample_task, session.context, state, prompt, tokens, model, name="sample"
        ).attributes
    print(json.dumps(sample, indent=2) if as_json else prompt + sample["continuation"])


@app.command()
def status(
    override: Override = None, params: ParamsFile = None, project: Root = Path(), as_json: AsJson = False
) -> None:
    """Show what is in the store for these parameters, and what a run would still do. Computes nothing."""
    from flows.render import render_status
    from flows.status import status_of

    with _session(project, params, override, True, "inline") as session:
        lines = status_of(session)
    _show(lines, as_json, render_status)


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

    with _session(project, params, override, quiet or as_json, engine) as session:
        session.check()
        check_run(session)
        outline = outline_run(session)
        planned = outline.timed(measured_rates(session, again=measure))
    if as_json or not quiet:
        _show(planned.to_json() if as_json else planned, as_json, render_plan)
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
    with _session(project, params, override, True, "inline") as session:
        seen = look_in(session, wanted)
    _show(seen.value if as_json else seen, as_json, lambda view, on: view.draw(on))
    if plot is not None and not as_json:
        console().print(f"plot: {plot}", highlight=False, markup=False, soft_wrap=True)


def _is_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, says that there is no space left."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


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
    _show(clean_store(open_workspace(project, params, override), options, remove=yes), as_json, render_clean)


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
    from flows.opening import open_workspace
    from flows.render import render_verified
    from flows.verification import verify_store

    with Display(quiet or as_json):
        found = verify_store(open_workspace(project, params, override))
    _show(found, as_json, render_verified)
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
    _show(restored.to_json(), as_json, render_restored)
    restored.raise_damage()


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
        if _is_full_disk(error):
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

"""Commands that do the work: the whole job, its stages, and comparisons."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from flows.commands.shared import (
    AsJson,
    EngineName,
    ModelArgument,
    Override,
    ParamsFile,
    Quiet,
    Root,
    app,
    open_project,
    show,
)
from surgeon.errors import InputError


def _stage_command(name: str, doc: str) -> Callable[..., None]:
    def command(
        override: Override = None,
        params: ParamsFile = None,
        project: Root = Path(),
        quiet: Quiet = False,
        engine: EngineName = None,
    ) -> None:
        from flows.stages import run_stage

        with open_project(project, params, override, quiet, engine) as session:
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

    with open_project(project, params, override, quiet or as_json, engine) as session:
        session.check()
        results = run_all(session)
    if as_json or not quiet:
        show(results, as_json, render_results)


for _name, _doc in {
    "model": "Fetch or convert the model, and write down what it is.",
    "calibrate": "Draw calibration sequences and cut evaluation windows.",
    "prune": "Run the shots: curvature, costs, mask, update, evaluation.",
    "recovery": "Train the pruned model (recovery.method: lora, full or distill), and evaluate it before and after.",
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

    with open_project(project, params, override, quiet, engine) as session:
        session.check()
        export_pruned(session, destination, overwrite=overwrite)


@app.command()
def evaluate(
    model: ModelArgument = None,
    tasks: Annotated[
        str | None, typer.Option("--tasks", metavar="A,B", help="Score downstream tasks of lm-eval instead.")
    ] = None,
    include: Annotated[
        Path | None, typer.Option("--include", metavar="DIR", help="Definitions of tasks of your own.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Documents of each task, the first ones.")] = None,
    shots: Annotated[int | None, typer.Option("--shots", min=0, help="Worked examples in each prompt.")] = None,
    override: Override = None,
    params: ParamsFile = None,
    project: Root = Path(),
    quiet: Quiet = False,
    as_json: AsJson = False,
    engine: EngineName = None,
) -> None:
    """Evaluate a model: perplexity, parameters, zeros, bytes; or downstream tasks.

    Without MODEL: the dense model, as the stage of the pipeline. With MODEL: any checkpoint, for example data/export.
    With --tasks: MODEL on tasks of lm-eval or, without MODEL, the dense model and data/export side by side.
    """
    from flows.render import render_evaluation
    from flows.render_downstream import render_downstream
    from flows.stages import evaluate_other, run_stage
    from flows.workspace import read_json

    given = [*(override or []), *([f"model.source={model}"] if model else [])]
    options = {"--include": include, "--limit": limit, "--shots": shots}
    no_effect = [name for name, value in options.items() if value is not None and tasks is None]
    if no_effect:
        raise InputError(f"{', '.join(no_effect)} has no effect without --tasks, which names downstream tasks")
    with open_project(project, params, given, quiet or as_json, engine) as session:
        session.check(is_pruned=model is None)
        if tasks is not None:
            from flows.downstream import score_model, score_pair, wanted_scores

            wanted = wanted_scores(session, tasks, include, limit, shots)
            facts = score_model(session, wanted) if model else score_pair(session, wanted)
        elif model:
            facts = evaluate_other(session)
        else:
            run_stage(session, "evaluate")
            facts = read_json(session.workspace.stage_file("evaluate"))["facts"]
    if as_json or not quiet:
        show(facts, as_json, render_evaluation if tasks is None else render_downstream)


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
    with open_project(project, params, given, quiet or as_json, engine) as session:
        if model or against:
            figures = measure_models(session, model, against)
        else:
            session.check()
            run_stage(session, "benchmark") if if_changed else benchmark_again(session)
            figures = (last_benchmark(session) or {})["figures"]
    if as_json or not quiet:
        show(figures, as_json, render_benchmark)
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

    with open_project(project, params, override, quiet or as_json, engine) as session:
        session.check()
        run_stage(session, "report")
        results = write_results(session)
    if as_json or not quiet:
        show(results, as_json, render_results)


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
        show(comparison.metrics() if as_json else comparison, as_json, render_comparison)
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
    from flows.states import final_state
    from tasks.evaluation import sample_task

    given = [*(override or []), *([f"model.source={model}"] if model not in ("dense", "pruned") else [])]
    with open_project(project, params, given, True, "inline") as session:
        state = final_state(session) if model == "pruned" else session.dense
        sample = session.engine.task(
            sample_task, session.context, state, prompt, tokens, model, name="sample"
        ).attributes
    print(json.dumps(sample, indent=2) if as_json else prompt + sample["continuation"])

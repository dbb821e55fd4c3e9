"""The main flows as a Prefect worker runs them; `prefect.yaml` deploys them.

Each opens a session in a project directory and runs the stages that the command of the same name runs. Progress goes to
Prefect's log and artifacts. What stages compute goes through the store, so a run that was killed goes on where it was
when it is run again, be it the same run or another of the same parameters.
"""

import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from prefect import State, flow, runtime
from prefect.states import Completed, Failed

from flows.params import Params, check_params
from flows.params_form import FormSchema
from flows.params_yaml import read_yaml
from surgeon.errors import InputError, SurgeonError

FormParams = Annotated[Params, FormSchema()]
"""All parameters of a run; its schema is what the form in Prefect's page is made of."""

REFUSED = "Refused"
"""Name of the state that a run ends in whose parameters, model or text cannot work."""
MOST_EXECUTIONS = 10
"""How often one run is executed: whatever kills it every time (memory, say) must not do so for ever."""


# Prefect's own check of parameters ends in a message that says neither what is allowed nor what to try.
@flow(name="surgeon-run", validate_parameters=False, persist_result=False)
def run(
    project: str,
    params: FormParams = Params(),  # noqa: B008
    parameter_file: str | None = None,
    overrides: list[str] = [],  # noqa: B006
) -> State[Any]:
    """The whole job: model, calibration, dense evaluation, shots, recovery, export, benchmark, report.

    Args:
        project: Directory on the worker's machine; results go to its data/.
        params: All parameters. Leave it as it is if parameter_file is given.
        parameter_file: YAML file in the project, such as params.yaml, instead of params.
        overrides: section.key=value each, such as prune.sparsity=0.3; they win.
    """

    def work() -> str:
        from flows.opening import open_session
        from flows.stages import run_all

        root = _project(project)
        with open_session(root, _parameters(root, params, parameter_file, overrides), quiet=True) as session:
            session.check()
            results = run_all(session)
        dense, pruned = results["dense"], results["pruned"]
        return (
            f"perplexity {dense['perplexity']:.2f} → {pruned['perplexity']:.2f} at {pruned['sparsity']:.1%} sparsity; "
            f"{results['tasks']['executed']} tasks executed, {results['tasks']['cached']} found in the store"
        )

    return _outcome(work)


@flow(name="surgeon-prune", validate_parameters=False, persist_result=False)
def prune(
    project: str,
    params: FormParams = Params(),  # noqa: B008
    parameter_file: str | None = None,
    overrides: list[str] = [],  # noqa: B006
) -> State[Any]:
    """Runs the shots, with all that they need: curvature, costs, mask, update, evaluation.

    Args:
        project: Directory on the worker's machine; results go to its data/.
        params: All parameters. Leave it as it is if parameter_file is given.
        parameter_file: YAML file in the project, such as params.yaml, instead of params.
        overrides: section.key=value each, such as prune.sparsity=0.3; they win.
    """

    def work() -> str:
        from flows.opening import open_session
        from flows.stage_facts import stage_facts
        from flows.stages import run_stage

        root = _project(project)
        with open_session(root, _parameters(root, params, parameter_file, overrides), quiet=True) as session:
            session.check()
            run_stage(session, "prune")
            last = stage_facts(session, "prune")["shots"][-1]
        return f"perplexity {last['perplexity']:.2f} at {last['sparsity']:.1%} sparsity after {last['shot']} shots"

    return _outcome(work)


@flow(name="surgeon-evaluate", validate_parameters=False, persist_result=False)
def evaluate(
    project: str,
    model: str | None = None,
    params: FormParams = Params(),  # noqa: B008
    parameter_file: str | None = None,
    overrides: list[str] = [],  # noqa: B006
) -> State[Any]:
    """Evaluates a model: perplexity, parameters, zeros, bytes.

    Args:
        project: Directory on the worker's machine; results go to its data/.
        model: Any checkpoint, such as data/export of the project; default is the dense model (model.source).
        params: All parameters. Leave it as it is if parameter_file is given.
        parameter_file: YAML file in the project, such as params.yaml, instead of params.
        overrides: section.key=value each, such as evaluate.windows=64; they win.
    """

    def work() -> str:
        from flows.findings import evaluation_finding
        from flows.opening import open_session
        from flows.stage_facts import stage_facts
        from flows.stages import evaluate_other, run_stage

        root = _project(project)
        given = [*overrides, *([f"model.source={_within(root, model)}"] if model else [])]
        with open_session(root, _parameters(root, params, parameter_file, given), quiet=True) as session:
            session.check(is_pruned=model is None)
            if model:
                facts = evaluate_other(session)
            else:
                run_stage(session, "evaluate")
                facts = stage_facts(session, "evaluate")
            session.engine.observer.found(evaluation_finding(facts))
        return f"perplexity {facts['perplexity']:.2f}, {facts['parameters']:,} parameters"

    return _outcome(work)


@flow(name="surgeon-compare", validate_parameters=False, persist_result=False)
def compare(
    project: str,
    file: str = "compare.yaml",
    parameter_file: str | None = None,
    overrides: list[str] = [],  # noqa: B006
) -> State[Any]:
    """Compares ways to prune at equal terms: tables of perplexity by sparsity and a plot, in data/compare.

    Args:
        project: Directory on the worker's machine; results go to its data/.
        file: YAML file in the project with the tables.
        parameter_file: YAML file in the project that everything starts from, such as params.yaml.
        overrides: section.key=value each; they win over what the file sets.
    """

    def work() -> str:
        from flows.compare import compare_all
        from flows.compare_spec import load_spec, plan_runs
        from flows.findings import comparison_findings
        from flows.opening import open_session

        root = _project(project)
        tables, start = root / file, root / parameter_file if parameter_file else None
        runs = plan_runs(load_spec(tables), tables, start, overrides)
        with open_session(root, runs[0].params, quiet=True) as session:
            comparison = compare_all(session, runs)
            for finding in comparison_findings(comparison, session.workspace.comparison):
                session.engine.observer.found(finding)
        comparison.raise_failures(session.workspace.comparison)
        return f"{len(runs)} runs in {len(comparison.tables)} tables, in {session.workspace.comparison}"

    return _outcome(work)


def _outcome(work: Callable[[], str]) -> State[Any]:
    """Runs a job; what was raised on purpose becomes a state with one message, and no traceback."""
    executions = runtime.flow_run.run_count
    if executions > MOST_EXECUTIONS:
        return Failed(
            message=f"this run was executed {MOST_EXECUTIONS} times and killed each time; look into the log of the "
            "worker's machine (memory, disk), and start another run: it goes on from what is in the store"
        )
    try:
        return Completed(message=work())
    except InputError as error:
        return Failed(name=REFUSED, message=str(error))
    except SurgeonError as error:
        return Failed(message=str(error))


def _project(directory: str) -> Path:
    """The project directory.

    Raises:
        InputError: there is none on this machine.
    """
    root = Path(directory).expanduser()
    if not root.is_absolute() or not root.is_dir():
        raise InputError(
            f"project: got {directory!r}; must be the absolute path of a directory that this worker "
            f"({platform.node()}) sees; make it there, or correct the path"
        )
    return root.resolve()


def _within(root: Path, model: str) -> str:
    """A model below the project by its path; anything else (a name, a hub id) as it is."""
    return str(root / model) if (root / model).exists() else model


def _parameters(
    root: Path, params: Params | Mapping[str, Any], parameter_file: str | None, overrides: list[str]
) -> Params:
    """Parameters from the form or from a file of the project.

    Raises:
        InputError: anything in them is wrong, or both were given.
    """
    tree = {} if isinstance(params, Params) else params
    if parameter_file is None:
        return check_params(tree, "params", overrides)
    if check_params(tree, "params") != Params():
        raise InputError(
            f"params and parameter_file ({parameter_file}) were both given, and one of them would have no effect; "
            "leave params as it is and use overrides, or leave parameter_file empty"
        )
    path = root / parameter_file
    return check_params(read_yaml(path), str(path), overrides)

"""The deployments of prefect.yaml on a real server and a real worker, which is killed half way."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.params import Params
from flows.prefect_deployments import REFUSED, evaluate, run
from flows.prefect_runs import mark_crashed_runs
from tests.flows.project import ROOT, Project, Started, tasks_of
from tests.flows.worker import Server, kill, open_server, wait_until

ONE_GROUP = (0,)


@pytest.fixture(scope="module")
def two_shots(params: dict[str, Any]) -> dict[str, Any]:
    return params | {"prune": {"widths": "free", "sparsity": 0.3, "shots": 2}}


@pytest.fixture(scope="module")
def inline(two_shots: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Started]:
    """The same run with the command and `--engine inline`, never killed; it goes on while the server starts."""
    project = Project(tmp_path_factory.mktemp("undisturbed") / "project", two_shots)
    return project, project.start("run", "--quiet", "--engine", "inline")


@pytest.fixture(scope="module")
def server(inline: tuple[Project, Started], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with open_server(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="module")
def undisturbed(inline: tuple[Project, Started]) -> Project:
    project, started = inline
    started.wait().ok()
    return project


def form(project: Project) -> dict[str, Any]:
    """Parameters of a run as the form sends them: by section, and typed."""
    settings = {name: value for name, value in project.params["run"].items() if name != "engine"}
    return {"project": str(project.root), "params": project.params | {"run": settings}}


def kill_half_way(server: Server, project: Project, run: str) -> set[str]:
    """Starts a worker, kills it and its run once the first shot is measured; returns what is left to do."""
    worker = server.start_worker()
    wait_until(lambda: {"costs", "update"} & {name.split("/")[-1] for name in project.labels().values()}, every=0.02)
    kill(worker)
    assert server.run(run)["state_type"] == "RUNNING"  # nobody has told the server
    return set(project.labels().values())


def orphans(server: Server, project: Project) -> int:
    """Marks what was killed, as the next run of the project does; returns the number of runs."""
    with temporary_settings({PREFECT_API_URL: server.address}):
        return mark_crashed_runs(project.root)


def check_result(project: Project, undisturbed: Project, found: set[str]) -> None:
    results, expected = project.results(), undisturbed.results()
    assert results["weights_digest"] == expected["weights_digest"]
    assert project.contents() == undisturbed.contents()
    missing = set(undisturbed.labels().values()) - found
    outside = {"export", "benchmark"}
    assert results["tasks"]["executed"] == len(tasks_of(missing, ONE_GROUP) | outside) < expected["tasks"]["executed"]
    weights = "export/model.safetensors"
    assert (project.data / weights).read_bytes() == (undisturbed.data / weights).read_bytes()


@pytest.fixture(scope="module")
def killed(
    server: Server, two_shots: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Project, str, set[str]]:
    """A run whose worker was killed half way, and which another worker has finished; and what was there in between."""
    project = Project(tmp_path_factory.mktemp("killed") / "project", two_shots)
    run = server.submit("surgeon-run/run", form(project))
    found = kill_half_way(server, project, run)
    # As "Change state" in the page does it, and the automations of automations.yaml after some minutes.
    server.call(f"flow_runs/{run}/set_state", {"state": {"type": "SCHEDULED", "name": "AwaitingRetry"}, "force": True})
    assert orphans(server, project) == 1  # the stage; the run itself waits for a worker, and is none
    assert server.run(run)["state_type"] == "SCHEDULED"
    server.start_worker()
    server.wait_for(run)
    return project, run, found


def test_another_worker_goes_on(server: Server, killed: tuple[Project, str, set[str]], undisturbed: Project) -> None:
    project, run, found = killed
    ended = server.run(run)
    assert (ended["state_type"], ended["run_count"]) == ("COMPLETED", 2), server.log("worker-2")
    check_result(project, undisturbed, found)


def test_what_was_killed_is_marked(server: Server, killed: tuple[Project, str, set[str]]) -> None:
    """The stage that was killed has crashed, and the run has a stage of each name that was completed after that."""
    assert [run["state_type"] for run in server.runs("surgeon-prune")] == ["CRASHED", "COMPLETED"]
    assert [run["state_type"] for run in server.runs("surgeon-run")] == ["COMPLETED"]  # a flow of its own, not two
    assert server.runs("surgeon-report")[-1]["state_type"] == "COMPLETED"
    assert server.tasks(type={"any_": ["RUNNING", "PENDING"]}) == []


def test_artifacts(server: Server, killed: tuple[Project, str, set[str]]) -> None:
    project, run, _ = killed
    results, found = project.results(), server.artifacts(run)
    assert found.keys() == {"surgeon-progress", "surgeon-shots", "surgeon-results", "surgeon-files"}
    progress = found["surgeon-progress"]
    assert progress["data"] == 100
    executed, reused = results["tasks"]["executed"], results["tasks"]["cached"]
    assert f"{executed} of {executed} tasks executed, {reused} found in the store" in progress["description"]
    shots = json.loads(found["surgeon-shots"]["data"])
    assert [shot["perplexity"] for shot in shots] == [f"{shot['perplexity']:.2f}" for shot in results["shots"]]
    table = {row[""]: row for row in json.loads(found["surgeon-results"]["data"])}
    perplexity = table["perplexity (4 windows of 32 tokens)"]
    assert perplexity["pruned"] == f"{results['pruned']['perplexity']:.2f}"
    assert perplexity["dense"] == f"{results['dense']['perplexity']:.2f}"
    assert {"parameters", "weight files, MiB"} < table.keys()
    links = re.findall(r"\(file://([^)]*)\)", found["surgeon-files"]["data"])
    assert [Path(link) for link in links] == [
        project.data / "report" / "index.html",
        project.data / "metrics" / "run.json",
        project.data / "export",
    ]
    assert all(Path(link).exists() for link in links)


def test_the_command_under_the_same_server(server: Server, killed: tuple[Project, str, set[str]]) -> None:
    """`surgeon run` with a server at hand is recorded there, artifacts included, and finds all results."""
    project = killed[0]
    more = {name: server.environment[name] for name in ("PREFECT_API_URL", "PREFECT_HOME")}
    done = project.surgeon("run", "--json", "--engine", "prefect", **more).ok()
    assert json.loads(done.stdout)["tasks"]["executed"] == 0
    last = server.runs("surgeon-run")[-1]
    assert last["deployment_id"] is None
    assert server.artifacts(last["id"])["surgeon-progress"]["data"] == 100


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prune": {"method": "llm"}}, r"params\.prune\.method'.*'llm' is not one of \['llm-surgeon', 'k-obd'"),
        ({"prune": {"sparsity": 1.5}}, r"params\.prune\.sparsity'.*1\.5 is greater than or equal to the maximum of 1"),
        ({"prune": {"structure": "unit"}}, r"params\.prune\.structure'.*'unit' does not match '\^\(units\|rows"),
        ({"calibrate": {"sequences": 0}}, r"params\.calibrate\.sequences'.*0 is less than the minimum of 1"),
        ({"prun": {}}, r"'prun' was unexpected"),
    ],
)
def test_the_server_refuses_bad_values(server: Server, given: dict[str, Any], message: str) -> None:
    path = f"deployments/{server.deployment('surgeon-run/run')['id']}/create_flow_run"
    assert re.search(message, server.refusal(path, {"parameters": {"params": given}}), re.DOTALL)


def test_what_is_deployed(server: Server) -> None:
    """Four deployments; the form has types, defaults, limits and what each parameter is for."""
    deployed = {name: server.deployment(f"surgeon-{name}/{name}") for name in ("run", "prune", "evaluate", "compare")}
    for deployment in deployed.values():
        assert deployment["tags"] == ["surgeon"]
        assert deployment["work_pool_name"] == "surgeon"
        assert deployment["parameters"] == {"project": str(server.folder)}
        assert deployment["global_concurrency_limit"]["limit"] == 1
        assert deployment["concurrency_options"]["collision_strategy"] == "ENQUEUE"
        assert deployment["enforce_parameter_schema"]
    assert [schedule["active"] for schedule in deployed["run"]["schedules"]] == [False]
    schema = deployed["run"]["parameter_openapi_schema"]
    assert schema["properties"]["project"]["description"] == (
        "Directory on the worker's machine; results go to its data/."
    )
    prune = schema["definitions"]["PruneParams"]["properties"]
    assert prune["sparsity"]["anyOf"][0] == {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
    assert prune["sparsity"]["description"].startswith("fraction of the weights to remove")
    assert prune["method"]["default"] == "llm-surgeon"
    # The page fills the form with all defaults and sends them.
    values = {"project": "/", "params": Params().model_dump(mode="json"), "parameter_file": None, "overrides": []}
    assert server.call("ui/schemas/validate", {"schema": schema, "values": values}) == {
        "errors": [],
        "valid": True,
    }
    undescribed = [
        f"{name}.{key}"
        for name, section in schema["definitions"].items()
        for key, found in section.get("properties", {}).items()
        if "description" not in found
    ]
    assert undescribed == []


def refused(**parameters: Any) -> str:
    """The message of a run that ends at once, called without a server."""
    state = run.fn(**parameters)
    assert state.name == REFUSED
    return str(state.message)


def test_values_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    params = {"prune": {"structure": "2:4", "sparsity": 0.7}, "report": {"new_tokens": 0}}
    message = refused(project=str(tmp_path), params=params)
    assert re.search(
        r"2 problems.*params: prune: sparsity: got 0\.7, but structure: 2:4 removes at most 0\.5", message, re.S
    )
    assert re.search(r"params: report\.new_tokens: got 0; must be greater than or equal to 1", message)


def test_parameters_from_two_places_are_refused(tmp_path: Path) -> None:
    params = {"prune": {"sparsity": 0.3}}
    message = refused(project=str(tmp_path), params=params, parameter_file="params.yaml")
    assert re.search(r"params and parameter_file \(params\.yaml\) were both given.*leave params as it is", message)
    message = refused(project=str(tmp_path), parameter_file="params.yaml")
    assert re.search(r"no parameter file .*params\.yaml", message)


@pytest.mark.parametrize("project", ["somewhere", "/not/there"])
def test_a_project_must_be_a_directory_of_the_worker(project: str) -> None:
    assert re.search(rf"project: got '{project}'; must be the absolute path.*make it there", refused(project=project))


def test_overrides_and_a_parameter_file(again: Project) -> None:
    """Called without a server, as Prefect calls it: another model of the project is evaluated."""
    state = evaluate.fn(
        project=str(again.root), model="data/export", parameter_file="params.yaml", overrides=["evaluate.windows=2"]
    )
    assert state.is_completed(), state
    assert re.fullmatch(r"perplexity [\d.]+, [\d,]+ parameters", str(state.message))
    message = evaluate.fn(
        project=str(again.root), parameter_file="params.yaml", overrides=["evaluate.window=2"]
    ).message
    assert re.search(r"evaluate\.window: unknown key\. Did you mean 'windows'\?", str(message))


@pytest.mark.slow
def test_automations_bring_a_killed_run_back(two_shots: dict[str, Any], undisturbed: Project, tmp_path: Path) -> None:
    """With automations.yaml nobody has to look: the server misses the heartbeat, and hands the run out again."""
    project = Project(tmp_path / "project", two_shots)
    (tmp_path / "server").mkdir()
    with open_server(tmp_path / "server") as server:
        server.prefect("automation", "create", "--from-file", str(ROOT / "automations.yaml"))
        run = server.submit("surgeon-run/run", form(project))
        found = kill_half_way(server, project, run)
        server.start_worker()
        wait_until(lambda: server.run(run)["run_count"] == 2, seconds=300)
        assert server.wait_for(run)["state_type"] == "COMPLETED", server.log("worker-2")
        assert [run["state_type"] for run in server.runs("surgeon-prune")] == ["CRASHED", "COMPLETED"]
    check_result(project, undisturbed, found)

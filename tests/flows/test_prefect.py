"""A run under Prefect, with a server of its own for the time of the run, is the same run, shown and recorded."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from flows.prefect_engine import OWNER_VARIABLE, end_orphaned_servers
from tests.flows.project import COMMAND, Finished, Project, environment

SECRET = {"HF_TOKEN": "hf_kept5secret"}
DAMPING = ("-S", "prune.damping=0.3")


@pytest.fixture(scope="module")
def run(params: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Finished, Finished]:
    """A project after `surgeon run` and then another `surgeon prune` with the default engine, and what they said."""
    settings = {name: value for name, value in params["run"].items() if name != "engine"}
    one_shot = params | {"prune": {"multiple": 8, "sparsity": 0.2, "shots": 1}, "run": settings}
    project = Project(tmp_path_factory.mktemp("prefect") / "project", one_shot)
    return project, project.console("run", "--json", **SECRET), project.console("prune", "--quiet", *DAMPING)


def runs(project: Project, table: str) -> list[tuple[str, str, str]]:
    """Name, type of state and name of state of all runs in Prefect's database, in order."""
    with sqlite3.connect(project.root / ".prefect" / "prefect.db") as database:
        return database.execute(f"select name, state_type, state_name from {table} order by created").fetchall()


def test_says_nothing_of_prefect(run: tuple[Project, Finished, Finished]) -> None:
    project, first, second = run
    assert first.status == 0, first
    assert json.loads(first.stdout) == project.results() | json.loads(first.stdout)
    assert first.stderr == ""
    assert second == Finished(0, "", "")


def test_no_secret_in_the_records(run: tuple[Project, Finished, Finished]) -> None:
    files = [path for path in run[0].root.rglob("*") if path.is_file()]
    assert [path for path in files if path.name == "prefect.db"]
    assert [path for path in files if b"kept5secret" in path.read_bytes()] == []


def test_same_weights_and_objects_as_inline(run: tuple[Project, Finished, Finished], tmp_path: Path) -> None:
    project, first, _ = run
    inline = Project(tmp_path / "inline", project.params | {"run": project.params["run"] | {"engine": "inline"}})
    inline.surgeon("run", "--quiet").ok()
    inline.surgeon("prune", "--quiet", *DAMPING).ok()
    assert project.contents() == inline.contents()
    mine, theirs = json.loads(first.stdout), inline.results()
    assert mine["weights_digest"] == theirs["weights_digest"]
    assert mine["tasks"] == theirs["tasks"]


def test_tasks_are_recorded(run: tuple[Project, Finished, Finished]) -> None:
    project, first, _ = run
    tasks = [task for task in runs(project, "task_run") if not task[0].startswith("surgeon-")]
    assert {kind for _, kind, _ in tasks} == {"COMPLETED"}
    executed = [name for name, _, state in tasks if state == "Completed"]
    n_second = project.read("timings/prune.json")["executed"]
    assert n_second == 3 + 1 + 3 + 1 + 3  # costs, mask, updates, evaluation and spectra
    assert len(executed) == json.loads(first.stdout)["tasks"]["executed"] + n_second
    blocks = {f"shot-01/block-{b:02d}/{kind}" for b in range(3) for kind in ("costs", "update")}
    assert {*blocks, "calibration/sequences", "shot-01/mask", "export", "pruned/sample"} <= set(executed)


def test_found_results_are_called_cached(run: tuple[Project, Finished, Finished]) -> None:
    project, _, _ = run
    cached = [name for name, _, state in runs(project, "task_run") if state == "Cached"]
    assert {"calibration/sequences", "evaluation/windows", "dense/evaluation"} <= set(cached)


def test_flows_are_recorded(run: tuple[Project, Finished, Finished]) -> None:
    project, _, _ = run
    with sqlite3.connect(project.root / ".prefect" / "prefect.db") as database:
        query = "select flow.name, flow_run.state_name from flow_run join flow on flow.id = flow_run.flow_id"
        flows = sorted(database.execute(query).fetchall())
    stages = ("benchmark", "calibrate", "evaluate", "export", "model", "prune", "prune", "recovery", "report", "run")
    assert flows == [(f"surgeon-{stage}", "Completed") for stage in stages]


def test_without_a_database_nothing_is_lost(run: tuple[Project, Finished, Finished], tmp_path: Path) -> None:
    """The store knows what is finished; a run that has nothing to compute does not even start a server."""
    first, damped = run[0], run[0].copy(tmp_path / "project")
    shutil.rmtree(damped.root / ".prefect")
    damped.console("run", "--quiet", *DAMPING).ok()
    executed = damped.executed()
    assert executed.keys() == {"export", "benchmark", "report"}
    assert {name for name, _, _ in runs(damped, "task_run")} >= {"export", "pruned/sample"}
    shutil.rmtree(damped.root / ".prefect")
    done = damped.console("run", "--json", *DAMPING).ok()
    assert json.loads(done.stdout)["tasks"]["executed"] == 0
    assert not (damped.root / ".prefect").exists()
    assert damped.contents().items() >= first.contents().items()


def test_killed_runs_are_marked(run: tuple[Project, Finished, Finished], tmp_path: Path) -> None:
    """SIGKILL leaves them running in Prefect's records; the next run of the project says what became of them."""
    undisturbed, project = run[0], Project(tmp_path / "project", run[0].params)
    killed = subprocess.Popen([COMMAND, "run", "--quiet"], cwd=project.root, env=environment())
    while killed.poll() is None and not {"input-factors", "costs"} <= {
        n.split("/")[-1] for n in project.labels().values()
    }:
        time.sleep(0.01)
    killed.kill()
    assert killed.wait() == -9
    left = runs(project, "flow_run")
    assert [kind for _, kind, _ in left].count("RUNNING") == 2  # the run and its stage
    project.console("prune", "--quiet").ok()
    with sqlite3.connect(project.root / ".prefect" / "prefect.db") as database:
        query = "select flow.name, flow_run.state_name from flow_run join flow on flow.id = flow_run.flow_id"
        states = sorted(database.execute(query).fetchall())
    assert ("surgeon-run", "Crashed") in states
    assert ("surgeon-prune", "Crashed") in states
    assert ("surgeon-prune", "Completed") in states
    assert not [task for task in runs(project, "task_run") if task[1] == "RUNNING"]
    assert project.contents().items() <= undisturbed.contents().items()
    digest = project.read("stages/prune.json")["facts"]["weights_digest"]
    assert digest == json.loads(run[1].stdout)["weights_digest"]


def test_servers_of_killed_runs_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed cannot stop its server; the next run of the project does, and touches no other."""
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()

    def server(owner: int, **changes: str) -> subprocess.Popen[bytes]:
        variables = {"PREFECT_HOME": str(tmp_path), "PREFECT__SERVER_EPHEMERAL": "1", OWNER_VARIABLE: str(owner)}
        return subprocess.Popen(["sleep", "60"], env={**os.environ, **variables, **changes})

    orphan = server(ended.pid)
    others = [
        server(os.getpid()),
        server(ended.pid, PREFECT_HOME=str(tmp_path / "other")),
        server(ended.pid, PREFECT__SERVER_EPHEMERAL="0"),
    ]
    try:
        end_orphaned_servers()
        assert orphan.wait(timeout=10) == -15
        assert [other.poll() for other in others] == [None, None, None]
    finally:
        for process in (orphan, *others):
            process.kill()
            process.wait()

"""A run under Prefect, with a server of its own for the time of the run, is the same run, shown and recorded."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flows.prefect_engine import OWNER_VARIABLE, end_orphaned_servers
from tests.flows.project import Finished, Project


@pytest.fixture(scope="module")
def run(params: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Finished, Finished]:
    """A project after `surgeon run` and then `surgeon prune` with the default engine, and what they said."""
    settings = {name: value for name, value in params["run"].items() if name != "engine"}
    one_shot = params | {"prune": {"multiple": 8, "sparsity": 0.2, "shots": 1}, "run": settings}
    project = Project(tmp_path_factory.mktemp("prefect") / "project", one_shot)
    return project, project.console("run", "--json"), project.console("prune", "--quiet")


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


def test_same_weights_and_objects_as_inline(run: tuple[Project, Finished, Finished], tmp_path: Path) -> None:
    project, first, _ = run
    inline = Project(tmp_path / "inline", project.params | {"run": project.params["run"] | {"engine": "inline"}})
    inline.surgeon("run", "--quiet").ok()
    assert project.contents() == inline.contents()
    mine, theirs = json.loads(first.stdout), inline.results()
    assert mine["weights_digest"] == theirs["weights_digest"]
    assert mine["tasks"] == theirs["tasks"]


def test_tasks_are_recorded(run: tuple[Project, Finished, Finished]) -> None:
    project, first, _ = run
    tasks = [task for task in runs(project, "task_run") if not task[0].startswith("surgeon-")]
    assert {kind for _, kind, _ in tasks} == {"COMPLETED"}
    executed = [name for name, _, state in tasks if state == "Completed"]
    assert len(executed) == len(set(executed)) == json.loads(first.stdout)["tasks"]["executed"]
    blocks = {f"shot-01/block-{b:02d}/{kind}" for b in range(3) for kind in ("costs", "update")}
    assert {*blocks, "calibration/sequences", "shot-01/mask", "export", "pruned/sample"} <= set(executed)


def test_found_results_are_called_cached(run: tuple[Project, Finished, Finished]) -> None:
    project, _, _ = run
    cached = [name for name, _, state in runs(project, "task_run") if state == "Cached"]
    assert {"calibration/sequences", "evaluation/windows", "dense/evaluation", "shot-01/evaluation"} <= set(cached)
    assert project.read("timings/prune.json")["executed"] == 0


def test_flows_are_recorded(run: tuple[Project, Finished, Finished]) -> None:
    project, _, _ = run
    with sqlite3.connect(project.root / ".prefect" / "prefect.db") as database:
        query = "select flow.name, flow_run.state_name from flow_run join flow on flow.id = flow_run.flow_id"
        flows = sorted(database.execute(query).fetchall())
    stages = ("benchmark", "calibrate", "evaluate", "export", "model", "prune", "prune", "report", "run")
    assert flows == [(f"surgeon-{stage}", "Completed") for stage in stages]


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

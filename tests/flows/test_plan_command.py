"""`surgeon plan`, and what `surgeon run` says and refuses at its start."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from flows.engine import InlineEngine
from flows.needs import GIB, DiskNeed, MemoryNeeds, require_disk, require_memory
from flows.params import load_params
from flows.render_plan import duration
from flows.session import Session
from flows.workspace import Workspace
from surgeon.errors import ParameterError, StoreError
from tests.flows.project import Finished, Project


def plan(project: Project, *more: str) -> Any:
    return json.loads(project.surgeon("plan", "--json", *more).ok().stdout)


@pytest.fixture(scope="module")
def measured(params: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Finished]:
    """A project in which nothing was run, after a plan, which has measured the machine."""
    project = Project(tmp_path_factory.mktemp("planned") / "project", params)
    return project, project.surgeon("plan", "--json").ok()


def test_a_plan_for_scripts(measured: tuple[Project, Finished]) -> None:
    project, done = measured
    planned = json.loads(done.stdout)
    assert set(planned) == {"stages", "tasks", "flops", "seconds", "memory_gib", "disk_gib"}
    rows = {stage["stage"]: stage for stage in planned["stages"]}
    assert list(rows) == [
        *("start", "calibrate", "evaluate", "prune: curvature", "prune: costs", "prune: mask", "prune: update"),
        *("prune: evaluation", "prune: spectra", "export", "benchmark", "report"),
    ]
    assert set(rows["export"]) == {"stage", "tasks", "flops", "seconds", "memory_gib", "work"}
    assert rows["prune: costs"]["tasks"] == {"to_run": 9, "found": 0}
    assert planned["tasks"] == {"to_run": 37, "found": 0, "total": 37}
    for name in ("flops", "seconds"):
        assert planned[name] == pytest.approx(sum(stage[name] for stage in planned["stages"]))
        assert all(stage[name] >= 0 for stage in planned["stages"])
    assert planned["memory_gib"]["own"] == max(stage["memory_gib"] for stage in planned["stages"])
    assert set(planned["memory_gib"]) == {"own", "load back"}
    assert set(planned["disk_gib"]) == {"results", "export"}
    assert project.labels() == {}


def test_the_machine_is_measured_once(measured: tuple[Project, Finished], tmp_path: Path) -> None:
    project = measured[0].copy(tmp_path / "project")
    before = project.read("machine.json")
    table = project.surgeon("plan").ok()
    assert table.stderr == ""
    assert "prune: curvature" in table.stdout
    assert project.read("machine.json") == before


@pytest.mark.slow
def test_the_machine_is_measured_again_on_request(measured: tuple[Project, Finished], tmp_path: Path) -> None:
    project = measured[0].copy(tmp_path / "project")
    before = project.read("machine.json")
    again = project.surgeon("plan", "--measure").ok()
    assert again.stderr.startswith("measuring how fast this machine is")
    assert project.read("machine.json") != before


def test_a_run_executes_what_was_planned(measured: tuple[Project, Finished], tmp_path: Path) -> None:
    project = measured[0].copy(tmp_path / "project")
    expected = json.loads(measured[1].stdout)["tasks"]["to_run"]
    ran = project.surgeon("run").ok()
    assert ran.stderr.splitlines()[0].startswith(f"{expected} tasks to run, 0 found; expected: ")
    assert "measures this machine" not in ran.stderr
    assert project.results()["tasks"]["executed"] == expected
    after = plan(project)
    assert after["tasks"] == {"to_run": 0, "found": expected, "total": expected}
    assert after["flops"] == 0
    other_prompt = plan(project, "-S", "report.prompt=Hello")
    assert other_prompt["tasks"]["to_run"] == 2
    other_layout = plan(project, "-S", "export.layout=dense")
    assert [s["stage"] for s in other_layout["stages"] if s["tasks"]["to_run"]] == ["export", "benchmark"]


def test_without_a_measurement_a_run_says_that_it_guesses(finished: Project, tmp_path: Path) -> None:
    project = finished.copy(tmp_path / "project")
    ran = project.surgeon("run").ok()
    assert ran.stderr.startswith("0 tasks to run, 37 found; expected: ")
    assert "(roughly; `surgeon plan` measures this machine)" in ran.stderr.splitlines()[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prune.sparsity=2", "prune.sparsity: got 2; must be less than 1"),
        ("run.memory_gib=0.0001", "run.memory_gib: one block at a time needs about"),
        ("calibrate.length=1000", "calibrate.length: got 1000 tokens, but the model's positions end at"),
    ],
)
def test_what_a_run_refuses_a_plan_refuses(
    override: str, message: str, measured: tuple[Project, Finished], tmp_path: Path
) -> None:
    project = measured[0].copy(tmp_path / "project")
    more = ("-S", "run.blocks_per_group=null") if "memory" in override else ()
    for command in ("plan", "run"):
        done = project.surgeon(command, "-S", override, *more)
        assert done.status == 2
        assert message in done.stderr
        assert done.stdout == ""
    assert project.labels() == {}


def test_a_run_that_will_not_fit_is_refused_before_any_work(measured: tuple[Project, Finished], tmp_path: Path) -> None:
    project = measured[0].copy(tmp_path / "project")
    too_large = ("-S", "benchmark.batch_sizes=[10000000]", "-S", "benchmark.rounds=1")
    for command in ("plan", "run"):
        done = project.surgeon(command, *too_large)
        assert done.status == 2
        assert re.search(r"surgeon: benchmark needs about [\d,]+ GiB, but .*lower benchmark\.batch_sizes", done.stderr)
        assert ("prune: curvature" in done.stdout) == (command == "plan")
    assert project.labels() == {}


def session_with(tmp_path: Path, *overrides: str) -> Session:
    return Session(load_params(None, overrides), Workspace(tmp_path), InlineEngine())


def test_memory_that_is_not_there_is_an_error_that_says_what_to_lower(tmp_path: Path) -> None:
    session = session_with(tmp_path)
    needs = MemoryNeeds(
        0.5, {"evaluate": 1.5, "prune: curvature": 4.0, "report": 3.0}, {"load back": 2.0, "benchmark": 5.0}
    )
    require_memory(session, needs, available_gib=6.0)
    with pytest.raises(ParameterError, match=r"benchmark needs about 5 GiB, but 4\.0 GiB are .*benchmark\.batch_sizes"):
        require_memory(session, needs, available_gib=4.0)
    with pytest.raises(ParameterError, match=r"prune: curvature needs about 3\.5 GiB, but 3\.0 .*run\.batch_size"):
        require_memory(session, needs, available_gib=3.0)
    with pytest.raises(ParameterError, match=r"load back needs about 2 GiB, but 1\.0 GiB .*export\.dtype"):
        require_memory(session, MemoryNeeds(0.5, {}, {"load back": 2.0}), available_gib=1.0)


def test_a_budget_counts_where_blocks_are_held_one_at_a_time(tmp_path: Path) -> None:
    """What needs the whole model is compared with what there is, for no budget makes it smaller."""
    session = session_with(tmp_path, "run.memory_gib=2")
    require_memory(session, MemoryNeeds(0.5, {"report": 5.0}, {}), available_gib=6.0)
    require_memory(session, MemoryNeeds(0.5, {"prune: costs": 2.0}, {}), available_gib=0.1)
    with pytest.raises(ParameterError, match=r"prune: costs needs about 4\.5 GiB, but the budget is 2 GiB"):
        require_memory(session, MemoryNeeds(0.5, {"prune: costs": 5.0}, {}), available_gib=6.0)
    with pytest.raises(ParameterError, match=r"report needs about 4\.5 GiB, but 3\.0 GiB are available"):
        require_memory(session, MemoryNeeds(0.5, {"report": 5.0}, {}), available_gib=3.0)


def test_a_disk_that_is_too_small_is_an_error_before_any_work(tmp_path: Path) -> None:
    needs = (DiskNeed(tmp_path / "a" / "store", "results", 3 * GIB), DiskNeed(tmp_path, "export", GIB))
    require_disk(needs, lambda _path: 4 * GIB)
    message = r"store needs 4\.00 GiB \(results 3\.00, export 1\.00\), but only 3\.50 GiB are free\. .*run\.keep=none"
    with pytest.raises(StoreError, match=message):
        require_disk(needs, lambda _path: 7 * GIB // 2)
    with pytest.raises(StoreError, match=r"needs 1048576\.00 GiB"):
        require_disk([DiskNeed(tmp_path, "results", 1 << 50)])


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 61, 3599.6, 7325)] == ["0:00", "1:01", "1:00:00", "2:02:05"]

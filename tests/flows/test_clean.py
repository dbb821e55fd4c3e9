"""`surgeon clean`: what is needed stays, everything else goes, and nobody at work is disturbed."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from surgeon.store import Store, digest_text, registered
from tests.flows.project import Project
from tests.flows.test_kill import kill_when, n_objects

ALL = ("--older-than", "0")


def clean(project: Project, *arguments: str, **more: str) -> Any:
    return json.loads(project.surgeon("clean", "--json", *arguments, **more).ok().stdout)


def stray(project: Project) -> str:
    """An object that nothing needs; its key."""
    store = Store(project.data / "store")
    return store.commit(digest_text("stray"), "sample", {}, {"text": "?"}, label="stray").key


@pytest.fixture(scope="module")
def two_runs(params: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with what a run at another damping left behind; factors of early shots are dropped."""
    run = params["run"] | {"keep": "last"}
    project = Project(tmp_path_factory.mktemp("clean") / "project", params | {"run": run})
    project.surgeon("run", "--quiet", "-S", "prune.damping=0.05", "-S", "calibrate.sequences=5").ok()
    project.surgeon("run", "--quiet").ok()
    return project


@pytest.fixture
def project(two_runs: Project, tmp_path: Path) -> Project:
    return two_runs.copy(tmp_path / "project")


def test_what_the_last_run_needs_stays_and_the_rest_goes(project: Project) -> None:
    before = project.contents()
    plan = clean(project, *ALL)
    assert project.contents() == before
    assert not plan["removed"]
    needed = 5 + 3 * 15 + 3  # as in test_kill
    assert plan["staying_by_reason"] == {f"workspace {project.root}": plan["staying"]}
    assert (plan["staying"]["n"], plan["going"]["n"]) == (needed, len(project.labels()) - needed)
    assert {"input-factors", "update", "costs", "sequences", "shot"} <= set(plan["going_by_kind"])
    # The view of the last run holds nothing of what goes.
    assert plan["going"]["freed_bytes"] == plan["going"]["bytes"] > 100_000
    done = clean(project, *ALL, "--yes")
    assert done == plan | {"removed": True}
    assert len(project.labels()) == needed
    for key in project.labels():
        store = Store(project.data / "store")
        if store.has_payload(key):
            store.verify(key)
    results = project.results()
    project.surgeon("run", "--quiet").ok()
    assert project.results()["tasks"]["executed"] == 0
    assert project.results()["weights_digest"] == results["weights_digest"]
    project.surgeon("run", "--quiet", "-S", "report.new_tokens=5").ok()
    assert project.executed() == {"report": {"sample"}}
    assert clean(project, *ALL)["going"]["n"] == 2


@pytest.mark.parametrize("keep", ["none", "all"])
def test_with_other_policies_a_rerun_hits_too(params: dict[str, Any], tmp_path: Path, keep: str) -> None:
    shots = {**params["prune"], "shots": 2}
    project = Project(tmp_path / "project", params | {"prune": shots, "run": params["run"] | {"keep": keep}})
    project.surgeon("run", "--quiet").ok()
    gone = stray(project)
    assert clean(project, *ALL, "--yes")["going_by_kind"].keys() == {"sample"}
    assert gone not in project.labels()
    project.surgeon("run", "--quiet").ok()
    assert project.results()["tasks"]["executed"] == 0
    project.surgeon("run", "--quiet", "-S", "prune.damping=0.05").ok()
    # Of both shots costs, mask, updates, evaluation; the curvature of the second, and of the first if it was dropped;
    # spectra of the last if it was not.
    assert project.read("timings/prune.json")["executed"] == 2 * 8 + 1 + {"none": 1, "all": 3}[keep]
    assert not {"calibrate", "evaluate"} & project.executed().keys()


def test_young_results_stay(project: Project) -> None:
    plan = clean(project)
    assert plan["going"]["n"] == 0
    assert set(plan["staying_by_reason"]) == {f"workspace {project.root}", "younger than 14 days"}
    store = Store(project.data / "store")
    record = store.path(stray(project)) / "record.json"
    facts = json.loads(record.read_text())
    record.write_text(json.dumps(facts | {"created": "2020-01-01T00:00:00+00:00"}))
    done = clean(project, "--yes")
    assert {kind: count["n"] for kind, count in done["going_by_kind"].items()} == {"sample": 1}


def test_an_interrupted_run_goes_on_where_it_was(params: dict[str, Any], tmp_path: Path) -> None:
    project = Project(tmp_path / "project", params)
    kill_when(project.start("run", "--quiet"), lambda: n_objects(project) >= 25)
    found = project.labels()
    assert clean(project, "--yes")["going"]["n"] == 0
    assert project.labels() == found
    project.surgeon("run", "--quiet").ok()
    total = sum(project.results()["tasks"].values())
    assert 0 < project.results()["tasks"]["executed"] < total - 10


def test_a_live_run_is_left_alone(params: dict[str, Any], tmp_path: Path) -> None:
    project = Project(tmp_path / "project", params)
    run = project.start("run", "--quiet", "--engine", "inline")
    while n_objects(project) < 4:
        assert run.process.is_alive()
    assert run.process.pid is not None
    os.kill(run.process.pid, signal.SIGSTOP)  # so that it is still there
    try:
        refused = project.console("clean", *ALL, "--yes")
    finally:
        os.kill(run.process.pid, signal.SIGCONT)
    assert refused.status == 2
    assert f"is in use by process {run.process.pid} on" in refused.stderr
    assert "(surgeon run --quiet --engine inline), since" in refused.stderr
    assert run.wait().status == 0
    assert clean(project, *ALL, "--yes")["going"]["n"] == 0


def test_workspaces_that_share_a_store(project: Project, tmp_path: Path) -> None:
    shared = str(project.data / "store")
    other = Project(tmp_path / "other", project.params)
    other.surgeon(
        "run", "--quiet", "-S", "prune.damping=0.05", "-S", "calibrate.sequences=5", SURGEON_STORE=shared
    ).ok()
    assert other.results()["tasks"]["executed"] == 2  # its own export and benchmark
    plan = clean(project, *ALL)
    assert plan["workspaces"] == [str(other.root), str(project.root)]
    assert plan["going"]["n"] == 0
    assert clean(other, *ALL, SURGEON_STORE=shared)["staying_by_reason"] == plan["staying_by_reason"]
    shutil.rmtree(other.root)
    for arguments in ((), ("--yes",)):
        refused = project.surgeon("clean", *ALL, *arguments)
        assert refused.status == 2
        assert f"The workspace {other.root} has results in this store, but is not there" in refused.stderr
        assert f"give --forget {other.root} too" in refused.stderr
    assert clean(project, *ALL, "--forget", str(other.root))["going"]["n"] > 30
    assert other.root in registered(Path(shared))
    assert clean(project, *ALL, "--forget", str(other.root), "--yes")["going"]["n"] > 30
    assert set(registered(Path(shared))) == {project.root}
    wrong = project.surgeon("clean", "--forget", "nowhere")
    assert wrong.status == 2
    assert "nowhere: this is not a workspace of the store" in wrong.stderr


def test_a_file_that_cannot_be_read_stops_it(project: Project) -> None:
    (project.data / "manifest.json").write_text("{")
    refused = project.surgeon("clean", *ALL, "--yes")
    assert refused.status == 2
    assert f"{project.data / 'manifest.json'} cannot be read" in refused.stderr


def test_leftovers_and_what_was_set_aside(project: Project) -> None:
    store = Store(project.data / "store")
    store.quarantine(stray(project))
    # No process has such a number.
    left = (
        store.root / "tmp" / store.staging(digest_text("x")).name.replace(f"-{__import__('os').getpid()}-", "-4999999-")
    )
    left.mkdir()
    (left / "part").write_text("half an array")
    table = project.surgeon("clean").ok().stdout
    assert "would go: left by ended processes" in table
    assert "stays: set aside (--damaged removes them)" in table
    assert "nothing was removed yet: add --yes" in table
    assert clean(project, "--yes")["temporary"] == {"n": 1, "bytes": 13, "freed_bytes": 13}
    assert not left.exists()
    assert clean(project)["set_aside"]["n"] == 1
    assert clean(project, "--yes", "--damaged")["set_aside"]["going"]
    assert not (store.root / "corrupt").exists()


def test_without_a_store(params: dict[str, Any], tmp_path: Path) -> None:
    refused = Project(tmp_path / "project", params).surgeon("clean")
    assert refused.status == 2
    assert "there is no store at" in refused.stderr
    assert not (tmp_path / "project" / "data").exists()


@pytest.mark.parametrize("option", [(), ("--no-scm",)])
def test_repositories_without_any_version(project: Project, option: tuple[str, ...]) -> None:
    for command in ([] if option else ["git init --quiet"]), [f"dvc init --quiet {' '.join(option)}"]:
        for line in command:
            program, *arguments = line.split()
            found = shutil.which(program, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
            subprocess.run([str(found), *arguments], cwd=project.root, check=True)
    assert clean(project, *ALL, "--yes")["going"]["n"] > 30
    # An experiment between two stages, in a directory of its own.
    needed, stages = stray(project), project.root / ".dvc/tmp/exps/tmpabc/data/stages"
    stages.mkdir(parents=True)
    (stages.parents[1] / ".dvc").mkdir()
    (stages / "report.json").write_text(json.dumps({"references": {"dense/sample": [needed, "?"]}}))
    plan = clean(project, *ALL, "--yes")
    assert plan["staying_by_reason"][f"experiment at work in {project.root}"]["n"] == 1
    assert needed in project.labels()
    (project.root / ".dvc" / "config").write_text("[core")
    refused = project.surgeon("clean")
    assert refused.status == 2
    assert f"DVC cannot say which versions of {project.root} there are: config file error" in refused.stderr


def test_results_of_a_comparison_stay(project: Project) -> None:
    rows = [{"name": "magnitude", "set": ["prune.method=magnitude"]}]
    spec = {"tables": [{"title": "T", "sparsities": [0.1], "rows": rows}]}
    (project.root / "compare.yaml").write_text(json.dumps(spec))
    project.surgeon("compare", "compare.yaml", "--quiet").ok()
    assert clean(project, *ALL, "--yes")["going"]["n"] > 30
    project.surgeon("compare", "compare.yaml", "--quiet").ok()
    assert project.read("timings/compare.json")["executed"] == 0


def test_the_registration_moves_with_the_project(project: Project) -> None:
    assert set(registered(project.data / "store")) == {project.root}

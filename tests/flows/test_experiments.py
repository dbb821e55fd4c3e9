"""DVC's experiments, in the workspace, in directories of their own and from its queue: all share one store."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from flows.workspace import Workspace, project_of
from tests.flows.repository import Repository

ONE_SHOT = {"structure": "rows-and-columns", "sparsity": 0.2, "shots": 1}


@pytest.fixture(scope="module")
def repository(params: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Repository:
    repository = Repository(tmp_path_factory.mktemp("experiments") / "repository", params | {"prune": ONE_SHOT})
    repository.run()
    return repository


def last_tasks(repository: Repository, name: str) -> dict[str, int]:
    tasks: dict[str, int] = repository.experiments()[name]["metrics"]["tasks"]
    return tasks


def test_the_project_of_an_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SURGEON_STORE", "SURGEON_CACHE", "SURGEON_MODELS"):
        monkeypatch.delenv(name, raising=False)
    project = tmp_path / "project"
    for inner in (project, project / ".dvc/tmp/exps/tmpabc", project / ".dvc/tmp/exps/standalone/x"):
        (inner / ".dvc").mkdir(parents=True)
        (inner / "sub").mkdir()
        assert project_of(inner) == project
        assert project_of(inner / "sub") == project / "sub"
        assert Workspace(inner).store.root == project / "data" / "store"
        assert Workspace(inner, "mine").store.root == project / "mine"
        assert Workspace(inner).models == project / "data" / "models"
        assert Workspace(inner).manifest == inner / "data" / "manifest.json"
    assert project_of(tmp_path / "elsewhere" / "tmp" / "exps" / "x") == tmp_path / "elsewhere" / "tmp" / "exps" / "x"


def test_in_a_directory_of_its_own(repository: Repository) -> None:
    """Another prompt: everything but two samples comes from the store of the workspace."""
    before, objects = repository.results(), set(repository.labels())
    repository.command("dvc", "exp", "run", "--temp", "--name", "prompt", "-S", "report.prompt=Hello")
    found = repository.experiments()["prompt"]
    assert found["params"]["report"]["prompt"] == "Hello"
    assert found["metrics"]["tasks"] == {"executed": 2, "cached": 0}
    assert found["metrics"]["samples"]["dense"]["prompt"] == "Hello"
    assert found["metrics"]["dense"] == before["dense"]
    assert len(set(repository.labels()) - objects) == 2
    assert repository.results() == before
    assert repository.status() == set()
    # The experiment's directory is gone, and did not become a workspace of the store.
    assert not list((repository.root / ".dvc/tmp/exps/standalone").glob("*/data"))
    plan = json.loads(repository.surgeon("clean", "--json", "--older-than", "0").ok().stdout)
    assert plan["workspaces"] == [str(repository.root)]
    assert plan["going"]["n"] == 0
    assert plan["staying_by_reason"][f"experiment prompt of {repository.root}"]["n"] == 2
    repository.command("dvc", "exp", "remove", "prompt")
    plan = json.loads(repository.surgeon("clean", "--json", "--older-than", "0").ok().stdout)
    assert {kind: count["n"] for kind, count in plan["going_by_kind"].items()} == {"sample": 2}


@pytest.mark.slow
def test_in_the_workspace(repository: Repository) -> None:
    before = repository.results()
    repository.command("dvc", "exp", "run", "--name", "more", "-S", "prune.sparsity=0.3")
    assert repository.results()["pruned"]["sparsity"] > before["pruned"]["sparsity"]
    # What the costs are made of was there; mask, three updates and the evaluation were not.
    assert repository.read("timings/prune.json")["executed"] == 5
    changes = json.loads(repository.command("dvc", "metrics", "diff", "--json"))["data/metrics/run.json"]
    assert changes["pruned.perplexity"]["old"] == before["pruned"]["perplexity"]
    assert changes["pruned.sparsity"]["new"] == repository.results()["pruned"]["sparsity"]
    title = "perplexity against sparsity"
    both = json.loads(
        repository.command("dvc", "plots", "diff", "HEAD", "workspace", "--show-vega", "--targets", title)
    )
    assert {value["rev"] for value in both["data"]["values"]} == {"HEAD", "workspace"}
    shown = json.loads(repository.command("dvc", "plots", "show", "--show-vega", title))
    assert [v["perplexity"] for v in shown["data"]["values"]] == [
        s["perplexity"] for s in repository.results()["shots"]
    ]
    assert repository.experiments()["more"]["metrics"]["pruned"] == repository.results()["pruned"]
    # Back to the state of the commit: everything comes from DVC's cache.
    repository.command("git", "checkout", "--quiet", ".")
    repository.command("dvc", "checkout")
    assert repository.results() == before
    assert repository.status() == set()


@pytest.mark.slow
@pytest.mark.parametrize(("how", "sparsity"), [("start", 0.25), ("run-all", 0.15)])
def test_queue(repository: Repository, how: str, sparsity: float) -> None:
    # Other values each time, or DVC would not even run the stages: it remembers runs, too.
    names = {f"{how}-prompt": f"report.prompt={how}", f"{how}-sparsity": f"prune.sparsity={sparsity}"}
    for name, change in names.items():
        repository.command("dvc", "exp", "run", "--queue", "--name", name, "-S", change)
    if how == "start":
        repository.command("dvc", "queue", "start")
        end = time.monotonic() + 900
        while any(word in repository.command("dvc", "queue", "status") for word in ("Queued", "Running")):
            assert time.monotonic() < end
            time.sleep(2)
    else:
        repository.command("dvc", "exp", "run", "--run-all")
    assert names.keys() <= repository.experiments().keys()
    assert last_tasks(repository, f"{how}-prompt")["executed"] == 2
    # A mask, three updates and an evaluation; the export, its benchmark and a sample. Costs and all below were there.
    assert last_tasks(repository, f"{how}-sparsity")["executed"] == 5 + 2 + 1
    repository.command("dvc", "exp", "remove", *names)

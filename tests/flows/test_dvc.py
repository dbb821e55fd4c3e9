"""The project's own dvc.yaml, in a new git repository with a tiny model: what runs again, and what lies on disk."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.flows.project import ROOT
from tests.flows.repository import STAGES, Repository


@pytest.fixture(scope="module")
def repository(params: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """After a first `dvc repro`, committed to git."""
    shots = {"structure": "rows-and-columns", "sparsity": 0.2, "shots": 1}
    repository = Repository(tmp_path_factory.mktemp("dvc") / "repository", params | {"prune": shots})
    assert repository.repro() == set(STAGES)
    repository.commit()
    return repository


def test_stages_are_the_commands() -> None:
    from flows.stages import STAGES as FLOWS

    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert tuple(stages) == FLOWS == STAGES
    for name, stage in stages.items():
        assert stage["cmd"].startswith(f"surgeon {name} --quiet")


def test_git_sees_the_lock_and_nothing_of_the_data(repository: Repository) -> None:
    assert repository.command("git", "status", "--porcelain") == ""
    tracked = repository.command("git", "ls-files").split()
    assert "dvc.lock" in tracked
    assert not [name for name in tracked if name.startswith("data/")]


def test_no_second_copy_on_disk(repository: Repository) -> None:
    """Arrays have three names (in the store, in the view, in DVC's cache) and lie on disk once."""
    data, cache = repository.data, repository.root / ".dvc" / "cache"
    chunks = [path for path in (data / "run.zarr").rglob("*") if path.is_file() and "c" in path.parts]
    assert len(chunks) > 50
    assert min(path.stat().st_nlink for path in chunks) == 3
    assert {path.stat().st_nlink for path in (data / "export").iterdir()} == {2}
    sizes = {
        folder: {s.st_ino: s.st_size for path in folder.rglob("*") if path.is_file() and (s := path.stat())}
        for folder in (data / "store", data / "export", data / "report", cache, data / "run.zarr")
    }
    once = sum({inode: size for files in sizes.values() for inode, size in files.items()}.values())
    needed = sum(sum(sizes[data / name].values()) for name in ("store", "export", "report"))
    # Beside the arrays there are lists of files and groups of the view; they are small, as the model here is.
    assert once < needed + 0.2 * sum(sizes[cache].values())
    assert sum(sizes[cache].values()) > 0.5 * needed


@pytest.mark.parametrize(
    ("section", "key", "value", "changed"),
    [
        ("model", "dtype", "bfloat16", {"model"}),
        ("calibrate", "sequences", 5, {"calibrate"}),
        ("prune", "ranking", "cost", {"prune", "recovery", "export"}),
        ("recovery", "method", "full", {"recovery", "export"}),
        ("export", "dtype", "bfloat16", {"export"}),
        ("benchmark", "prompt", 5, {"benchmark"}),
        ("report", "prompt", "Hello", {"report"}),
        ("run", "batch_size", 2, {"evaluate", "prune", "recovery"}),
        ("run", "precision", "tf32", {"evaluate", "prune", "recovery"}),
        ("run", "blocks_per_group", 1, set()),
        ("run", "engine", "prefect", set()),
    ],
)
def test_stages_that_a_parameter_is_of(
    repository: Repository, section: str, key: str, value: Any, changed: set[str]
) -> None:
    before = repository.params[section][key]
    repository.change(section, key, value)
    try:
        assert repository.status() == changed
    finally:
        repository.change(section, key, before)


def test_repro_does_nothing_then_only_what_changed(repository: Repository) -> None:
    assert repository.repro() == set()
    first = repository.results()
    executed = first["tasks"]["executed"]
    assert executed == 3 + 9 + 7
    repository.change("prune", "damping", {"activations": 0.05, "gradients": 0.05})
    assert repository.repro() == {"prune", "recovery", "export", "benchmark", "report"}
    assert repository.executed()["prune"] == {"costs", "mask", "update", "evaluation", "spectra"}
    assert repository.results()["weights_digest"] != first["weights_digest"]
    changes = json.loads(repository.command("dvc", "metrics", "diff", "--json"))["data/metrics/run.json"]
    assert changes["pruned.perplexity"]["old"] == first["pruned"]["perplexity"]
    assert changes["pruned.perplexity"]["new"] == repository.results()["pruned"]["perplexity"]
    shown = json.loads(repository.command("dvc", "metrics", "show", "--json"))
    assert shown[""]["data"]["data/metrics/run.json"]["data"]["pruned"] == repository.results()["pruned"]
    # The view of before comes back from DVC's cache as links; the store has all of it.
    repository.command("git", "checkout", "--quiet", "params.yaml", "dvc.lock")
    repository.command("dvc", "checkout")
    assert repository.results() == first
    assert repository.status() == set()


def test_plot(repository: Repository) -> None:
    plot = json.loads(repository.command("dvc", "plots", "show", "--show-vega", "perplexity against sparsity"))
    shots = repository.results()["shots"]
    points = [(value["sparsity"], value["perplexity"]) for value in plot["data"]["values"]]
    assert points == [(shot["sparsity"], shot["perplexity"]) for shot in shots]


def test_comparison_is_a_pipeline_of_its_own(params: dict[str, Any], tmp_path: Path) -> None:
    repository = Repository(tmp_path / "repository", params)
    (repository.root / "comparison").mkdir()
    shutil.copy(ROOT / "comparison" / "dvc.yaml", repository.root / "comparison")
    rows = [{"name": "in shots", "set": ["prune.shots=2"], "from_shots": True}]
    spec = {"tables": [{"title": "Rows", "sparsities": [0.1, 0.2], "rows": rows}]}
    (repository.root / "compare.yaml").write_text(yaml.safe_dump(spec))
    repository.change("prune", "sparsity", 0.1)
    repository.change("prune", "shots", 1)
    assert repository.repro() == set(STAGES)
    assert not (repository.data / "compare").exists()
    command = ("dvc", "repro", "comparison/dvc.yaml")
    assert "Running stage 'comparison/dvc.yaml:compare'" in repository.command(*command)
    assert "Running stage" not in repository.command(*command)
    shown = json.loads(repository.command("dvc", "metrics", "show", "--json"))[""]["data"]
    assert shown["data/compare/comparison.json"]["data"] == repository.read("compare/comparison.json")
    repository.commit()
    assert not [name for name in repository.command("git", "ls-files").split() if name.startswith("data/")]
    repository.change("prune", "damping", {"activations": 0.05, "gradients": 0.05})
    assert "Running stage 'comparison/dvc.yaml:compare'" in repository.command(*command)


def test_the_comparison_of_the_project_can_be_made() -> None:
    from flows.compare_spec import load_spec, plan_runs

    file = ROOT / "compare.yaml"
    assert len(plan_runs(load_spec(file), file, ROOT / "params.yaml", [])) == 19

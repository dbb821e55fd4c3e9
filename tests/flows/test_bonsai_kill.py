"""A round of Bonsai that is killed goes on at the next sub-model, and ends with the same bits."""

from pathlib import Path
from typing import Any

import pytest

from tests.flows.project import Project, slow
from tests.flows.test_kill import kill_when


@pytest.fixture(scope="module")
def by_rounds(params: dict[str, Any]) -> dict[str, Any]:
    """Two rounds of twelve sub-models."""
    prune = {"method": "bonsai", "sparsity": 0.3, "shots": 2, "multiple": 8, "bonsai": {"sub_models": 12}}
    return params | {"prune": prune}


@pytest.fixture(scope="module")
def undisturbed(by_rounds: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("undisturbed") / "project", by_rounds)
    project.surgeon("prune", "--quiet").ok()
    return project


def n_sub_models(project: Project) -> int:
    return sum("sub-model" in label for label in project.labels().values()) if project.objects.is_dir() else 0


@pytest.mark.parametrize("k", [5, slow(17)])
def test_only_missing_sub_models_run(k: int, by_rounds: dict[str, Any], undisturbed: Project, tmp_path: Path) -> None:
    project = Project(tmp_path / "project", by_rounds)
    kill_when(project.start("prune", "--quiet"), lambda: n_sub_models(project) >= k)
    there = n_sub_models(project)
    assert k <= there < 24, "it was killed too late"
    missing = set(undisturbed.labels().values()) - set(project.labels().values())
    assert sum("sub-model" in label for label in missing) == 24 - there
    project.surgeon("prune", "--quiet").ok()
    assert project.contents() == undisturbed.contents()

"""One tiny model, two texts and one finished run, shared by all tests of flows."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_tiny

from surgeon.export import load_back
from tests.flows.project import Finished, Project, logits_here, write_text
from tests.flows.sessions import small_inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, `calibration.txt` and `evaluation.txt`."""
    folder = tmp_path_factory.mktemp("inputs")
    make_tiny("llama-gqa-tied", folder / "model")
    write_text(folder / "calibration.txt", 1)
    write_text(folder / "evaluation.txt", 2)
    return folder


@pytest.fixture(scope="session")
def params(inputs: Path) -> dict[str, Any]:
    """Sections of params.yaml for a run of a second: 3 shots on 3 blocks."""
    return {
        "model": {"source": str(inputs / "model")},
        "calibrate": {"text": {"source": str(inputs / "calibration.txt")}, "sequences": 6, "length": 32},
        "evaluate": {"text": {"source": str(inputs / "evaluation.txt")}, "windows": 4, "length": 32},
        "prune": {"structure": "rows-and-columns", "sparsity": 0.3, "shots": 3},
        "benchmark": {"rounds": 0},
        "report": {"new_tokens": 4},
        "run": {"engine": "inline", "batch_size": 3, "blocks_per_group": 3, "keep": "all"},
    }


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Parameters of runs on two blocks of width 16."""
    return small_inputs(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def in_process() -> Iterator[None]:
    """One thread, so that sums have one order; no waiting for the disk, for no process of its own is killed."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _file: None)
        for name in ("SURGEON_STORE", "SURGEON_MODELS"):
            patch.delenv(name, raising=False)
        patch.setattr(load_back, "fresh_logits", logits_here)
        yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="session")
def finished_with_output(params: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Finished]:
    """A project after `surgeon run --json`, and what that said. Tests copy the project and do not change it."""
    project = Project(tmp_path_factory.mktemp("finished") / "project", params)
    return project, project.console("run", "--json")


@pytest.fixture(scope="session")
def finished(finished_with_output: tuple[Project, Finished]) -> Project:
    project, output = finished_with_output
    output.ok()
    return project


@pytest.fixture
def again(finished: Project, tmp_path: Path) -> Project:
    """A copy of the finished project."""
    return finished.copy(tmp_path / "project")

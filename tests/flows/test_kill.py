"""A run that is killed at any moment goes on where it was, and ends with the same bits."""

import itertools
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.flows.project import Project, Started, slow, tasks_of

KILLED = -9
N_OBJECTS = 5 + 2 * 15 + 3
"""Sequences, windows, dense evaluation, 2 samples; shots of 6 factors, 3 costs, mask, 3 updates, record, evaluation; 3
spectra."""
ONE_GROUP, THREE_GROUPS = (0,), (0, 1, 2)


def n_objects(project: Project) -> int:
    try:
        return sum(1 for prefix in os.scandir(project.objects) for _ in os.scandir(prefix))
    except FileNotFoundError:
        return 0


def unfinished(project: Project) -> set[str]:
    try:
        return {entry.name for entry in os.scandir(project.data / "store" / "tmp")}
    except FileNotFoundError:
        return set()


def kill_when(started: Started, moment: Callable[[], bool]) -> None:
    while started.process.is_alive():
        if moment():
            started.kill()
            break
        time.sleep(0.0005)
    assert started.wait().status == KILLED


def check_goes_on(project: Project, undisturbed: Project, first_blocks: tuple[int, ...]) -> None:
    """Runs again and compares everything with the undisturbed run."""
    missing = set(undisturbed.labels().values()) - set(project.labels().values())
    export_is_missing = not (project.data / "export").exists()
    is_unmeasured = not (project.data / "stages" / "benchmark.json").exists()
    project.surgeon("run", "--quiet").ok()
    results, expected = project.results(), undisturbed.results()
    assert results["weights_digest"] == expected["weights_digest"]
    assert project.contents() == undisturbed.contents()
    outside = export_is_missing + is_unmeasured
    assert results["tasks"]["executed"] == len(tasks_of(missing, first_blocks)) + outside
    if first_blocks == ONE_GROUP:
        # With several groups, what groups hand to each other is not asked for again in a finished shot.
        assert sum(results["tasks"].values()) == sum(expected["tasks"].values())
    export = "export/model.safetensors"
    assert (project.data / export).read_bytes() == (undisturbed.data / export).read_bytes()
    assert not unfinished(project)
    assert not [path.name for path in project.data.iterdir() if path.name.startswith(".")]


@pytest.fixture(scope="module")
def two_shots(params: dict[str, Any]) -> dict[str, Any]:
    return params | {"prune": {"widths": "free", "sparsity": 0.3, "shots": 2}}


@pytest.fixture(scope="module")
def undisturbed(two_shots: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("undisturbed") / "project", two_shots)
    project.surgeon("run", "--quiet").ok()
    assert len(project.labels()) == N_OBJECTS
    return project


@pytest.mark.parametrize("k", [1, 4, slow(8), slow(12), 16, slow(19), 25, 33])
def test_after_the_kth_object(two_shots: dict[str, Any], undisturbed: Project, tmp_path: Path, k: int) -> None:
    project = Project(tmp_path / "project", two_shots)
    kill_when(project.start("run", "--quiet"), lambda: n_objects(project) >= k)
    assert k <= n_objects(project) < N_OBJECTS, "it was killed too late"
    check_goes_on(project, undisturbed, ONE_GROUP)


@pytest.mark.parametrize("k", [slow(5), 21])
def test_while_the_kth_object_is_written(
    two_shots: dict[str, Any], undisturbed: Project, tmp_path: Path, k: int
) -> None:
    project = Project(tmp_path / "project", two_shots)
    kill_when(project.start("run", "--quiet"), lambda: n_objects(project) == k - 1 and bool(unfinished(project)))
    assert unfinished(project)
    check_goes_on(project, undisturbed, ONE_GROUP)


def test_while_the_export_is_written(two_shots: dict[str, Any], undisturbed: Project, tmp_path: Path) -> None:
    project = Project(tmp_path / "project", two_shots)
    kill_when(project.start("run", "--quiet"), lambda: any(project.data.glob(".export*")))
    check_goes_on(project, undisturbed, ONE_GROUP)


def test_between_groups_of_blocks(two_shots: dict[str, Any], tmp_path: Path) -> None:
    params = two_shots | {"run": two_shots["run"] | {"blocks_per_group": 1}}
    whole = Project(tmp_path / "whole", params)
    whole.surgeon("run", "--quiet").ok()
    project = Project(tmp_path / "killed", params)
    kill_when(project.start("run", "--quiet"), lambda: n_objects(project) >= 8)
    check_goes_on(project, whole, THREE_GROUPS)


SEED = int(os.environ.get("SURGEON_TEST_SEED", "0")) or random.randrange(1, 10**6)
"""Of the random moments; a failure shows it, and the variable repeats it (as far as moments can be repeated)."""


@pytest.mark.parametrize("kills", [5, slow(30)])
def test_soak(two_shots: dict[str, Any], undisturbed: Project, tmp_path: Path, kills: int) -> None:
    """Killed at random moments, again and again, in one store after the other, each of which then goes on to the end.

    A store is killed up to four times before it may finish, and then has the same bytes as one that never was.
    """
    draw = random.Random(SEED)
    begun = time.perf_counter()
    Project(tmp_path / "timed", two_shots).surgeon("run", "--quiet").ok()
    duration = time.perf_counter() - begun
    killed = 0
    for number in itertools.count():
        project = Project(tmp_path / f"project-{number}", two_shots)
        for _ in range(draw.randint(1, 4)):
            started = project.start("run", "--quiet")
            time.sleep(draw.uniform(0.05, 1.0) * duration)
            started.kill()
            finished = started.wait()
            assert finished.status in (0, KILLED), (SEED, finished)
            killed += finished.status == KILLED
        check_goes_on(project, undisturbed, ONE_GROUP)
        shutil.rmtree(project.root)
        if killed >= kills:
            break
        assert number < 4 * kills, f"seed {SEED}: runs end before they are killed"

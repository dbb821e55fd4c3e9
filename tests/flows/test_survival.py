"""What happens to a store: damage, company, a full disk. Nothing is lost, nothing is silently wrong."""

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from surgeon.errors import CorruptObjectError
from surgeon.store import Store
from tests.flows.project import Project, slow
from tests.flows.sessions import Pruned, Runs
from tests.flows.test_kill import n_objects


def flip(path: Path) -> None:
    """Changes one bit in the middle of a file, in place, as a bad disk does."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def chunks(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file() and "c" in path.relative_to(directory).parts)


def directory_of(project: Project, label: str) -> Path:
    (key,) = (key for key, found in project.labels().items() if found == label)
    return Store(project.data / "store").path(key)


DAMPING = ("-S", "prune.damping=0.05")
READ_FOR_DAMPING = ("calibration/sequences", "evaluation/windows", "shot-01/block-01/input-factors")
"""Another damping needs costs from factors, and evaluations."""


@pytest.fixture(scope="module")
def damped(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The finished project after another damping, undamaged."""
    project = finished.copy(tmp_path_factory.mktemp("damped") / "project")
    project.surgeon("run", "--quiet", *DAMPING).ok()
    return project


@pytest.mark.parametrize("label", READ_FOR_DAMPING)
def test_damaged_results_are_computed_again(again: Project, damped: Project, label: str) -> None:
    """A bit of an array is flipped in the store; only that result is made again beside what is new anyway."""
    directory = directory_of(again, label)
    flip(chunks(directory)[-1])
    done = again.surgeon("run", "--quiet", *DAMPING).ok()
    assert re.search(rf"{label} .*cannot be decoded.*It was moved to .*corrupt/{directory.name}", done.stderr)
    assert done.stderr.count("It is computed again.") == 1
    assert again.contents() == damped.contents()
    assert again.results()["weights_digest"] == damped.results()["weights_digest"]
    assert [path.name[:64] for path in (again.data / "store" / "corrupt").iterdir()] == [directory.name]
    assert executed(again) == executed(damped) + 1


def executed(project: Project) -> int:
    found: int = project.results()["tasks"]["executed"]
    return found


@pytest.mark.parametrize("label", ["shot-02/shot", "dense/evaluation", "pruned/sample", slow("shot-03/evaluation")])
def test_a_changed_number_is_found(again: Project, finished: Project, label: str) -> None:
    """Facts lie in the reference: a flipped digit there would be a wrong perplexity, and a wrong model in the end."""
    flip(directory_of(again, label) / "zarr.json")
    done = again.surgeon("run", "--quiet").ok()
    assert done.stderr.count("It is computed again.") == 1
    assert again.contents() == finished.contents()
    assert executed(again) == (0 if label == "shot-02/shot" else 1)


@pytest.mark.parametrize("damage", [flip, cut, slow(Path.unlink)], ids=["flipped", "cut", "removed"])
def test_damaged_weights_are_found_by_the_export(again: Project, finished: Project, damage: Any) -> None:
    """The command of one stage repairs what earlier stages made."""
    damage(chunks(directory_of(again, "shot-03/block-02/update"))[0])
    done = again.surgeon("export", "--quiet", "-S", "export.dtype=bfloat16").ok()
    assert "shot-03/block-02/update" in done.stderr
    assert again.contents() == finished.contents()
    assert again.executed()["export"] == {"export", "update"}


def test_damage_found_by_looking_is_named(again: Project) -> None:
    """Commands that only look compute nothing: they say what is damaged and what makes it again."""
    flip(directory_of(again, "shot-01/shot") / "zarr.json")
    done = again.surgeon("status")
    assert done.status == 1
    assert re.search(r"is not what was written there\. It was moved to .*`surgeon run` computes it again", done.stderr)
    assert "Traceback" not in done.stderr
    again.surgeon("run", "--quiet").ok()
    again.surgeon("status").ok()


def test_verify_reads_everything(again: Project) -> None:
    """Also what no run would read today."""
    again.surgeon("run", "--quiet", "-S", "run.keep=none").ok()
    sound = json.loads(again.surgeon("verify", "--json").ok().stdout)
    store = Store(again.data / "store")
    n_evicted = sum(not store.has_payload(key) for key in store.all_keys())
    assert (sound["verified"], sound["evicted"]) == (len(again.labels()) - n_evicted, n_evicted)
    assert n_evicted == 18
    assert sound["damaged"] == []
    flip(chunks(directory_of(again, "shot-01/block-00/costs"))[0])
    flip(directory_of(again, "shot-01/evaluation") / "zarr.json")
    done = again.surgeon("verify")
    assert done.status == 1
    assert done.stdout.count("It was moved to") == 2
    assert f"{sound['verified'] - 2} results are what was committed" in done.stdout
    assert "2 were damaged" in done.stdout
    again.surgeon("verify").ok()


def test_what_is_damaged_again_and_again_is_an_error(
    in_process: None, small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that loses what was just written is no reason to compute for ever."""
    runs = Runs(small, tmp_path)
    session = runs.prune(shots=1).session
    told: list[str] = []
    monkeypatch.setattr(session, "warn", told.append)
    key = session.windows.key

    def body() -> None:
        flip(chunks(runs.store.path(session.windows.key))[0])
        runs.store.open(key)["tokens"]

    with pytest.raises(CorruptObjectError, match="evaluation/windows"):
        session.stage("looking", body)
    assert len(told) == 1


def test_results_dropped_by_another_run(in_process: None, small: dict[str, Any], tmp_path: Path) -> None:
    """Two runs share a store; one has finished the shot and drops its factors while the other still reads them."""
    runs = Runs(small, tmp_path)
    expected = runs.prune(shots=1).digests
    factors = [ref for name, ref in runs.prune(shots=1).references.items() if name.endswith("factors")]
    dropped = []

    def body() -> Pruned:
        if not dropped:
            for reference in factors:
                runs.store.evict(reference.key)
            dropped.extend(factors)
            runs.store.open(factors[0].key)
        return runs.prune(shots=1, damping=0.07)

    found = runs.session({"shots": 1}).stage("prune", body)
    assert found.kinds()["curvature"] == 1
    assert runs.prune(shots=1).digests == expected


def test_two_runs_at_once_share_the_work(finished: Project, params: dict[str, Any], tmp_path: Path) -> None:
    store = tmp_path / "store"
    projects = [Project(tmp_path / name, params) for name in ("one", "two")]
    started = [project.start("run", "--quiet", SURGEON_STORE=str(store)) for project in projects]
    for run in started:
        run.wait().ok()
    found = Project(tmp_path, params)
    found.objects = store / "objects"
    assert found.contents() == finished.contents()
    own = 2  # each has an export of its own, and measures it
    assert sum(executed(project) for project in projects) == executed(finished) + own
    for project in projects:
        assert project.results()["weights_digest"] == finished.results()["weights_digest"]
    assert not list((store / "tmp").iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own in memory that is too small; the test makes it larger."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, check=False)
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_disk_that_is_too_small(small_disk: Path, finished: Project) -> None:
    """Known before any work."""
    resize(small_disk, 2 * pages(finished.root))
    project = Project(small_disk / "project", finished.params)
    done = project.surgeon("run", "--quiet")
    assert done.status == 2
    assert re.search(r"needs .* GiB .*, but only .* GiB are free\. Keep less", done.stderr)
    assert set(project.labels().values()) <= {"calibration/sequences", "evaluation/windows"}


def fill(disk: Path) -> None:
    """Something else takes all that is left."""
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            pass


@pytest.mark.parametrize("k", [slow(1), 6, slow(20), 51])
def test_a_disk_that_fills_up(small_disk: Path, finished: Project, k: int) -> None:
    """The disk is full in the store, or in what comes after; the run says so and goes on once there is space."""
    resize(small_disk, 16 * pages(finished.root))
    project = Project(small_disk / "project", finished.params)
    started = project.start("run", "--quiet")
    while n_objects(project) < k:
        assert started.process.is_alive()
        time.sleep(0.0005)
    fill(small_disk)
    done = started.wait()
    assert done.status == 2, done
    assert re.search("no space left", done.stderr, re.IGNORECASE), done
    assert "Free some space" in done.stderr
    assert "Traceback" not in done.stderr
    (small_disk / "filler").unlink()
    assert len(project.labels()) >= k
    project.surgeon("run", "--quiet").ok()
    assert project.contents() == finished.contents()
    assert project.results()["weights_digest"] == finished.results()["weights_digest"]
    assert not list((project.data / "store" / "tmp").iterdir())


def pages(directory: Path) -> int:
    """Pages of 4 KiB that the files below a directory take, each counted once, whatever its names."""
    files = {found.st_ino: found.st_size for path in directory.rglob("*") if path.is_file() and (found := path.stat())}
    return sum(-(-size // 4096) for size in files.values())


def resize(disk: Path, kib: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kib}k", disk], check=True)

"""Runs with their store in a bucket: on several machines (directories with a cache each), and killed in the middle."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.opening import open_session
from flows.params import Params
from flows.prune import prune
from surgeon.store import Store, StorePlace
from surgeon.store.files import is_stale
from tests.flows.project import Project
from tests.surgeon.store.buckets import BUCKET, client, files, s3_server, variables


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_server(tmp_path_factory.mktemp("s3")) as address:
        yield address


@pytest.fixture(scope="module")
def two_shots(params: dict[str, Any]) -> dict[str, Any]:
    prune = {"structure": "rows-and-columns", "sparsity": 0.2, "shots": 2}
    return params | {"prune": prune, "run": params["run"] | {"keep": "last"}}


def in_bucket(params: dict[str, Any], prefix: str) -> dict[str, Any]:
    return params | {"run": params["run"] | {"store": f"s3://{BUCKET}/{prefix}"}}


def digests(project: Project) -> tuple[str, dict[str, str]]:
    manifest = project.read("manifest.json")
    return project.results()["weights_digest"], {name: found["digest"] for name, found in manifest.items()}


@pytest.fixture(scope="module")
def undisturbed(two_shots: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The same run in a directory."""
    project = Project(tmp_path_factory.mktemp("undisturbed") / "project", two_shots)
    project.surgeon("run", "--quiet").ok()
    return project


@pytest.fixture(scope="module")
def first(
    two_shots: dict[str, Any], undisturbed: Project, server: str, tmp_path_factory: pytest.TempPathFactory
) -> Project:
    """A run with its store in a bucket."""
    project = Project(tmp_path_factory.mktemp("bucket") / "project", in_bucket(two_shots, "shared/runs"))
    project.surgeon("run", "--quiet", **variables(server)).ok()
    return project


def test_the_bucket_changes_no_bit(first: Project, undisturbed: Project) -> None:
    assert digests(first) == digests(undisturbed)
    assert first.results()["tasks"] == undisturbed.results()["tasks"]


def test_another_machine_finds_everything(
    first: Project, two_shots: dict[str, Any], server: str, tmp_path: Path
) -> None:
    """Its cache is empty. It executes no task, fetches what its view shows, and can look at everything."""
    second = Project(tmp_path / "second", in_bucket(two_shots, "shared/runs"))
    there = variables(server)
    lines = json.loads(second.surgeon("status", "--json", **there).ok().stdout)
    assert {line["would_run"] for line in lines} == {""}
    second.surgeon("run", "--quiet", **there).ok()
    # What is no result of the store: the export, and no model is measured with rounds: 0.
    assert {kind for kinds in second.executed().values() for kind in kinds} <= {"export", "benchmark"}
    assert digests(second) == digests(first)
    shown = {path.relative_to(second.data): path.read_bytes() for path in (second.data / "run.zarr").rglob("c/*")
             if path.is_file()}  # fmt: skip
    assert shown == {path: (first.data / path).read_bytes() for path in shown}
    assert len(shown) > 10
    rows = json.loads(second.surgeon("inspect", "--objects", "--json", **there).ok().stdout)
    assert {row["name"] for row in rows if not row["payload"]} == {
        f"shot-01/block-0{block}/{kind}" for block in range(3) for kind in ("input-factors", "output-factors")
    }
    verified = json.loads(second.surgeon("verify", "--json", **there).ok().stdout)
    assert verified["damaged"] == []
    assert verified["verified"] >= len(rows) - 6
    # Another damping needs the factors of the first shot that run.keep dropped from the bucket, too.
    second.surgeon("run", "--quiet", "-S", "prune.damping=0.05", **there).ok()
    assert not {"calibrate", "evaluate"} & second.executed().keys()


def test_clean_leaves_the_bucket_alone(first: Project, server: str, tmp_path: Path) -> None:
    copy = first.copy(tmp_path / "copy")
    before = set(files(server, "shared/runs"))
    done = copy.surgeon("clean", "--older-than", "0", "--yes", **variables(server))
    assert f"the bucket s3://{BUCKET}/shared/runs is left as it is" in done.ok().stdout
    assert set(files(server, "shared/runs")) == before


def test_killed_in_the_middle_of_an_upload(
    two_shots: dict[str, Any], undisturbed: Project, server: str, tmp_path: Path
) -> None:
    """Three times, at other places; each time another machine goes on with an empty cache."""
    s3 = client(server)
    for attempt, n_files in enumerate((9, 40, 90)):
        project = Project(tmp_path / f"machine-{attempt}", in_bucket(two_shots, "killed"))
        started = project.start("run", "--quiet", **variables(server))
        while started.process.is_alive():
            found = s3.list_objects_v2(Bucket=BUCKET, Prefix="killed/objects")
            if found["KeyCount"] >= n_files:
                started.kill()
                break
            time.sleep(0.005)
        assert started.wait().status == -9, "it ended before it was killed"
    last = Project(tmp_path / "last", in_bucket(two_shots, "killed"))
    last.surgeon("run", "--quiet", **variables(server)).ok()
    assert digests(last) == digests(undisturbed)
    assert json.loads(last.surgeon("verify", "--json", **variables(server)).ok().stdout)["damaged"] == []
    # A process killed between its commit and the end of its lease leaves a file that keeps nobody out.
    assert all(is_stale(json.loads(content)["holder"]) for content in files(server, "killed/locks").values())


@pytest.mark.slow
def test_a_flipped_byte_is_found_and_computed_again(
    two_shots: dict[str, Any], undisturbed: Project, server: str, tmp_path: Path
) -> None:
    params = in_bucket(two_shots, "flipped")
    Project(tmp_path / "first", params).surgeon("run", "--quiet", **variables(server)).ok()
    manifest = json.loads((tmp_path / "first" / "data" / "manifest.json").read_text())
    key = manifest["shot-02/block-01/update"]["key"]
    name = next(name for name in files(server, f"flipped/objects/{key[:2]}/{key}") if "/c/" in name)
    content = bytearray(files(server, name)[name])
    content[len(content) // 2] ^= 1
    client(server).put_object(Bucket=BUCKET, Key=name, Body=bytes(content))
    second = Project(tmp_path / "second", params)
    done = second.surgeon("run", **variables(server)).ok()
    said = " ".join((done.stdout + done.stderr).split())
    assert f"key {key}" in said
    assert f"It was moved to s3://{BUCKET}/flipped/corrupt/{key}-" in said
    assert second.executed()["prune"] >= {"update"}
    assert digests(second) == digests(undisturbed)
    third = Project(tmp_path / "third", params)
    third.surgeon("run", "--quiet", **variables(server)).ok()
    assert "prune" not in third.executed()


def test_bad_input(params: dict[str, Any], server: str, tmp_path: Path) -> None:
    project = Project(tmp_path / "project", params)
    there = variables(server)
    cases = {
        "s3://nowhere/x": (there, "NoSuchBucket"),
        f"s3://{BUCKET}/a b": (there, "whose prefix has the part 'a b'"),
        "gs://results/x": (there, "a store is a directory or s3://bucket/prefix"),
        f"s3://{BUCKET}/x": (
            there | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"},
            "AWS_ENDPOINT_URL is http://127.0.0.1:9",
        ),
        f"s3://{BUCKET}/y": (there | {"AWS_SECRET_ACCESS_KEY": ""}, "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    }
    for store, (more, problem) in cases.items():
        done = project.surgeon("run", "-S", f"run.store={store}", **more)
        said = " ".join(done.stderr.split())
        assert done.status == 2, done
        assert "run.store: " in said
        assert problem in said
        assert "Traceback" not in said
    done = project.surgeon("run", "-S", "run.cache=elsewhere")
    assert done.status == 2
    assert "run.cache: has no effect, because the store is the directory data/store" in done.stderr


@pytest.mark.slow
def test_workers_on_another_machine(
    small: dict[str, Any], server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers of a cluster, with a cache of their own, and the run itself share the bucket and nothing else."""
    from distributed import LocalCluster

    for name, value in variables(server).items():
        monkeypatch.setenv(name, value)
    sections = {**small, "prune": {"structure": "rows-and-columns", "shots": 2}}
    options = {**small["run"], "blocks_per_group": 1, "batch_size": 1, "keep": "last", "threads": 1, "shards": 3}

    def run(name: str, **more: Any) -> str:
        params = Params.model_validate({**sections, "run": {**options, **more}})
        with open_session(tmp_path / name, params, quiet=True) as session:
            session.check()
            return prune(session)[-1].state.digest

    monkeypatch.setenv("SURGEON_CACHE", str(tmp_path / "workers"))
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, memory_limit=0) as cluster:
        monkeypatch.delenv("SURGEON_CACHE")
        store = f"s3://{BUCKET}/cluster"
        far = run("far", runner="dask", workers=2, cluster=cluster.scheduler_address, store=store)
    assert far == run("near")
    theirs = set(Store(tmp_path / "workers").all_keys())
    assert len(theirs) > 5, "the workers computed nothing"
    here = StorePlace(tmp_path / "far" / "data" / "store", store).open()
    assert theirs <= set(here.all_keys())
    assert not list((tmp_path / "workers" / "tmp").iterdir())
    assert files(server, "cluster/locks") == {}

"""`dvc push` to a directory and to S3, and what a new clone can do after `dvc pull`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zarr

import surgeon
from surgeon.store import Store
from tests.flows.repository import Repository, bytes_once
from tests.surgeon.store.buckets import s3_server

TWO_SHOTS = {"structure": "rows-and-columns", "sparsity": 0.2, "shots": 2}
KEYS = {"AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "very-secret", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def pushed(params: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """Run, committed and pushed to a directory. Factors of the first shot were dropped."""
    folder = tmp_path_factory.mktemp("remotes")
    run = params["run"] | {"keep": "last"}
    repository = Repository(folder / "repository", params | {"prune": TWO_SHOTS, "run": run})
    repository.run()
    repository.command("dvc", "remote", "add", "--default", "directory", str(folder / "remote"))
    repository.commit()
    repository.command("dvc", "push")
    return repository


@pytest.fixture(scope="module")
def clone(pushed: Repository, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A new clone after `dvc pull`."""
    clone = pushed.clone(tmp_path_factory.mktemp("clone") / "clone")
    clone.command("dvc", "pull")
    return clone


def executed(repository: Repository) -> int:
    return int(repository.results()["tasks"]["executed"])


def test_a_new_clone_needs_no_work(pushed: Repository, clone: Repository) -> None:
    assert clone.repro() == set()
    assert clone.status() == set()
    assert not (clone.data / "store").exists()
    assert clone.results() == pushed.results()
    surgeon.load(clone.data / "export")
    group = zarr.open_group(clone.data / "run.zarr", mode="r")
    assert group["shot-02/block-00/costs"].attrs["reference"]["kind"] == "costs"  # type: ignore[index]
    once = bytes_once(clone.data, clone.root / ".dvc" / "cache")
    assert once < 1.05 * bytes_once(clone.root / ".dvc" / "cache")


def test_the_store_of_a_clone_fills_itself(pushed: Repository, clone: Repository) -> None:
    before = bytes_once(clone.data, clone.root / ".dvc" / "cache")
    rows = {row["name"]: row for row in json.loads(clone.surgeon("inspect", "--objects", "--json").ok().stdout)}
    assert {name: row["digest"] for name, row in rows.items()} == {
        name: reference["digest"] for name, reference in pushed.read("manifest.json").items()
    }
    dropped = {name for name, row in rows.items() if not row["payload"]}
    assert dropped == {f"shot-01/block-0{b}/{kind}" for b in range(3) for kind in ("input-factors", "output-factors")}
    store = Store(clone.data / "store")
    for name, row in rows.items():
        if name not in dropped:
            store.verify(row["key"])
    # What is new on disk are records and the samples, and no array.
    assert bytes_once(clone.data, clone.root / ".dvc" / "cache") - before < 700 * len(rows)
    assert {line["would_run"] for line in json.loads(clone.surgeon("status", "--json").ok().stdout)} == {""}
    manifest = (clone.data / "manifest.json").read_bytes()
    clone.surgeon("run", "--quiet").ok()
    assert executed(clone) == 0
    assert (clone.data / "manifest.json").read_bytes() == manifest
    assert clone.results()["weights_digest"] == pushed.results()["weights_digest"]
    # Another damping: no text is drawn again, nothing is measured of the dense model but the factors that were dropped.
    clone.surgeon("run", "--quiet", "-S", "prune.damping=0.05").ok()
    assert not {"calibrate", "evaluate"} & clone.executed().keys()
    # Costs, mask, updates and evaluation of both shots, the curvature of both, and spectra of the last.
    assert clone.read("timings/prune.json")["executed"] == 2 * 8 + 2 + 3


def test_restore_after_a_clean(pushed: Repository, tmp_path: Path) -> None:
    clone = pushed.clone(tmp_path / "clone")
    clone.command("dvc", "pull")
    refused = clone.surgeon("restore", "-C", str(tmp_path))
    assert refused.status == 2
    assert "manifest.json is missing, so there is nothing to restore from; get it with `dvc pull`" in refused.stderr
    first = json.loads(clone.surgeon("restore", "--json").ok().stdout)
    # 35 of the manifest, of which 6 were dropped, and two samples.
    n_manifest = len(clone.read("manifest.json"))
    assert first == {"taken": n_manifest - 6 + 2, "references": 6, "there": 0, "damaged": []}
    keys = {name: reference["key"] for name, reference in clone.read("manifest.json").items()}
    store = Store(clone.data / "store")
    store.delete(keys["shot-01/block-00/costs"])
    store.delete(keys["shot-02/block-01/update"])
    chunk = next((clone.data / "run.zarr" / "shot-02/block-01/update").rglob("c/*"))
    content = bytearray(chunk.read_bytes())
    chunk.unlink()
    content[-9] ^= 1
    chunk.write_bytes(content)
    done = clone.surgeon("restore")
    assert done.status == 2
    assert f"1 results taken in, 0 as references only, {n_manifest - 2} there" in done.stdout
    assert "refused: shot-02/block-01/update: The array" in done.stdout
    assert "1 results of the view are damaged and were not taken in" in done.stderr
    assert keys["shot-01/block-00/costs"] in clone.labels()
    assert keys["shot-02/block-01/update"] not in clone.labels()
    # DVC has the file as it was.
    clone.command("dvc", "checkout", "--force")
    again = json.loads(clone.surgeon("restore", "--json").ok().stdout)
    assert (again["taken"], again["damaged"]) == (1, [])
    clone.surgeon("run", "--quiet").ok()
    assert executed(clone) == 0


@pytest.mark.slow
def test_an_old_version_comes_back(pushed: Repository, tmp_path: Path) -> None:
    clone = pushed.clone(tmp_path / "clone")
    clone.command("dvc", "pull")
    clone.command("git", "tag", "old")
    before = clone.results()
    clone.change("report", "prompt", "Good day")
    assert clone.repro() == {"report"}
    clone.commit()
    kept = json.loads(clone.surgeon("clean", "--older-than", "0", "--yes", "--json").ok().stdout)
    assert kept["going"]["n"] == 0
    assert kept["staying_by_reason"][f"old of {clone.root}"]["n"] == 2  # samples
    clone.command("git", "checkout", "--quiet", "old")
    clone.command("dvc", "checkout")
    assert clone.results() == before
    assert clone.repro() == set()


@pytest.mark.slow
def test_clean_refuses_while_versions_are_unknown(pushed: Repository, tmp_path: Path) -> None:
    clone = pushed.clone(tmp_path / "clone")
    clone.command("dvc", "pull")
    clone.command("git", "tag", "old")
    clone.change("report", "prompt", "Good day")
    assert clone.repro() == {"report"}
    clone.commit()
    clone.command("dvc", "gc", "--workspace", "--force")
    table = clone.surgeon("clean", "--older-than", "0").ok().stdout
    line = f"not known what it needs: old of {clone.root}: data/stages/report.json"
    assert line in table
    refused = clone.surgeon("clean", "--older-than", "0", "--yes")
    assert refused.status == 2
    assert "Nothing was removed: what 1 versions need is not known" in refused.stderr
    assert "dvc fetch --all-branches --all-tags" in refused.stderr
    n_before = len(clone.labels())
    done = json.loads(clone.surgeon("clean", "--older-than", "0", "--yes", "--ignore-unknown", "--json").ok().stdout)
    assert {kind: count["n"] for kind, count in done["going_by_kind"].items()} == {"sample": 2}
    assert len(clone.labels()) == n_before - 2
    clone.command("dvc", "fetch", "--all-tags")
    assert json.loads(clone.surgeon("clean", "--json").ok().stdout)["unknown"] == []


@pytest.fixture
def s3(tmp_path: Path) -> Iterator[str]:
    """Address of an S3 server on loopback with an empty bucket "results"."""
    with s3_server(tmp_path) as address:
        yield address


@pytest.mark.slow
def test_s3(pushed: Repository, s3: str, tmp_path: Path) -> None:
    source = pushed.clone(tmp_path / "source")
    source.command("dvc", "pull")
    source.command("dvc", "remote", "add", "--default", "bucket", "s3://results/surgeon")
    source.command("dvc", "remote", "modify", "bucket", "endpointurl", s3)
    for name, variable in (("access_key_id", "AWS_ACCESS_KEY_ID"), ("secret_access_key", "AWS_SECRET_ACCESS_KEY")):
        source.command("dvc", "remote", "modify", "--local", "bucket", name, KEYS[variable])
    source.commit()
    assert "very-secret" in (source.root / ".dvc" / "config.local").read_text()
    assert "very-secret" not in source.command("git", "grep", "--cached", "-e", "bucket", "--", ".dvc")
    assert ".dvc/config.local" not in source.command("git", "ls-files").split()
    source.command("dvc", "push")
    clone = source.clone(tmp_path / "clone")
    clone.command("dvc", "pull", **KEYS)
    assert clone.repro() == set()
    clone.surgeon("run", "--quiet").ok()
    assert executed(clone) == 0
    assert clone.results()["weights_digest"] == pushed.results()["weights_digest"]

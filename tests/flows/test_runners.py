"""Shards and workers: the same bits whoever computes, also when a worker is killed; unfit workers are refused."""

import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.dask_pool import DaskPool
from flows.engine import Job
from flows.opening import open_session
from flows.params import Params
from flows.prune import prune
from flows.ray_pool import RayPool
from flows.states import pruned_state
from surgeon.errors import ClusterError, WorkerLostError
from tasks.remote import fingerprint, require_fit
from tasks.stage import Outcome, begin
from tests.flows.dying import (
    curvature_that_dies,
    curvature_that_dies_once,
    marker_of,
    reduction_that_finds_damage_once,
)
from tests.flows.project import Project

pytestmark = pytest.mark.usefixtures("in_process")
SHARDS = 3
SHARED_OUT = {"threads": 1, "shards": SHARDS}


class Runs:
    """Runs of two shots of one model, each in a store of its own."""

    def __init__(self, params: dict[str, Any], root: Path) -> None:
        self.params, self.root = params, root

    def session(self, name: str, **run: Any) -> Any:
        sections = {
            **self.params,
            "prune": {"structure": "rows-and-columns", "shots": 2},
            "run": {**self.params["run"], "blocks_per_group": 1, "batch_size": 1, "keep": "last", **run},
        }
        return open_session(self.root / name, Params.model_validate(sections), quiet=True)

    def digest(self, name: str, **run: Any) -> str:
        """Digest of the weights in the end."""
        with self.session(name, **run) as session:
            session.check()
            return prune(session)[-1].state.digest


@pytest.fixture(scope="module")
def runs(small: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(small, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def expected(runs: Runs) -> str:
    """With shards, but one task after the other in one process."""
    return runs.digest("alone", **SHARED_OUT)


RUNNERS = [("threads", 2), ("processes", 4), ("dask", 2), ("ray", 2)]


@pytest.mark.parametrize(("runner", "workers"), RUNNERS)
def test_the_same_bits_whoever_computes(runs: Runs, expected: str, runner: str, workers: int) -> None:
    assert runs.digest(f"{runner}-{workers}", **SHARED_OUT, runner=runner, workers=workers) == expected


def test_under_prefect(runs: Runs, expected: str) -> None:
    """Its task runs wait in threads of the run for what the workers compute."""
    run = {**SHARED_OUT, "runner": "processes", "workers": 2, "engine": "prefect"}
    sections = {
        "prune": {"structure": "rows-and-columns", "shots": 2},
        "run": {**runs.params["run"], "blocks_per_group": 1, "batch_size": 1, "keep": "last", **run},
    }
    project = Project(runs.root / "prefect", runs.params | sections)
    project.surgeon("prune", "--quiet").ok()
    with runs.session("prefect", **SHARED_OUT) as session:
        assert pruned_state(session).digest == expected


@pytest.mark.parametrize("runner", ["processes", "dask", "ray"])
def test_a_worker_is_killed_during_a_shard(
    runs: Runs, expected: str, runner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.statistics.curvature_task", curvature_that_dies_once)
    with runs.session(f"killed-{runner}", **SHARED_OUT, runner=runner, workers=2) as session:
        assert prune(session)[-1].state.digest == expected
        assert marker_of(session.context).exists()
        assert not list((session.workspace.store.root / "tmp").iterdir()) or session.store.clear_stale_tmp()


def test_workers_that_die_again_and_again(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.statistics.curvature_task", curvature_that_dies)
    monkeypatch.setattr("flows.pool.ATTEMPTS", 2)
    with (
        runs.session("lost", **SHARED_OUT, runner="processes", workers=2) as session,
        pytest.raises(
            WorkerLostError, match=r"workers died 2 times while they computed a part of shot-01.*run\.workers"
        ),
    ):
        prune(session)


def test_damage_that_a_worker_finds_is_mended(runs: Runs, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error comes back with the key of what is damaged, which is then computed again."""
    monkeypatch.setattr("flows.statistics.reduction_task", reduction_that_finds_damage_once)
    with runs.session("damaged", **SHARED_OUT, runner="processes", workers=2) as session:
        session.check()
        warned: list[str] = []
        session.warn = warned.append
        assert session.healed(lambda: prune(session))[-1].state.digest == expected
        assert any("computed again" in line for line in warned)


def test_other_threads_are_another_result(runs: Runs) -> None:
    """Libraries round in another way with another number of threads, so nothing is shared between numbers."""
    with runs.session("threads-a", threads=1) as one, runs.session("threads-b", threads=2) as two:
        keys = [{session.context.arithmetic, session.calibration().key} for session in (one, two)]
    assert keys[0].isdisjoint(keys[1])


def test_workers_share_the_threads_of_the_machine(runs: Runs) -> None:
    with runs.session("share", runner="processes", workers=2) as session:
        assert session.context.threads == max(1, (os.cpu_count() or 1) // 2)
        assert session.engine.pool.threads == session.context.threads


def test_a_worker_with_other_versions_is_refused(runs: Runs) -> None:
    mine = fingerprint()
    other = replace(mine, libraries=(("torch", "1.0"), *mine.libraries[1:]), code="f" * 64)
    with (
        runs.session("unfit") as session,
        pytest.raises(ClusterError, match=r"torch 2\S+ instead of 1\.0, other sources of Surgeon"),
    ):
        require_fit(other, session.context)


def test_a_worker_without_the_device_is_refused(runs: Runs) -> None:
    with runs.session("no-gpu") as session, pytest.raises(ClusterError, match=r"run\.device: .*sees no GPU"):
        require_fit(fingerprint(), replace(session.context, device="cuda"))


def test_a_worker_that_does_not_see_the_model_is_refused(runs: Runs, tmp_path: Path) -> None:
    with runs.session("no-model") as session:
        model = session.context.model
        elsewhere = replace(model, checkpoint=replace(model.checkpoint, path=tmp_path / "nowhere"))
        with pytest.raises(ClusterError, match=r"model\.source: the worker on .* does not see .*nowhere"):
            require_fit(fingerprint(), replace(session.context, model=elsewhere))


@pytest.fixture
def closed_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        yield listener.getsockname()[1]


@pytest.mark.parametrize("pool", [DaskPool, RayPool], ids=["dask", "ray"])
def test_a_cluster_that_does_not_answer(pool: type[DaskPool] | type[RayPool], closed_port: int) -> None:
    with pytest.raises(ClusterError, match=rf"run\.cluster: nothing answers at 127\.0\.0\.1:{closed_port}"):
        pool(2, 1, f"127.0.0.1:{closed_port}")
    with pytest.raises(ClusterError, match="give host:port"):
        pool(2, 1, "nonsense")


def test_a_running_dask_cluster(runs: Runs, expected: str) -> None:
    from distributed import LocalCluster

    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None, memory_limit=0) as cluster:
        run = {**SHARED_OUT, "runner": "dask", "workers": 2, "cluster": cluster.scheduler_address}
        assert runs.digest("running", **run) == expected
        assert len(cluster.scheduler_info["workers"]) == 1, "the run left the cluster as it was"


def test_processes_end_with_the_run(runs: Runs) -> None:
    """However that ends: nothing else would end them after a kill."""
    sections = {"prune": {"structure": "rows-and-columns"}, "run": {**runs.params["run"], **SHARED_OUT}}
    project = Project(runs.root / "killed-run", runs.params | sections)
    started = project.start("prune", "--quiet", "-S", "run.runner=processes", "-S", "run.workers=2")
    workers: list[psutil.Process] = []

    def has_workers() -> bool:
        assert started.process.is_alive(), started.wait()
        workers[:] = psutil.Process(started.process.pid).children(recursive=True)
        return len(workers) >= 3  # the server of forks, and two workers

    wait_until(has_workers)
    started.kill()
    started.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive


def test_jobs_come_back_in_order(runs: Runs) -> None:
    with runs.session("order", **SHARED_OUT, workers=4) as session:
        values = session.engine.tasks([Job(_echo, (number,), f"echo-{number}") for number in range(20)])
    assert values == list(range(20))


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.1)


def _echo(number: int) -> Any:
    begin()
    return Outcome(number, cached=False, seconds=0.0)

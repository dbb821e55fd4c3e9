"""A real Prefect server and a real worker on this machine, with what the project's `prefect.yaml` deploys."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import psutil

from tests.flows.project import ROOT, environment

PREFECT = Path(sys.executable).with_name("prefect")
UNFINISHED = ("SCHEDULED", "PENDING", "RUNNING")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_until(moment: Callable[[], Any], seconds: float = 180.0, every: float = 0.1) -> Any:
    """What `moment` gives once it is something; fails if it takes too long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := moment():
            return found
        time.sleep(every)
    raise AssertionError(f"not within {seconds} s")


class Server:
    """A Prefect server with a database of its own.

    Args:
        folder: home of Prefect; where the deployments are made from, too.
        more: environment of the server, of workers and of their runs.
    """

    def __init__(self, folder: Path, **more: str) -> None:
        self.folder = folder
        self.address = f"http://127.0.0.1:{free_port()}/api"
        self.environment = environment(
            PREFECT_HOME=str(folder / "home"),
            PREFECT_API_URL=self.address,
            PREFECT_WORKER_QUERY_SECONDS="1",
            DO_NOT_TRACK="1",
            PREFECT_SERVER_ANALYTICS_ENABLED="false",
            PWD=str(folder),
            PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            **more,
        )
        self._processes: list[subprocess.Popen[bytes]] = []
        self._workers = 0

    def start(self) -> None:
        port = self.address.split(":")[-1].removesuffix("/api")
        self._start("server", "server", "start", "--host", "127.0.0.1", "--port", port)
        wait_until(self._answers)

    def deploy(self) -> None:
        """As docs/workers.md has it, from a copy of prefect.yaml."""
        shutil.copy(ROOT / "prefect.yaml", self.folder)
        self.prefect("work-pool", "create", "surgeon", "--type", "process")
        self.prefect("--no-prompt", "deploy", "--all")

    def prefect(self, *arguments: str) -> str:
        done = subprocess.run(
            [PREFECT, *arguments], cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done
        return done.stdout

    def start_worker(self) -> psutil.Process:
        self._workers += 1
        return psutil.Process(self._start(f"worker-{self._workers}", "worker", "start", "--pool", "surgeon").pid)

    def call(self, path: str, content: Any = None) -> Any:
        """What the server answers, as JSON; with content, it is posted."""
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(f"{self.address}/{path}", data, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def refusal(self, path: str, content: Any) -> str:
        """What the server says when it refuses something."""
        try:
            return f"not refused: {self.call(path, content)}"
        except HTTPError as error:
            return str(json.load(error)["detail"])

    def deployment(self, name: str) -> Any:
        return self.call(f"deployments/name/{name}")

    def submit(self, name: str, parameters: dict[str, Any]) -> str:
        """Starts a run of a deployment; returns its id."""
        path = f"deployments/{self.deployment(name)['id']}/create_flow_run"
        return str(self.call(path, {"parameters": parameters, "state": {"type": "SCHEDULED"}})["id"])

    def run(self, identifier: str) -> Any:
        return self.call(f"flow_runs/{identifier}")

    def wait_for(self, identifier: str) -> Any:
        """The run once it has ended."""
        return wait_until(lambda: found if (found := self.run(identifier))["state_type"] not in UNFINISHED else None)

    def runs(self, name: str) -> list[Any]:
        """All runs of a flow, the first one first."""
        wanted = {"flows": {"name": {"any_": [name]}}, "sort": "START_TIME_ASC"}
        return list(self.call("flow_runs/filter", wanted))

    def tasks(self, **states: Any) -> list[Any]:
        return list(self.call("task_runs/filter", {"task_runs": {"state": states}, "limit": 200}))

    def artifacts(self, identifier: str) -> dict[str, Any]:
        """Artifacts of a run by key; those that were written twice are lists."""
        found = self.call("artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [identifier]}}})
        return {artifact["key"]: artifact for artifact in found}

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def stop(self) -> None:
        for process in reversed(self._processes):
            kill(psutil.Process(process.pid)) if process.poll() is None else None
            process.wait()

    def _start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        (self.folder / name).mkdir()  # a worker finds nothing where it is started
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [PREFECT, *arguments], cwd=self.folder / name, env=self.environment, stdout=log, stderr=log
            )
        self._processes.append(process)
        return process

    def _answers(self) -> bool:
        try:
            return bool(self.call("health"))
        except OSError:
            return False


def kill(process: psutil.Process) -> None:
    """Kills a process and all that it has started, at once."""
    family = [*process.children(recursive=True), process]
    for each in family:
        each.kill()
    wait_until(lambda: not any(map(_lives, family)), seconds=30)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def open_server(folder: Path, **more: str) -> Iterator[Server]:
    """A server with deployments, until the block ends."""
    server = Server(folder, **more)
    try:
        server.start()
        server.deploy()
        yield server
    finally:
        server.stop()

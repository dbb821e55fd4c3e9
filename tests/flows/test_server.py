"""A Prefect server that cannot be used is refused at once: what `PREFECT_API_URL` names is tried before any work."""

import json
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tests.flows.project import Project
from tests.flows.worker import free_port

WAY_OUT = (
    "; start it (`prefect server start`), unset PREFECT_API_URL for a server of the run's own, or use --engine inline\n"
)


@pytest.fixture
def project(params: dict[str, Any], tmp_path: Path) -> Project:
    settings = {name: value for name, value in params["run"].items() if name != "engine"}
    return Project(tmp_path / "project", params | {"run": settings})


@contextmanager
def answering(answer: Any) -> Iterator[str]:
    """Address of a web server that gives the same answer to everything; None is "not found"."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404 if answer is None else 200)
            self.send_header("content-type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/api"
    finally:
        server.shutdown()
        server.server_close()


def refused(project: Project, address: str) -> str:
    """What `surgeon run` says; nothing else has happened."""
    finished = project.surgeon("run", PREFECT_API_URL=address)
    assert finished.status == 2, finished
    assert finished.stdout == ""
    assert not project.data.exists()
    return finished.stderr


def test_nobody_listens(project: Project) -> None:
    address = f"http://127.0.0.1:{free_port()}/api"
    expected = f"surgeon: PREFECT_API_URL={address}: there is no Prefect server at this address "
    assert refused(project, address) == f"{expected}([Errno 111] Connection refused){WAY_OUT}"


def test_something_that_does_not_answer(project: Project) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        said = refused(project, f"http://127.0.0.1:{listener.getsockname()[1]}/api")
    assert re.search(r"there is no Prefect server at this address \(timed out\); start it", said)


def test_another_program(project: Project) -> None:
    with answering(None) as address:
        said = refused(project, address.replace("//", "//me:secret@"))
    assert said.startswith(
        f"surgeon: PREFECT_API_URL={address}: there is no Prefect server at this address (Client error"
    )
    assert "404 Not Found" in said
    assert "secret" not in said
    with answering({"hello": "world"}) as address:
        assert re.search(r"there is no Prefect server at this address \(.+\); start it", refused(project, address))


def test_another_version(project: Project) -> None:
    with answering("9.1.2") as address:
        said = refused(project, address)
    assert re.search(
        r"the Prefect server there is of another version \(Found incompatible versions: client: \S+, server: 9\.1\.2",
        said,
    )


@pytest.mark.parametrize("address", ["127.0.0.1:4200", "htp:/somewhere/api"])
def test_no_address(project: Project, address: str) -> None:
    said = refused(project, address)
    assert re.search(rf"PREFECT_API_URL={address}: there is no Prefect server at this address \(.*protocol.*\)", said)


def test_inline_needs_none(project: Project) -> None:
    finished = project.surgeon("model", "--quiet", "--engine", "inline", PREFECT_API_URL="http://127.0.0.1:1/api")
    assert finished.ok().stderr == ""

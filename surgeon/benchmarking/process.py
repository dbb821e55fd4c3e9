"""A worker process as its parent sees it."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import surgeon
from surgeon.errors import BenchmarkError

MODULE = "surgeon.benchmarking.worker"
_LAST_LINES = 3


class WorkerError(BenchmarkError):
    """A worker could not do what it was asked for.

    Attributes:
        out_of_memory: whether it says so, or was killed, for which lack of memory is the usual reason.
    """

    def __init__(self, message: str, *, out_of_memory: bool) -> None:
        super().__init__(message)
        self.out_of_memory = out_of_memory


class WorkerProcess:
    """A process that holds one model, started without a shell and ended with the block it is used in."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (closed in stop)
        library = Path(surgeon.__file__).parents[1]
        paths = [str(library), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"},
        )

    def __enter__(self) -> "WorkerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                stream and stream.close()
        self._process.wait()
        self._errors.close()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Sends a request and waits for the answer."""
        self.send(request)
        return self.receive()

    def send(self, request: dict[str, Any]) -> None:
        """Sends a request without waiting."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # `receive` says why
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """Waits for the answer to the last request.

        Raises:
            WorkerError: it failed, or the process has died.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._death()
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(
                f"the process of the {self.name} model failed: {reply['error']}", out_of_memory=reply["out_of_memory"]
            )
        answer: dict[str, Any] = reply["answer"]
        return answer

    def _death(self) -> WorkerError:
        status = self._process.wait()
        self._errors.seek(0)
        said = [line.strip() for line in self._errors.read().splitlines() if line.strip()][-_LAST_LINES:]
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        message = f"the process of the {self.name} model {how}{': ' + ' | '.join(said) if said else ''}"
        return WorkerError(message, out_of_memory=status == -signal.SIGKILL)

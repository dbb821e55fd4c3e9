"""Workers of a Ray cluster: one that is running (`run.cluster`), or one on this machine for the time of the run."""

import logging
import os
from collections.abc import Callable
from typing import Any

from flows.pool import ATTEMPTS, Pool, lost, require_answer
from surgeon.errors import ClusterError
from tasks.remote import run_call
from tasks.stage import Outcome

_OBJECTS_BYTES = 100 << 20
"""Room for what tasks take and return: references, no tensors."""


class RayPool(Pool):
    """Tasks run on workers of Ray, which runs those of a worker that died on another.

    Args:
        workers: tasks at a time.
        threads: of torch in each worker on a CPU.
        address: of a cluster, such as "10.0.0.5:6379" or "ray://10.0.0.5:10001"; None starts one here when it is first
            needed.

    Raises:
        ClusterError: Ray is not installed, or the cluster does not answer.
    """

    def __init__(self, workers: int, threads: int, address: str | None = None) -> None:
        super().__init__(workers, threads)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            import ray
        except ImportError as error:
            raise ClusterError(
                "run.runner: ray needs the package ray; install the extra: pip install 'surgeon[ray]'"
            ) from error
        self._ray = ray
        self.address = address
        self._run: Any = None
        if address is not None:
            self._open()

    def start(self) -> None:
        """Starts the cluster. Its processes end with the thread that started them, so it must be the flow's."""
        self._open()

    def run(self, body: Callable[..., Outcome[Any]], args: tuple[Any, ...]) -> Outcome[Any]:
        """Runs a task on one of the workers."""
        run = self._open()
        gpus = 1 if args[0].device == "cuda" else 0
        exceptions = self._ray.exceptions
        try:
            outcome: Outcome[Any] = self._ray.get(run.options(num_gpus=gpus).remote(self._call(body, args)))
        except (exceptions.WorkerCrashedError, exceptions.NodeDiedError, exceptions.OutOfMemoryError) as error:
            raise lost(args, ATTEMPTS) from error
        except exceptions.RayTaskError as error:
            raise error.cause from error
        return outcome

    def close(self) -> None:
        """Leaves the cluster, and ends it if it was started here."""
        with self._lock:
            if self._run is not None:
                self._ray.shutdown()
                self._run = None

    def _open(self) -> Any:
        with self._lock:
            if self._run is None:
                options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
                if self.address is None:
                    options |= {
                        "num_cpus": self.workers,
                        "include_dashboard": False,
                        "object_store_memory": _OBJECTS_BYTES,
                    }
                elif self.address != "auto":
                    require_answer(self.address, "ray start --head")
                try:
                    self._ray.init(address=self.address or "local", **options)
                except (ConnectionError, OSError, RuntimeError, ValueError) as error:
                    place = self.address or "this machine"
                    raise ClusterError(f"run.cluster: Ray does not start at {place}: {error}") from error
                self._run = self._ray.remote(num_cpus=1, max_retries=ATTEMPTS - 1)(run_call)
            return self._run

"""Workers of a Dask cluster: one that is running (`run.cluster`), or one on this machine for the time of the run."""

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from flows.pool import Pool, lost, require_answer
from surgeon.errors import ClusterError
from tasks.remote import run_call
from tasks.stage import Outcome

_PATIENCE_S = 10.0
"""How long a scheduler may take to answer, and a worker to appear."""


class DaskPool(Pool):
    """Tasks run on workers of Dask, which runs those of a worker that died on another.

    Args:
        workers: tasks at a time.
        threads: of torch in each worker on a CPU.
        address: of a scheduler, such as "tcp://10.0.0.5:8786"; None starts a cluster here when it is first needed.

    Raises:
        ClusterError: Dask is not installed, or the scheduler does not answer or has no workers.
    """

    def __init__(self, workers: int, threads: int, address: str | None = None) -> None:
        super().__init__(workers, threads)
        self.address = address
        self._client: Any = None
        self._cluster: Any = None
        try:
            import distributed
        except ImportError as error:
            raise ClusterError(
                "run.runner: dask needs the package distributed; install the extra: pip install 'surgeon[dask]'"
            ) from error
        self._distributed = distributed
        if address is not None:
            self._client = self._connect(address)

    def run(self, body: Callable[..., Outcome[Any]], args: tuple[Any, ...]) -> Outcome[Any]:
        """Runs a task on one of the workers."""
        future = self._open().submit(run_call, self._call(body, args), pure=False)
        try:
            outcome: Outcome[Any] = future.result()
        except self._distributed.KilledWorker as error:
            raise lost(args, error.allowed_failures) from error
        return outcome

    def close(self) -> None:
        """Leaves the cluster, and ends it if it was started here."""
        with self._lock:
            for opened in (self._client, self._cluster):
                if opened is not None:
                    with suppress(TimeoutError, OSError):
                        opened.close(timeout=_PATIENCE_S)
            self._client = self._cluster = None

    def _open(self) -> Any:
        with self._lock:
            if self._client is None:
                if self.address is not None:
                    self._client = self._connect(self.address)
                else:
                    self._cluster = self._distributed.LocalCluster(
                        n_workers=self.workers,
                        threads_per_worker=1,
                        processes=True,
                        memory_limit=0,  # none is killed for taking more than a share: the plan has counted
                        dashboard_address=None,
                        silence_logs=logging.CRITICAL,
                        env={"OMP_NUM_THREADS": str(self.threads)},
                    )
                    self._client = self._distributed.Client(self._cluster)
            return self._client

    def _connect(self, address: str) -> Any:
        require_answer(address, "dask scheduler")
        try:
            client = self._distributed.Client(address, timeout=_PATIENCE_S)
        except (OSError, TimeoutError, ValueError) as error:
            raise ClusterError(
                f"run.cluster: what answers at {address} is no Dask scheduler of these versions: {error}"
            ) from error
        try:
            client.wait_for_workers(1, timeout=_PATIENCE_S)
        except TimeoutError as error:
            client.close()
            raise ClusterError(
                f"run.cluster: the Dask scheduler at {address} has no workers. Start some: dask worker {address}"
            ) from error
        return client

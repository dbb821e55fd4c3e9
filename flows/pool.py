"""Workers for tasks that do not depend on each other: threads, processes, a Dask cluster or a Ray cluster.

A pool only says where a task is computed. Prefect's records are written by the process that runs the flow, so workers
need no way to its server: they need the store, the model and the same versions (`tasks/remote.py`).
"""

import os
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from enum import StrEnum
from multiprocessing import get_context
from typing import Any

import psutil

from surgeon.errors import ClusterError, WorkerLostError
from tasks.remote import Call, fingerprint, run_call
from tasks.stage import Outcome

_PRELOADED = ["tasks.measuring", "tasks.reducing", "tasks.costs", "tasks.update", "transformers.models.llama"]
ATTEMPTS = 4
"""How often a task is begun before those that compute it are given up."""
_WATCH_EVERY_S = 1.0
_PATIENCE_S = 5.0
"""How long a cluster may take to accept a connection."""


class Runner(StrEnum):
    """Who computes tasks that can run side by side."""

    THREADS = "threads"
    PROCESSES = "processes"
    DASK = "dask"
    RAY = "ray"


class Pool(ABC):
    """Runs tasks elsewhere; any number of threads may ask for one at a time.

    Args:
        workers: tasks at a time.
        threads: of torch in each worker on a CPU.
    """

    def __init__(self, workers: int, threads: int) -> None:
        self.workers = workers
        self.threads = threads
        self._lock = threading.Lock()

    def start(self) -> None:  # noqa: B027 - most need nothing
        """Starts workers that are needed now. Called by the thread that runs the flow, which outlives them."""

    @abstractmethod
    def run(self, body: Callable[..., Outcome[Any]], args: tuple[Any, ...]) -> Outcome[Any]:
        """Runs a task and waits for it; a task whose worker dies is run again.

        Raises:
            ClusterError: the workers are not fit for it.
            WorkerLostError: workers died again and again.
        """

    @abstractmethod
    def close(self) -> None:
        """Ends the workers that this pool has started."""

    def _call(self, body: Callable[..., Outcome[Any]], args: tuple[Any, ...]) -> Call:
        return Call(body, args, fingerprint(), self.threads)


class ThreadPool(Pool):
    """Tasks run in threads of this process: they share its memory and its libraries, and end with it."""

    def run(self, body: Callable[..., Outcome[Any]], args: tuple[Any, ...]) -> Outcome[Any]:
        """Runs a task in the calling thread."""
        return body(*args)

    def close(self) -> None:
        """Does nothing: no worker was started."""


class ProcessPool(Pool):
    """Tasks run in processes on this machine, which are started when the first is asked for."""

    def __init__(self, workers: int, threads: int) -> None:
        super().__init__(workers, threads)
        self._processes: ProcessPoolExecutor | None = None

    def run(self, body: Callable[..., Outcome[Any]], args: tuple[Any, ...]) -> Outcome[Any]:
        """Runs a task in one of the processes."""
        for _ in range(ATTEMPTS):
            processes = self._open()
            try:
                return processes.submit(run_call, self._call(body, args)).result()
            except BrokenProcessPool:
                self._replace(processes)
        raise lost(args, ATTEMPTS)

    def close(self) -> None:
        """Ends the processes."""
        with self._lock:
            if self._processes is not None:
                self._processes.shutdown(wait=True, cancel_futures=True)
                self._processes = None

    def _open(self) -> ProcessPoolExecutor:
        with self._lock:
            if self._processes is None:
                # Forked from one process that has imported everything, so they start at once and share those pages.
                context = get_context("forkserver")
                context.set_forkserver_preload(_PRELOADED)
                self._processes = ProcessPoolExecutor(
                    self.workers, context, initializer=end_with, initargs=(os.getpid(),)
                )
            return self._processes

    def _replace(self, broken: ProcessPoolExecutor) -> None:
        """Forgets processes one of which has died; all others of them end with it."""
        with self._lock:
            if self._processes is broken:
                self._processes = None
        broken.shutdown(wait=False, cancel_futures=True)


def require_answer(address: str, start: str) -> None:
    """Refuses an address of a cluster at which nothing listens: libraries would try again for minutes.

    Args:
        address: "host:port", with or without a scheme in front.
        start: how to start what should be there, for the message.

    Raises:
        ClusterError: the address has no port, or nothing answers within seconds.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE_S):
            return
    except ValueError as error:
        raise ClusterError(f"run.cluster: {address} is no address; give host:port") from error
    except OSError as error:
        raise ClusterError(
            f"run.cluster: nothing answers at {address} ({error}). Start it ({start}), correct the address, or leave "
            "run.cluster out for a cluster on this machine."
        ) from error


def end_with(number: int) -> None:
    """Makes this process end when another does, however that ends.

    (Their common server of forks lives as long as any of its children, so the parent says nothing.)

    Args:
        number: of the process of the run.
    """
    run = psutil.Process(number)

    def watch() -> None:
        with suppress(psutil.NoSuchProcess):
            while run.is_running() and run.status() != psutil.STATUS_ZOMBIE:
                time.sleep(_WATCH_EVERY_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def lost(args: tuple[Any, ...], attempts: int) -> WorkerLostError:
    """The error of a task whose workers died."""
    work = next((label for arg in args if (label := getattr(arg, "label", None))), "a task")
    return WorkerLostError(
        f"run.runner: workers died {attempts} times while they computed a part of {work}; mostly that is for want of "
        "memory. Lower run.workers, run.batch_size or run.blocks_per_group, or give workers more memory. What was "
        "finished is in the store."
    )

"""What Prefect adds to a shot: the prune stage of one shot with a server running, beside the same with calls alone.

Usage: python -m benchmarks.orchestration PROJECT [--pairs 3] [--found-pairs 5] [--workers 1]

The built-in model with the default parameters. PROJECT is a directory for this benchmark alone. A Prefect server is
started once, before anything is measured. Pairs alternate which engine comes first:

1. *found*: every task of the shot is asked for and finds its result in the store (the record of the shot, which would
   stand for all of them, is removed first). What takes longer under Prefect is orchestration alone.
2. *executed*: all results of the shot are removed first.

The server works on the same cores. Prints medians, and the smallest and largest in brackets.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flows.opening import open_session
from flows.params import Params, load_params
from flows.prefect_engine import configure
from flows.stages import run_stage
from surgeon.store import Store

ENGINES = ("inline", "prefect")
_SERVER_WITHIN_S = 180


@contextmanager
def running_server(project: Path) -> Iterator[None]:
    """A Prefect server, which `PREFECT_API_URL` names."""
    configure(project)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    command = [str(Path(sys.executable).with_name("prefect")), "server", "start", "--host", "127.0.0.1", "--port", port]
    with (project / "server.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
    try:
        for _ in range(_SERVER_WITHIN_S):
            time.sleep(1)
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=5).close()
                break
            except OSError:
                continue
        yield
    finally:
        server.terminate()
        server.wait()


def remove(project: Path, *, all_of_shot: bool) -> None:
    """Removes the record of the shot, or all of its results."""
    store = Store(project / "data" / "store")
    for reference in list(store.entries()):
        if reference.kind == "shot" or (all_of_shot and reference.label.startswith("shot-01/")):
            store.delete(reference.key)


def prune(project: Path, params: Params) -> tuple[float, int, int]:
    """Runs the prune stage; seconds, tasks executed, tasks found."""
    with open_session(project, params, quiet=True) as session:
        session.check()
        begun = time.perf_counter()
        run_stage(session, "prune")
        seconds = time.perf_counter() - begun
        tally = session.engine.tallies["prune"]
    return seconds, tally.executed, tally.cached


def measure(project: Path, pairs: int, workers: int, *, all_of_shot: bool) -> None:
    """Prints a line of the table."""
    seconds: dict[str, list[float]] = {name: [] for name in ENGINES}
    counts = (0, 0)
    for number in range(pairs):
        for engine in ENGINES if number % 2 else ENGINES[::-1]:
            remove(project, all_of_shot=all_of_shot)
            params = load_params(None, [f"run.engine={engine}", f"run.workers={workers}", "prune.shots=1"])
            took, *counted = prune(project, params)
            seconds[engine].append(took)
            counts = (counted[0], counted[1])
    more = [prefect - inline for inline, prefect in zip(seconds["inline"], seconds["prefect"], strict=True)]
    n_tasks = sum(counts)
    cells = [
        "executed" if all_of_shot else "found",
        f"{counts[0]} executed, {counts[1]} found",
        *(spread(seconds[name], ".2f") for name in ENGINES),
        spread([1000 * each / n_tasks for each in more], ".0f"),
        spread([100 * each / inline for each, inline in zip(more, seconds["inline"], strict=True)], ".1f"),
    ]
    print(f"| {' | '.join(cells)} |", flush=True)


def spread(values: list[float], form: str) -> str:
    """Median, smallest and largest."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", type=Path)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--found-pairs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    project = given.project.resolve()
    project.mkdir(parents=True, exist_ok=True)
    with running_server(project):
        print(f"load of the machine at the start: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
        for engine in ENGINES:  # not counted: texts, first imports
            prune(project, load_params(None, [f"run.engine={engine}", "prune.shots=1"]))
        print("| shot | tasks | inline, s | Prefect, s | more, ms per task | more, % of the shot inline |")
        print("|---|---|---|---|---|---|")
        measure(project, given.found_pairs, given.workers, all_of_shot=False)
        measure(project, given.pairs, given.workers, all_of_shot=True)


if __name__ == "__main__":
    main()

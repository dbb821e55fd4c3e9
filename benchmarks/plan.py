"""What `surgeon plan` expects against what runs then take: SmolLM2-135M and a random Llama, cold and resumed.

Usage: python -m benchmarks.plan [--directory DIR] [--models smollm2 llama] [--structures units rows-and-columns]

For each model and structure: plans and runs one shot from nothing (`cold`), then two shots, of which the first is found
(`resumed`). Each run is a process of its own, timed from start to end, its memory from `run.json`, the disk sampled
while it runs. Prints a row after each run; the last line says how far the worst of each is off. On a machine that does
nothing else, about eight minutes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.memory import make_model

_BLOCKS, _WIDTH = 8, 768
_COMMON = ("run.engine=inline", "benchmark.rounds=1", "benchmark.batch_sizes=[1, 8]")
_TARGETS = {"units": 0.1, "rows-and-columns": 0.1, "weights": 0.3}
_POLL_S = 0.5
_BLOCK_BYTES = 512
_GIB = 2**30


@dataclass(frozen=True)
class Compared:
    """A figure as expected and as it was."""

    expected: float
    found: float

    @property
    def ratio(self) -> float:
        """Expected over found."""
        return self.expected / self.found


@dataclass(frozen=True)
class Result:
    """One run beside its plan."""

    name: str
    tasks: Compared
    seconds: Compared
    memory_gib: Compared
    disk_gib: Compared

    def row(self) -> str:
        """As a row of the table."""
        cells = [self.name, f"{self.tasks.expected:.0f} / {self.tasks.found:.0f}"]
        for pair, form in ((self.seconds, ".0f"), (self.memory_gib, ".2f"), (self.disk_gib, ".2f")):
            cells.append(f"{pair.expected:{form}} / {pair.found:{form}} ({pair.ratio:.2f})")
        return f"| {' | '.join(cells)} |"


def surgeon(command: str, project: Path, overrides: list[str]) -> Any:
    """The JSON that a command prints."""
    options = [part for override in overrides for part in ("-S", override)]
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", command, "-C", str(project), "--json", *options],
        stdout=subprocess.PIPE,
        text=True,
    )
    output, _ = process.communicate()
    if process.returncode:
        sys.exit(f"surgeon {command} ended with status {process.returncode}")
    return json.loads(output)


def taken_bytes(project: Path) -> int:
    """What store and export take on the disk; hard links of the view add nothing."""
    total = 0
    # A new export lies beside the old one until it is complete.
    for part in (project / "data" / "store", *(project / "data").glob("*export*")):
        for folder, _, names in os.walk(part):  # which passes over what goes while it looks
            for path in (Path(folder), *(Path(folder, name) for name in names)):
                with suppress(FileNotFoundError):
                    total += path.lstat().st_blocks * _BLOCK_BYTES
    return total


def run(project: Path, overrides: list[str], log: Path) -> tuple[dict[str, Any], float, float]:
    """Runs; returns the results, seconds, and the most GiB taken beyond those before."""
    options = [part for override in overrides for part in ("-S", override)]
    before = most = taken_bytes(project)
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.cli", "run", "-C", str(project), "--quiet", *options], stderr=errors
        )
        while process.poll() is None:
            most = max(most, taken_bytes(project))
            time.sleep(_POLL_S)
    seconds = time.perf_counter() - start
    if process.returncode:
        sys.exit(f"surgeon run ended with status {process.returncode}: {log.read_text(encoding='utf-8')}")
    results = json.loads((project / "data" / "metrics" / "run.json").read_text(encoding="utf-8"))
    return results, seconds, (max(most, taken_bytes(project)) - before) / _GIB


def compare(name: str, project: Path, overrides: list[str]) -> Result:
    """Plans, runs and compares."""
    planned = surgeon("plan", project, overrides)
    results, seconds, disk = run(project, overrides, project / "run.log")
    return Result(
        name,
        Compared(planned["tasks"]["to_run"], results["tasks"]["executed"]),
        Compared(planned["seconds"], seconds),
        Compared(planned["memory_gib"]["own"], results["peak_memory_gib"]),
        Compared(sum(planned["disk_gib"].values()), disk),
    )


def results_of(directory: Path, models: list[str], structures: list[str]) -> Iterator[Result]:
    """All runs, one after the other; those of a model share what was measured of the machine."""
    machine: dict[str, bytes] = {}
    for model in models:
        source = "smollm2-135m" if model == "smollm2" else str(make_model(directory / "llama", _BLOCKS, _WIDTH))
        for structure in structures:
            project = directory / f"{model}-{structure}"
            kept = project / "data" / "machine.json"
            kept.parent.mkdir(parents=True, exist_ok=True)
            if model in machine:
                kept.write_bytes(machine[model])
            for shots, state in ((1, "cold"), (2, "resumed")):
                target = shots * _TARGETS[structure]
                given = [f"model.source={source}", f"prune.structure={structure}", *_COMMON]
                given += [f"prune.sparsity={target:g}", f"prune.shots={shots}"]
                yield compare(f"{model}, {structure}, {state}", project, given)
            machine[model] = kept.read_bytes()


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=None, help="where models and results go; default: temporary")
    parser.add_argument("--models", nargs="+", choices=("smollm2", "llama"), default=["smollm2", "llama"])
    parser.add_argument("--structures", nargs="+", choices=tuple(_TARGETS), default=["units", "rows-and-columns"])
    arguments = parser.parse_args()
    print("| run | tasks | seconds | memory, GiB | disk, GiB |\n|---|---|---|---|---|", flush=True)
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        for result in results_of(arguments.directory or Path(temporary), arguments.models, arguments.structures):
            print(result.row(), flush=True)
            found.append(result)
    worst = {
        name: max((getattr(each, name).ratio for each in found), key=lambda ratio: abs(ratio - 1.0))
        for name in ("tasks", "seconds", "memory_gib", "disk_gib")
    }
    print("\nExpected / found; farthest from 1: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in worst.items()))


if __name__ == "__main__":
    main()

"""Pruning models too large to be held: random checkpoints of real widths with a few blocks, one block at a time.

Usage: python -m benchmarks.big_models [SHAPE:BLOCKS ...] [--directory DIR] [--dtype bfloat16] [--keep]

For each shape and number of blocks (such as `opt-1.3b:4`): plans, prunes one shot by the default recipe on 4 x 128
tokens, exports. Peak memory is that of each process as the system sees it (sampled), and of each task from its record;
time is that of each kind of task, for one block, beside its floor: its operations at the rates measured just before.
Between two numbers of blocks of one shape the peak should not differ.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.random_checkpoints import SHAPES, make_checkpoint

_POLL_S = 0.1
_GIB = 2**30
_KINDS = {
    "passes": ("boundary", "gradient", "input-factors", "output-factors"),
    "costs": ("costs",),
    "update": ("update",),
}
_ROWS = {"passes": "prune: curvature", "costs": "prune: costs", "update": "prune: update", "export": "export"}
_ARITHMETIC = ("forward", "backward", "head", "head-backward", "gram", "products", "solves", "eigen")


@dataclass
class Watched:
    """A finished command.

    Attributes:
        seconds: from start to end.
        own_gib: peak resident memory of its process.
        children_gib: of processes it started, together.
        output: what it printed.
    """

    seconds: float
    own_gib: float
    children_gib: float
    output: str


@dataclass
class Measured:
    """One run.

    Attributes:
        blocks: of the model.
        plan: what `surgeon plan --json` said.
        rates: operations a second, as measured by it.
        commands: by name.
        seconds: of tasks by kind.
        peaks: largest of a task by kind, GiB.
    """

    blocks: int
    plan: dict[str, Any]
    rates: dict[str, float]
    commands: dict[str, Watched] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)

    @property
    def peak_gib(self) -> float:
        """Of the process that prunes."""
        return max(self.commands["prune"].own_gib, *self.peaks.values())

    @property
    def planned_gib(self) -> float:
        """The same as planned."""
        return max(stage["memory_gib"] for stage in self.plan["stages"] if stage["stage"] in _PRUNING)

    def floor(self, kind: str) -> float:
        """Seconds of a kind's operations at the measured rates."""
        work = next((stage["work"] for stage in self.plan["stages"] if stage["stage"] == _ROWS[kind]), {})
        return sum(amount / self.rates[name] for name, amount in work.items() if name in _ARITHMETIC)

    def planned(self, kind: str) -> float:
        """Seconds that were planned for a kind."""
        return sum(stage["seconds"] for stage in self.plan["stages"] if stage["stage"] == _ROWS[kind])


_PRUNING = ("prune: curvature", "prune: costs", "prune: update", "prune: evaluation", "prune: mask", "evaluate")


def overrides(model: Path, dtype: str) -> list[str]:
    """Parameters of a run."""
    return [
        *(f"model.source={model}", f"model.dtype={dtype}", "run.engine=inline", "run.blocks_per_group=1"),
        *("prune.shots=1", "prune.sparsity=0.2", "calibrate.sequences=4", "calibrate.length=128"),
        *("evaluate.windows=4", "evaluate.length=128", "run.batch_size=4", "benchmark.rounds=0", "run.keep=none"),
    ]


def watched(arguments: list[str], log: Path) -> Watched:
    """Runs `surgeon` with some arguments and watches what its processes hold."""
    start, own, children = time.perf_counter(), 0.0, 0.0
    with log.open("w", encoding="utf-8") as errors, tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        process = subprocess.Popen([sys.executable, "-m", "flows.cli", *arguments], stdout=output, stderr=errors)
        seen = psutil.Process(process.pid)
        while process.poll() is None:
            with suppress(psutil.Error, OSError):
                own = max(own, _high_water(process.pid))
                started = seen.children(recursive=True)
                children = max(children, sum(child.memory_info().rss for child in started) / _GIB)
            time.sleep(_POLL_S)
        output.seek(0)
        text = output.read()
    if process.returncode:
        sys.exit(f"surgeon {arguments[0]} ended with status {process.returncode}: {log.read_text(encoding='utf-8')}")
    return Watched(time.perf_counter() - start, own, children, text)


def _high_water(pid: int) -> float:
    """Peak since the process last reset it, which it does at every task."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith("VmHWM:")), 0.0)


def run(shape: str, blocks: int, directory: Path, dtype: str) -> Measured:
    """Plans, prunes and exports one model."""
    model = make_checkpoint(SHAPES[shape], directory / f"{shape}-{blocks}", blocks)
    project = directory / f"run-{shape}-{blocks}-{dtype}"
    project.mkdir(parents=True, exist_ok=True)
    options = [part for value in overrides(model, dtype) for part in ("-S", value)]
    plan = watched(["plan", "-C", str(project), "--json", *options], project / "plan.log")
    rates = json.loads((project / "data" / "machine.json").read_text(encoding="utf-8"))
    measured = Measured(blocks, json.loads(plan.output), _rates_of(rates), {"plan": plan})
    for command in ("model", "calibrate", "evaluate", "prune", "export"):
        measured.commands[command] = watched([command, "-C", str(project), *options], project / f"{command}.log")
    _read_records(project, measured)
    return measured


def _rates_of(machine: Any) -> dict[str, float]:
    """The rates in `data/machine.json`, wherever they lie in it."""
    if isinstance(machine, dict):
        if "forward" in machine and "solves" in machine:
            return {name: float(rate) for name, rate in machine.items()}
        for value in machine.values():
            if found := _rates_of(value):
                return found
    return {}


def _read_records(project: Path, measured: Measured) -> None:
    """Seconds and peaks of all tasks, by kind."""
    seconds, peaks = defaultdict(float), defaultdict(float)
    for path in (project / "data" / "store" / "objects").rglob("record.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        kind = record["label"].rpartition("/")[2]
        seconds[kind] += record.get("seconds") or 0.0
        peaks[kind] = max(peaks[kind], record.get("peak_memory_gib") or 0.0)
    for name, kinds in _KINDS.items():
        measured.seconds[name] = sum(seconds[kind] for kind in kinds)
    measured.seconds["export"] = measured.commands["export"].seconds
    measured.peaks.update({kind: peak for kind, peak in peaks.items() if peak})


def report(shape: str, measured: Measured) -> None:
    """Prints the rows of one run."""
    export = measured.commands["export"]
    planned = measured.planned_gib
    print(
        f"| {shape} | {measured.blocks} | {planned:.2f} | {measured.peak_gib:.2f} | {planned / measured.peak_gib:.2f} "
        f"| {export.own_gib:.2f} | {export.children_gib:.2f} | {measured.commands['prune'].seconds:.0f} "
        f"| {export.seconds:.0f} |"
    )
    for kind, seconds in measured.seconds.items():
        each, floor = seconds / measured.blocks, measured.floor(kind) / measured.blocks
        planned_s = measured.planned(kind) / measured.blocks
        ratio = f"{each / floor:.2f}" if floor else "-"
        print(f"  {kind}: {each:.1f} s a block, floor {floor:.1f} s ({ratio}), planned {planned_s:.1f} s")
    peaks = ", ".join(f"{kind} {peak:.2f}" for kind, peak in sorted(measured.peaks.items(), key=lambda p: -p[1])[:6])
    print(f"  peaks, GiB: {peaks}", flush=True)


def main() -> None:
    """Runs all that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", default=["opt-1.3b:4", "opt-1.3b:8", "llama-2-7b:4", "llama-3-8b:4"])
    parser.add_argument("--directory", type=Path, default=None, help="where models and results go; default: temporary")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--keep", action="store_true", help="keep models and results")
    arguments = parser.parse_args()
    print(
        "| widths of | blocks | planned, GiB | peak, GiB | ratio | export, GiB | its check, GiB | prune, s "
        "| export, s |"
        "\n|---|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    peaks: dict[str, dict[int, float]] = defaultdict(dict)
    with tempfile.TemporaryDirectory() as temporary:
        directory = arguments.directory or Path(temporary)
        for asked in arguments.runs:
            shape, _, blocks = asked.partition(":")
            measured = run(shape, int(blocks), directory, arguments.dtype)
            peaks[shape][measured.blocks] = measured.peak_gib
            report(shape, measured)
            if not arguments.keep:
                for folder in directory.glob(f"*{shape}-{blocks}*"):
                    shutil.rmtree(folder)
    for shape, found in peaks.items():
        if len(found) > 1:
            few, many = min(found), max(found)
            print(f"{shape}: peak of {many} blocks / {few} blocks: {found[many] / found[few]:.3f}")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()

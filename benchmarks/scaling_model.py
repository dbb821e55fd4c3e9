"""A run of a model that need not exist: what `surgeon plan` says of it, from its configuration alone."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.random_checkpoints import Shape, save_description
from flows.dry_run import Step
from flows.engine import InlineEngine
from flows.live import LiveShare
from flows.needs import MemoryNeeds, disk_needs, memory_needs
from flows.params import load_params
from flows.planning import dry_run
from flows.session import Session
from flows.work import WorkModel
from flows.workspace import Workspace
from surgeon.models import Checkpoint
from surgeon.planning import NOTHING, Operation, Rates, Work
from surgeon.planning.parallel import Workers, parallel_terms
from surgeon.store import digest_text
from tasks.spectra import SPECTRA

MACHINES = Path(__file__).with_name("machines.yaml")
SHOTS, SPARSITY = 40, 0.3
SEQUENCES, LENGTH, WINDOWS = 128, 2048, 140
_GIB = 2**30
_PASSES, _GRAMS, _PRODUCTS, _SOLVES = 0.4, 0.5, 0.6, 0.5
"""Parts of a peak that are reached in passes and sums of outer products (measured on an H100), and that are assumed to
be reached in products of large matrices and in factorisations."""
_TERMS = {
    "passes": ("forward", "backward", "head", "head-backward", "products"),
    "factors": ("gram",),
    "solves": ("solves", "copies", "eigen"),
    "store, written": ("writes", "arrays"),
    "store, read": ("reads", "opened"),
    "weights": ("loads", "openings", "files"),
}
REST = "rest"
TERMS = (*_TERMS, REST)


@dataclass(frozen=True)
class Machine:
    """A machine of `machines.yaml`.

    Attributes:
        key: its name there.
        name: for people.
        source: where the rates come from.
        device_gib: memory where passes and solves run.
        host_gib: memory of the host.
        workers: devices.
        store_bytes_s: of the store, for all of them together.
        rates: of one device.
    """

    key: str
    name: str
    source: str
    device_gib: float
    host_gib: float
    workers: int
    store_bytes_s: float
    rates: Rates


@dataclass(frozen=True)
class Cost:
    """What a run takes on a machine.

    Attributes:
        terms: seconds by term, of all shots.
        first: the same of the first shot alone.
        by_kind: seconds by kind of task, of all shots.
        device_gib: peak on the device (on a processor: of the process).
        host_gib: peak of the host; the same number on a processor.
        disk_gib: most that the store takes.
        moved_gib: bytes read and written, store and weights, of all shots.
        blocks_per_group: that were held at once.
    """

    terms: Mapping[str, float]
    first: Mapping[str, float]
    by_kind: Mapping[str, float]
    device_gib: float
    host_gib: float
    disk_gib: float
    moved_gib: float
    blocks_per_group: int

    @property
    def seconds(self) -> float:
        """Of all shots."""
        return sum(self.terms.values())

    @property
    def dominant(self) -> str:
        """The term that takes longest."""
        return max(self.terms, key=lambda term: self.terms[term])


def read_machines(path: Path = MACHINES) -> dict[str, Machine]:
    """All machines, by key: rates that were measured, and for the others what the peaks of a data sheet come to."""
    rows: dict[str, dict[str, Any]] = yaml.safe_load(path.read_text(encoding="utf-8"))
    machines = {}
    for key, row in rows.items():
        given = {name: row[name] for name in ("name", "source", "device_gib", "host_gib", "workers", "store_bytes_s")}
        measured = row.get("rates", {})
        computed = computed_rates(row["peak"]).to_json() if "peak" in row else {}
        rates = Rates.from_json({**computed, **measured})
        if rates is None:
            raise ValueError(f"{path}: the rates of {key} are not those that are counted: {sorted(row['rates'])}")
        machines[key] = Machine(key=key, rates=rates, **given)
    return machines


def computed_rates(peak: Mapping[str, float]) -> Rates:
    """Rates from the peaks of a data sheet: operations a second in half, single and double precision, bytes a second.

    What runs on the host (spectra, texts, arrays, processes) is what a server with a fast disk does, roughly.
    """
    half, single, double = (peak[name] / 2 for name in ("half", "single", "double"))  # multiply-adds
    device = {
        Operation.FORWARD: _PASSES * half,
        Operation.BACKWARD: _PASSES * half,
        Operation.HEAD: _PASSES * half,
        Operation.HEAD_BACKWARD: _PASSES * half,
        Operation.STEP_TOKENS: _PASSES * half,
        Operation.STEP: _PRODUCTS * peak["memory"],
        Operation.GRAM: _GRAMS * half,  # of 16-bit numbers
        Operation.PRODUCTS: _PRODUCTS * single,
        Operation.SOLVES: _SOLVES * double,
        Operation.COPIES: _SOLVES * peak["memory"],
    }
    host = {
        Operation.EIGEN: 5e9,
        Operation.READS: 1.2e9,
        Operation.WRITES: 0.8e9,
        Operation.OPENED: 2000.0,
        Operation.ARRAYS: 300.0,
        Operation.FILES: 0.8e9,
        Operation.LOADS: 2.5e9,
        Operation.OPENINGS: 3.0,
        Operation.PROCESSES: 0.3,
    }
    return Rates(device | host)


@dataclass(frozen=True)
class Outline:
    """What pruning does: shot 1, and shot 2 in the state of one in the middle of the run, for all that follow.

    Attributes:
        session: with all shots.
        steps: tasks of two shots with the work of each.
        memory: what they hold.
        disk_bytes: most that the store takes, all shots.
    """

    session: Session
    steps: tuple[tuple[Step, Work], ...]
    memory: MemoryNeeds
    disk_bytes: int


class ScalingModel:
    """A hypothetical model with a structure that is pruned, on hypothetical machines.

    Args:
        shape: of the model.
        structure: "units" or "rows-and-columns".
        directory: for its configuration; nothing else is written.
        shots: steps in which the target is reached.
    """

    def __init__(self, shape: Shape, structure: str, directory: Path, shots: int = SHOTS) -> None:
        self.shape = shape
        self.structure = structure
        self.shots = shots
        self._directory = directory
        save_description(shape, directory / "model")
        self._known: dict[tuple[int, int], Outline] = {}

    def session(self, blocks_per_group: int, shards: int, shots: int) -> Session:
        """A session whose checkpoint has a configuration and no weights."""
        params = load_params(
            None,
            [
                *(f"model.source={self._directory / 'model'}", "model.dtype=bfloat16", "run.engine=inline"),
                *(f"prune.structure={self.structure}", f"prune.shots={shots}", f"prune.sparsity={SPARSITY}"),
                *(f"calibrate.sequences={SEQUENCES}", f"calibrate.length={LENGTH}"),
                *(f"evaluate.windows={WINDOWS}", f"evaluate.length={LENGTH}", "run.batch_size=1"),
                *(f"run.blocks_per_group={blocks_per_group}", f"run.shards={shards}"),
            ],
        )
        session = Session(params, Workspace(self._directory / "project"), InlineEngine())
        digest = digest_text(f"{self.shape}")
        session.__dict__["checkpoint"] = Checkpoint(self._directory / "model", "hypothetical", "local", digest)
        return session

    def outline(self, blocks_per_group: int, shards: int) -> Outline:
        """What `surgeon plan` finds out, as far as pruning goes.

        The flows go through two shots; their work is counted as that of the first and of the middle one of the run, as
        a plan of all shots would, which takes minutes for 80 blocks.
        """
        key = (blocks_per_group, shards)
        if key not in self._known:
            whole = self.session(blocks_per_group, shards, self.shots)
            two = self.session(blocks_per_group, shards, 2)
            dry, planned = dry_run(two, whole=False)
            live = {"shot-01": LiveShare(whole, 1), "shot-02": LiveShare(whole, max(2, self.shots // 2))}
            model = WorkModel(whole, live)
            later = sum(model.object_bytes("update", block) for block in range(whole.model.n_blocks))
            disk = disk_needs(model, dry)[0].n_bytes + (self.shots - 2) * later
            steps = tuple((step, model.of(step)) for step in dry.steps)
            self._known[key] = Outline(whole, steps, memory_needs(planned, dry.steps), disk)
            two.close()
            whole.close()
        return self._known[key]

    def cost(self, machine: Machine) -> Cost | None:
        """What the run takes on a machine; None where one block at a time does not fit."""
        shards = machine.workers
        blocks_per_group = self._fitting(machine, shards)
        if not blocks_per_group:
            return None
        outline = self.outline(blocks_per_group, shards)
        session = outline.session
        workers = Workers(machine.workers, shards, session.model.n_blocks, blocks_per_group, machine.store_bytes_s)
        first, later = (_works(outline, label) for label in ("shot-01/", "shot-02/"))
        total = {
            kind: first.get(kind, NOTHING) + (1 if kind == SPECTRA.kind else self.shots - 1) * work
            for kind, work in later.items()
        }
        by_kind = parallel_terms(total, machine.rates, workers)
        device, host = self._memory(session, outline, machine, blocks_per_group)
        if device > machine.device_gib or host > machine.host_gib:  # costs and updates may take more than the passes
            return None
        return Cost(
            terms=_terms(by_kind),
            first=_terms(parallel_terms(first, machine.rates, workers)),
            by_kind={kind: sum(terms.values()) for kind, terms in by_kind.items()},
            device_gib=device,
            host_gib=host,
            disk_gib=outline.disk_bytes / _GIB,
            moved_gib=_moved(total) / _GIB,
            blocks_per_group=blocks_per_group,
        )

    def _fitting(self, machine: Machine, shards: int) -> int:
        """The most blocks at a time whose passes fit, as a power of two or all; 0 where not one does."""
        session = self.session(1, shards, 2)
        n_blocks = session.model.n_blocks
        tried = sorted({n_blocks, *(2**k for k in range(8) if 2**k < n_blocks)}, reverse=True)
        for blocks in tried:
            estimate = session.memory_estimate(blocks)
            on_host = estimate.boundaries * machine.workers
            on_device = estimate.total_gib - estimate.boundaries / _GIB
            if machine.key.startswith("cpu"):
                on_device += estimate.boundaries / _GIB
            if on_device <= machine.device_gib and on_host / _GIB <= machine.host_gib:
                return blocks
        return 0

    @staticmethod
    def _memory(session: Session, outline: Outline, machine: Machine, blocks_per_group: int) -> tuple[float, float]:
        memory = outline.memory
        estimate = session.memory_estimate(blocks_per_group)
        if machine.key.startswith("cpu"):
            return memory.own, memory.own
        boundaries = estimate.boundaries / _GIB
        device = max(
            memory.by_stage.get(row, 0.0) - memory.idle - (boundaries if row == "prune: curvature" else 0.0)
            for row in ("prune: curvature", "prune: costs", "prune: update")
        )
        host = machine.workers * (memory.idle + boundaries + 2 * estimate.factors / _GIB)
        return device, host


def _works(outline: Outline, label: str) -> dict[str, Work]:
    """Work of pruning by kind of task, of those whose names begin with a label."""
    works: dict[str, Work] = defaultdict(lambda: NOTHING)
    for step, work in outline.steps:
        if step.stage == "prune" and step.name.startswith(label):
            kind = step.name.rpartition("/")[2]
            works[kind] += work
    return dict(works)


def _terms(by_kind: Mapping[str, Mapping[Operation, float]]) -> dict[str, float]:
    names = {operation: term for term, operations in _TERMS.items() for operation in operations}
    terms = dict.fromkeys(TERMS, 0.0)
    for operations in by_kind.values():
        for operation, seconds in operations.items():
            terms[names.get(operation.value, REST)] += seconds
    return terms


def _moved(works: Mapping[str, Work]) -> float:
    moved = (Operation.READS, Operation.WRITES, Operation.LOADS)
    return sum(work.amounts.get(operation, 0.0) for work in works.values() for operation in moved)

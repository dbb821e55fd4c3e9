"""What a run will do, before it does anything: tasks, work, seconds, memory and disk, by stage."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from flows.benchmark import known_figures
from flows.dry_run import DryEngine, DryRun, Step, row_of
from flows.goal import BATCH, LENGTH, Goal, require_goal
from flows.needs import Needs, disk_needs, memory_needs, require_disk, require_memory
from flows.params import EngineName
from flows.prune import prune
from flows.recovery import Recovered, recover
from flows.session import Session
from flows.shot import Shot
from flows.spectra import make_spectra
from flows.stage_facts import has_export
from flows.work import WorkModel
from surgeon.planning import NOTHING, Rates, Work
from surgeon.planning.parallel import Workers, parallel_seconds
from surgeon.store import PlannedStore, Reference, is_promised
from tasks.benchmark import benchmark_task
from tasks.block_times import block_times_task
from tasks.evaluation import evaluation_task, sample_task
from tasks.export import export_task
from tasks.rule import WEIGHTS

START = "start"
_TASK_S = {EngineName.PREFECT: 0.04, EngineName.INLINE: 0.005}
"""What an engine and looking results up take for each task."""
_SERVER_S = 8.0
"""Starting Prefect's server."""
_START_PROCESSES = 1.5
"""Importing everything a run needs, over what a process with torch and transformers alone takes."""


@dataclass(frozen=True)
class StagePlan:
    """What will happen in a stage; those of `prune` by kind of task.

    Attributes:
        name: of the stage, for example "export" or "prune: costs".
        to_run: tasks that will be executed.
        found: tasks whose results are there.
        work: of those to run.
        seconds: expected.
        memory_gib: expected peak resident memory of the process; 0 where nothing runs.
    """

    name: str
    to_run: int
    found: int
    work: Work
    seconds: float
    memory_gib: float


@dataclass(frozen=True)
class Plan:
    """A run, as far as it can be known before.

    Attributes:
        stages: in order.
        task_seconds: expected seconds of each task that will be executed, by name.
        needs: memory and disk.
    """

    stages: tuple[StagePlan, ...]
    task_seconds: dict[str, float]
    needs: Needs

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def to_run(self) -> int:
        """Tasks that will be executed."""
        return sum(stage.to_run for stage in self.stages)

    @property
    def found(self) -> int:
        """Tasks whose results are there."""
        return sum(stage.found for stage in self.stages)

    @property
    def flops(self) -> float:
        """Floating-point operations of the whole run."""
        return sum(stage.work.flops for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        """For scripts (docs/planning.md)."""
        return {
            "stages": [
                {
                    "stage": stage.name,
                    "tasks": {"to_run": stage.to_run, "found": stage.found},
                    "flops": stage.work.flops,
                    "seconds": stage.seconds,
                    "memory_gib": stage.memory_gib,
                    "work": {name.value: amount for name, amount in stage.work.amounts.items()},
                }
                for stage in self.stages
            ],
            "tasks": {"to_run": self.to_run, "found": self.found, "total": self.to_run + self.found},
            "flops": self.flops,
            "seconds": self.seconds,
            **self.needs.to_json(),
        }


def dry_run(session: Session, *, whole: bool) -> tuple[DryRun, Session]:
    """Goes through a run without executing or writing anything.

    Args:
        session: of the run; it is left as it is.
        whole: whether to the end, or only what pruning takes.

    Returns:
        What the run will do, and the session with the goal that was assumed if that is to be measured.
    """
    dry = DryRun(PlannedStore(session.context.store.open()))
    engine = DryEngine(dry)
    other = session.rehearsal(engine, dry.store)
    engine.stage("calibrate", lambda: other.windows)
    dense = engine.stage("evaluate", partial(_evaluated, other))
    shots: list[Shot] = engine.stage("prune", lambda: _shots(other))
    if whole:
        recovered = engine.stage("recovery", lambda: recover(other, shots[-1].state))
        _after_pruning(engine, other, dense, shots, recovered)
    return dry, other


def _after_pruning(
    engine: DryEngine, session: Session, dense: Reference, shots: list[Shot], recovered: Recovered
) -> None:
    dry, state, settings = engine.dry, recovered.state, session.params.report
    made = (dense.digest, shots[-1].evaluation.digest, *(part.digest for part in state.stored))
    is_known = bool(recovered.facts) and not any(map(is_promised, made))
    exported = is_known and has_export(session, dense, shots, recovered)
    dry.add("export", "export", export_task, (state,), missing=not exported)
    measured = exported and known_figures(session) is not None
    dry.add("benchmark", "benchmark", benchmark_task, (state,), missing=not measured)

    def report() -> None:
        for name, of in (("dense", session.dense), ("pruned", state)):
            arguments = (session.context, of, settings.prompt, settings.new_tokens, name)
            engine.task(sample_task, *arguments, name=f"{name}/sample")

    engine.stage("report", report)


def _evaluated(session: Session) -> Reference:
    arguments = (session.context, session.dense, session.windows, "dense")
    dense: Reference = session.engine.task(evaluation_task, *arguments, name="dense/evaluation")
    return dense


def _shots(session: Session) -> list[Shot]:
    given = session.params.prune
    if given.speedup is not None:
        times = session.engine.task(block_times_task, session.context, BATCH, LENGTH, name="block-times")
        if is_promised(
            times.digest
        ):  # what a speed-up takes is measured by the run; until then, as if time went with weights
            session.__dict__["goal"] = Goal(1.0 - 1.0 / given.speedup, WEIGHTS, f"speedup: {given.speedup:g}")
    shots = prune(session)
    make_spectra(session, {name: ref for shot in shots for name, ref in shot.references.items()}, len(shots))
    return shots


@dataclass(frozen=True)
class Outline:
    """A run as far as it does not depend on the machine.

    Attributes:
        steps: tasks that will be executed, in order, with the work of each.
        found: tasks whose results are there, by row.
        start: work before the first task.
        needs: memory and disk.
        workers: that share tasks which can run side by side; None if there is one.
    """

    steps: tuple[tuple[Step, Work], ...]
    found: Mapping[str, int]
    start: Work
    needs: Needs
    workers: Workers | None = None

    def timed(self, rates: Rates) -> Plan:
        """The plan on a machine with these rates."""
        work: dict[str, Work] = {}
        seconds: dict[str, float] = {}
        task_seconds: dict[str, float] = {}
        counts = Counter(step.row for step, _ in self.steps)
        for step, each in self.steps:
            work[step.row] = work.get(step.row, NOTHING) + each
            task_seconds[step.name] = self._seconds(step, each, rates)
            seconds[step.row] = seconds.get(step.row, 0.0) + task_seconds[step.name]
        stages = [StagePlan(START, 0, 0, self.start, rates.seconds(self.start), 0.0)]
        for row in dict.fromkeys([*_ORDER, *work, *self.found]):
            n_found = self.found.get(row, 0)
            if counts[row] or n_found:
                mine, memory = work.get(row, NOTHING), self.needs.memory.by_stage.get(row, 0.0)
                stages.append(StagePlan(row, counts[row], n_found, mine, seconds.get(row, 0.0), memory))
        return Plan(tuple(stages), task_seconds, self.needs)

    def _seconds(self, step: Step, work: Work, rates: Rates) -> float:
        """What a task adds to the time of the run: with workers, its share of the time that several take together."""
        if self.workers is None:
            return rates.seconds(work)
        kind = step.name.rpartition("/")[2]
        return parallel_seconds({kind: work}, rates, self.workers)[kind]


def outline_run(session: Session, *, whole: bool = True) -> Outline:
    """Finds out what a run will do; nothing is executed.

    Args:
        session: of the run.
        whole: whether to the end, or only what pruning takes.
    """
    dry, planned = dry_run(session, whole=whole)
    model = WorkModel(planned)
    engine = session.params.run.engine
    each_task = Work.of(seconds=_TASK_S[engine])
    steps = tuple((step, model.of(step) + each_task) for step in dry.steps)
    found = Counter(row_of(stage, name) for stage, names in dry.found.items() for name in names)
    start = Work.of(processes=_START_PROCESSES, seconds=_SERVER_S if engine is EngineName.PREFECT else 0.0)
    memory = memory_needs(planned, dry.steps)
    return Outline(steps, found, start, Needs(memory, disk_needs(model, dry)), _workers(session))


def _workers(session: Session) -> Workers | None:
    """Who shares the work; the store is as fast for all together as it was measured for one."""
    run = session.params.run
    if run.workers == 1:
        return None
    context = session.context
    return Workers(run.workers, run.shards, context.model.n_blocks, context.blocks_per_group, store_bytes_s=0.0)


def require_possible(session: Session) -> None:
    """Refuses to start shots that cannot reach the target, or that memory or disk are too small for.

    Raises:
        ParameterError: no widths reach the target, or not enough memory.
        StoreError: not enough disk.
    """
    require_goal(session)
    require_fits(session, outline_run(session, whole=False).needs)


def require_fits(session: Session, needs: Needs) -> None:
    """Refuses a run that memory or disk are too small for.

    Raises:
        ParameterError: not enough memory.
        StoreError: not enough disk.
    """
    require_memory(session, needs.memory)
    require_disk(needs.disk)


_ORDER = (
    *("calibrate", "evaluate", "prune: block-times", "prune: curvature", "prune: costs", "prune: mask"),
    *("prune: similarity", "prune: sub-layer-similarity", "prune: removal-losses", "prune: block-cost"),
    *("prune: selection", "prune: dropped", "prune: update", "prune: correction", "prune: evaluation"),
    *("prune: spectra", "recovery", "export", "benchmark", "report"),
)

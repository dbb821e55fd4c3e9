"""The statistics of all blocks that a kind of curvature needs: found in the store, or computed.

Only what a missing statistic needs is computed: methods that share a statistic share its object, a backward pass runs
only where gradients are wanted, and statistics that were dropped are made again only for the blocks that are asked for.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from flows.engine import Job
from flows.session import Session
from surgeon.choices import Keep
from surgeon.curvature.spec import CurvatureSpec, Statistic
from surgeon.passes.targets import EMPIRICAL, TokenTargets
from surgeon.store import Reference
from tasks.context import Context, ModelState
from tasks.curvature import (
    FIRST_LEVEL,
    SECOND_LEVEL,
    STARTING_POINT,
    Measured,
    boundary_request,
    find_statistic,
    gradient_request,
    statistic_request,
)
from tasks.measuring import GroupWork, boundary_task, curvature_task
from tasks.reducing import reduction_task
from tasks.refining import kronecker_terms_task, moments_task
from tasks.stage import Outcome, Request, readable
from tasks.writing import writing_behind

_REDUCTION = "reduction"
_SECOND_LEVEL_TASKS = {Statistic.MOMENTS: moments_task, Statistic.KRONECKER_TERMS: kronecker_terms_task}


class BlockStatistics:
    """Statistics of the blocks of one model on one calibration set.

    Args:
        session: engine and context.
        state: the model.
        calibration: its sequences.
        label: of the shot, the first part of names: "shot-01".
        spec: the kind of curvature.
        loss_gradient: whether the gradient of the loss is wanted beside the curvature.
        linears: names of those that are measured in every block; None for all.
    """

    def __init__(
        self,
        session: Session,
        state: ModelState,
        calibration: Reference,
        label: str,
        spec: CurvatureSpec,
        loss_gradient: bool = False,
        linears: tuple[str, ...] | None = None,
    ) -> None:
        self.session = session
        self.context: Context = session.context
        self.store = session.store
        self.measured = Measured(state, calibration, spec, label, linears, session.params.run.shards)
        self.parts = self.measured.parts(session.params.calibrate.sequences)
        self.label = label
        self.wanted: tuple[Statistic, ...] = spec.statistics + ((Statistic.LOSS_GRADIENT,) if loss_gradient else ())
        """What consumers read."""
        self._second = tuple(s for s in self.wanted if s in SECOND_LEVEL)
        starting = STARTING_POINT if self._second else ()
        self._made = tuple(s for s in Statistic if s in {*self.wanted, *starting})

    def lookup(self, block: int) -> dict[Statistic, Reference] | None:
        """References of all wanted statistics of a block, dropped or not; None if one was never computed."""
        found = {s: find_statistic(self.context, self.measured, s, block, self.store) for s in self.wanted}
        references = {statistic: reference for statistic, reference in found.items() if reference is not None}
        return references if len(references) == len(found) else None

    def references(self, block: int) -> dict[str, Reference]:
        """References by readable name, with what the wanted statistics were computed from."""
        found = {s: find_statistic(self.context, self.measured, s, block, self.store) for s in self._made}
        return {f"{self.label}/block-{block:02d}/{s.value}": ref for s, ref in found.items() if ref is not None}

    def passed_on(self) -> list[Reference]:
        """Hidden states and gradients that groups have handed to each other."""
        starts = [group.start for group in self.context.groups[1:]]
        requests = []
        for measured in dict.fromkeys((self.measured, *self.parts)):
            requests += [boundary_request(self.context, measured, start) for start in starts]
            for targets in self._passes():
                requests += [gradient_request(self.context, measured, targets, start) for start in starts]
        if self._is_sharded:  # dropped when they have been added up, unless the run was killed just then
            requests += [request for b in self._blocks for request in self._partial(b, self._first_level)]
        found = [self.store.lookup(request.key(self.context)) for request in requests]
        return [reference for reference in found if reference is not None]

    def task_names(self) -> list[str]:
        """Names of all tasks, as far as they always run: those that hand boundaries on depend on what is there."""
        groups = [
            name
            for group in reversed(self.context.groups)
            for kind in self._kinds()
            for name in self._names(group, kind)
        ]
        return groups + [self._reduction(b) for b in self._blocks if self._is_sharded]

    def ensure(self, blocks: set[int], first: bool = False) -> None:
        """Makes sure that all wanted statistics of some blocks can be read.

        Args:
            blocks: whose.
            first: counts tasks that need not run as reused; for the first call of a shot.
        """
        # What is computed from statistics reads them at once; else the next pass need not wait until they are written.
        with writing_behind(self.context.device, wanted=not self._second and not self._is_sharded):
            for group in reversed(self.context.groups):
                ran = self._ensure_group(group, tuple(b for b in group if b in blocks))
                if first:
                    names = [name for kind in self._kinds() if kind not in ran for name in self._names(group, kind)]
                    if self._is_sharded and _REDUCTION not in ran:
                        names += [self._reduction(b) for b in group]
                    if names:
                        self.session.engine.reuse(names)

    def _ensure_group(self, group: range, blocks: tuple[int, ...]) -> set[str]:
        """Runs what is missing of one group, and returns the kinds of the tasks that ran."""
        ran = set()
        second = {s: mine for s in self._second if (mine := tuple(b for b in blocks if not self._has(s, b)))}
        starting = {block for mine in second.values() for block in mine}
        for targets, statistics in self._passes().items():
            mine = tuple(b for b in blocks if any(not self._has(s, b) for s in self._needed(statistics, b in starting)))
            if mine:
                needed = self._needed(statistics, starting=not starting.isdisjoint(mine))
                missing = tuple(s for s in needed if any(not self._has(s, b) for b in mine))
                self._pass(self.parts, group, mine, missing, targets)
                ran.add(self._pass_kind(targets))
                if self._is_sharded:
                    self._add_up(mine, missing)
                    ran.add(_REDUCTION)
        for statistic, mine in second.items():
            work = GroupWork(group, mine, (statistic,), self.measured.targets(statistic))
            whole = (self.measured,)
            self._prepare(whole, work)
            self._tasks(_SECOND_LEVEL_TASKS[statistic], whole, work, statistic.value)
            ran.add(statistic.value)
        return ran

    def _needed(self, statistics: tuple[Statistic, ...], starting: bool) -> tuple[Statistic, ...]:
        """Those of a pass that are wanted themselves, or from which something is to be computed."""
        return tuple(s for s in statistics if s in self.wanted or (starting and s in STARTING_POINT))

    def _passes(self) -> dict[TokenTargets, tuple[Statistic, ...]]:
        """Statistics of the first level by the next tokens of the pass that gives them; mostly it is one pass."""
        passes: dict[TokenTargets, tuple[Statistic, ...]] = {}
        for statistic in FIRST_LEVEL:
            if statistic in self._made and statistic is not Statistic.INPUT_FACTORS:
                targets = self.measured.targets(statistic)
                passes[targets] = (*passes.get(targets, ()), statistic)
        if Statistic.INPUT_FACTORS in self._made:
            # Inputs are the same whatever the targets, so the first pass sees them on its way.
            targets = next(iter(passes), EMPIRICAL)
            passes[targets] = (Statistic.INPUT_FACTORS, *passes.get(targets, ()))
        return passes

    def _pass_kind(self, targets: TokenTargets) -> str:
        """Last part of the name of a pass's tasks: a second pass is there for the gradient of the loss alone."""
        return "curvature" if targets == next(iter(self._passes())) else Statistic.LOSS_GRADIENT.value

    def _kinds(self) -> list[str]:
        """Kinds of the tasks of a group."""
        return [*(self._pass_kind(targets) for targets in self._passes()), *(s.value for s in self._second)]

    def _pass(
        self,
        parts: Sequence[Measured],
        group: range,
        blocks: tuple[int, ...],
        statistics: tuple[Statistic, ...],
        targets: TokenTargets,
    ) -> None:
        """Runs the pass of one group for every part of the sequences, after whatever leads there and is missing.

        A backward pass hands its gradient down, for the groups below are likely to need it next.
        """
        backward = any(s is not Statistic.INPUT_FACTORS for s in statistics) or not statistics
        work = GroupWork(group, blocks, statistics, targets, hand_down=backward and group.start > 0)
        self._prepare(parts, work)
        self._tasks(curvature_task, parts, work, self._pass_kind(targets))

    def _prepare(self, parts: Sequence[Measured], work: GroupWork) -> None:
        """Makes what enters a group from below and, for a backward pass, from above."""
        groups = self.context.groups
        here = groups.index(work.group)
        if here > 0:
            self._boundary(parts, groups[here - 1])
        if work.needs_gradient and here + 1 < len(groups):
            above = [(part, gradient_request(self.context, part, work.targets, work.group.stop)) for part in parts]
            missing = [part for part, request in above if not self._readable(request)]
            if missing:
                self._pass(missing, groups[here + 1], (), (), work.targets)

    def _boundary(self, parts: Sequence[Measured], group: range) -> None:
        """Makes the hidden states that leave a group, from those that enter it."""
        leaving = [(part, boundary_request(self.context, part, group.stop)) for part in parts]
        missing = [part for part, request in leaving if not self._readable(request)]
        if not missing:
            return
        groups = self.context.groups
        if group.start:
            self._boundary(missing, groups[groups.index(group) - 1])
        jobs = [
            Job(boundary_task, (self.context, part, group), f"{part.label}/block-{group.stop:02d}/boundary")
            for part in missing
        ]
        self.session.engine.tasks(jobs)

    def _add_up(self, blocks: Sequence[int], statistics: tuple[Statistic, ...]) -> None:
        """Adds up what was measured of the shards, and drops it."""
        jobs = [
            Job(reduction_task, (self.context, self.measured, block, statistics), self._reduction(block))
            for block in blocks
        ]
        self.session.engine.tasks(jobs)
        if self.session.params.run.keep is Keep.ALL:
            return
        for block in blocks:
            for request in self._partial(block, statistics):
                key = request.key(self.context)
                if self.store.has_payload(key):
                    self.store.evict(key)

    def _partial(self, block: int, statistics: Iterable[Statistic]) -> list[Request]:
        """The requests for statistics of the shards."""
        found = [statistic_request(self.context, part, s, block, self.store) for part in self.parts for s in statistics]
        return [request for request in found if request is not None]

    def _has(self, statistic: Statistic, block: int) -> bool:
        request = statistic_request(self.context, self.measured, statistic, block, self.store)
        return request is not None and self._readable(request)

    def _readable(self, request: Request) -> bool:
        return readable(self.store, request.key(self.context)) is not None

    @property
    def _is_sharded(self) -> bool:
        return self.measured.shards > 1

    @property
    def _first_level(self) -> tuple[Statistic, ...]:
        return tuple(s for s in self._made if s in FIRST_LEVEL)

    @property
    def _blocks(self) -> range:
        return range(self.context.model.n_blocks)

    def _names(self, group: range, kind: str) -> list[str]:
        """Names of the tasks of a kind: those of the second level see all sequences."""
        parts = (self.measured,) if kind in SECOND_LEVEL else self.parts
        return [self._name(part, group, kind) for part in parts]

    @staticmethod
    def _name(measured: Measured, group: range, kind: str) -> str:
        return f"{measured.label}/block-{group.start:02d}/{kind}"

    def _reduction(self, block: int) -> str:
        return f"{self.label}/block-{block:02d}/{_REDUCTION}"

    def _tasks(self, body: Callable[..., Outcome[Any]], parts: Sequence[Measured], work: GroupWork, kind: str) -> None:
        """Runs a task for every part of the sequences."""
        jobs = [Job(body, (self.context, part, work), self._name(part, work.group, kind)) for part in parts]
        self.session.engine.tasks(jobs)

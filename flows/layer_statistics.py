"""What a selector of layers reads: found in the store, or measured."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from flows.engine import Job
from flows.session import Session
from flows.statistics import BlockStatistics
from surgeon.choices import Curvature, Selector
from surgeon.curvature.spec import CurvatureSpec, Statistic
from surgeon.layers.choosing import greedy_blocks
from surgeon.layers.rule import LayerRule
from surgeon.layers.spec import Reads
from surgeon.store import Reference
from tasks.curvature import STAGES
from tasks.layer_costs import BLOCK_COST, BlockCostWork, block_cost_request, block_cost_task
from tasks.layers import (
    REMOVAL_LOSSES,
    SIMILARITY,
    SUB_LAYER_SIMILARITY,
    LayerWork,
    losses_of,
    losses_request,
    losses_task,
    similarity_request,
    similarity_task,
    sub_layer_request,
    sub_layer_task,
)
from tasks.stage import Outcome, Request, Stage, readable

_CURVATURES = {Selector.CURVATURE: Curvature.KFAC, Selector.TAYLOR: Curvature.IDENTITY}
"""What is measured beside the gradient of the loss, by selectors that read either."""
_STAGES: dict[Reads, tuple[Stage, ...]] = {
    Reads.NOTHING: (),
    Reads.SIMILARITY: (SIMILARITY,),
    Reads.SUB_LAYERS: (SUB_LAYER_SIMILARITY,),
    Reads.LOSSES: (REMOVAL_LOSSES,),
    Reads.COSTS: (BLOCK_COST,),
}


@dataclass
class LayerStatistics:
    """What one selector reads of one model.

    Attributes:
        session: engine and context.
        work: model, sequences and label.
        rule: selector and amount, which say how many steps there are.
        gradient: whether the cost of a block counts the gradient of the loss.
        references: what was found or made, by readable name; filled by `ensure`.
    """

    session: Session
    work: LayerWork
    rule: LayerRule
    gradient: bool
    references: dict[str, Reference] = field(default_factory=dict)

    @cached_property
    def blocks(self) -> BlockStatistics | None:
        """Factors and gradients of all linears, where costs are made of them."""
        if self.rule.selector not in _CURVATURES:
            return None
        spec = CurvatureSpec(_CURVATURES[self.rule.selector])
        work = self.work
        return BlockStatistics(self.session, work.state, work.calibration, work.label, spec, self.gradient)

    @property
    def versions(self) -> dict[str, int]:
        """Versions of all stages that are read."""
        stages = [*_STAGES[self.rule.spec.reads]]
        if self.blocks is not None:
            stages += [STAGES[statistic] for statistic in self.blocks.wanted]
        return {stage.kind: stage.version for stage in stages}

    def task_names(self) -> list[str]:
        """Names of all tasks, as far as they always run."""
        reads, label = self.rule.spec.reads, self.work.label
        if reads is Reads.COSTS:
            passes = self.blocks.task_names() if self.blocks else []
            return passes + [self._cost_work(block, {}).name for block in self._every]
        if reads is Reads.LOSSES:
            return [f"{self._step_label(step)}/{REMOVAL_LOSSES.kind}" for step in range(self._n_steps)]
        return [f"{label}/{stage.kind}" for stage in _STAGES[reads]]

    def found(self) -> tuple[dict[str, tuple[int, int]], list[Reference] | None]:
        """How many results are there of how many, by kind, and the results if none is missing; runs nothing."""
        reads = self.rule.spec.reads
        if reads is Reads.NOTHING:
            return {}, []
        counts: dict[str, tuple[int, int]] = {}
        if reads is Reads.COSTS:
            works = [
                self._cost_work(block, known) for block in self._every if (known := self._known(block)) is not None
            ]
            if self.blocks is not None:
                counts["statistics"] = (len(works), len(self._every))
            there = [self._lookup(block_cost_request(work)) for work in works]
            n = len(self._every)
        elif reads is Reads.LOSSES:
            there, n = [*self._found_steps()], self._n_steps
        else:
            request = similarity_request if reads is Reads.SIMILARITY else sub_layer_request
            there, n = [self._lookup(request(self.session.context, self.work))], 1
        measured = [reference for reference in there if reference is not None]
        counts[_STAGES[reads][0].kind] = (len(measured), n)
        return counts, measured if len(measured) == n else None

    def ensure(self) -> list[Reference]:
        """Measures what is missing; returns what the selection is made from."""
        reads, label = self.rule.spec.reads, self.work.label
        if reads is Reads.NOTHING:
            return []
        if reads is Reads.COSTS:
            return self._costs()
        if reads is Reads.LOSSES:
            return self._steps()
        body = similarity_task if reads is Reads.SIMILARITY else sub_layer_task
        return [self._task(body, self.work, name=f"{label}/{_STAGES[reads][0].kind}")]

    def passed_on(self) -> list[Reference]:
        """Hidden states and gradients that groups of blocks have handed to each other."""
        return self.blocks.passed_on() if self.blocks else []

    @property
    def _every(self) -> range:
        return range(self.session.context.model.n_blocks)

    @property
    def _n_steps(self) -> int:
        return self.rule.choice.n_remove if self.rule.spec.iterative else 1

    def _step_label(self, step: int) -> str:
        return f"{self.work.label}/step-{step + 1:02d}"

    def _step(self, before: Sequence[Reference]) -> LayerWork:
        """The next step of greedy removal, on what the steps before have left."""
        label = self._step_label(len(before))
        if not before:
            return replace(self.work, label=label)
        state = self.work.state.without(greedy_blocks(losses_of(list(before)), self.rule.choice))
        return replace(self.work, state=state, label=label, before=before[-1])

    def _steps(self) -> list[Reference]:
        """Losses of all steps; each is a task of its own."""
        done: list[Reference] = []
        while len(done) < self._n_steps:
            work = self._step(done)
            done.append(self._task(losses_task, work, name=f"{work.label}/{REMOVAL_LOSSES.kind}"))
        return done

    def _found_steps(self) -> list[Reference]:
        done: list[Reference] = []
        while len(done) < self._n_steps:
            reference = self._lookup(losses_request(self.session.context, self._step(done)))
            if reference is None:
                break
            done.append(reference)
        return done

    def _costs(self) -> list[Reference]:
        """Costs of all blocks; statistics that were dropped are made again only for costs that are missing."""
        if self.blocks is not None:
            self.blocks.ensure({block for block in self._every if self.blocks.lookup(block) is None}, first=True)
        works = [self._cost_work(block, self._known(block) or {}) for block in self._every]
        missing = {work.block for work in works if not self._readable(block_cost_request(work))}
        if self.blocks is not None:
            self.blocks.ensure(missing)
            for block in self._every:
                self.references |= self.blocks.references(block)
        jobs = [Job(block_cost_task, (self.session.context, work), work.name) for work in works]
        costs: list[Reference] = self.session.engine.tasks(jobs)
        self.references |= {work.name: cost for work, cost in zip(works, costs, strict=True)}
        return costs

    def _known(self, block: int) -> dict[Statistic, Reference] | None:
        """Statistics of a block, dropped or not; None if one was never computed."""
        return self.blocks.lookup(block) if self.blocks else {}

    def _cost_work(self, block: int, statistics: dict[Statistic, Reference]) -> BlockCostWork:
        return BlockCostWork(self.work.state, block, self.rule.selector, statistics, self.work.label)

    def _lookup(self, request: Request) -> Reference | None:
        return self.session.store.lookup(request.key(self.session.context))

    def _readable(self, request: Request) -> bool:
        return readable(self.session.store, request.key(self.session.context)) is not None

    def _task(self, body: Callable[..., Outcome[Any]], work: Any, name: str) -> Reference:
        reference: Reference = self.session.engine.task(body, self.session.context, work, name=name)
        self.references[name] = reference
        return reference

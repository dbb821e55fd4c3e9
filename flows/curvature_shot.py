"""One shot by curvature: curvature → costs → mask → update.

Everything is asked for by key, and only what a missing result needs is computed: in an unfinished shot, statistics that
were dropped are made again only for blocks whose costs or update are missing.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from flows.engine import Job
from flows.session import Session
from flows.shot import Made, PruningShot
from flows.statistics import BlockStatistics
from surgeon.choices import Correction, UpdateRule
from surgeon.correction.adapters import AdapterSettings
from surgeon.pruning.granularity import is_structured
from surgeon.store import Reference
from tasks.context import ModelState
from tasks.correction import CORRECTION, correction_task
from tasks.costs import COSTS, BlockWork, cost_request, cost_task
from tasks.curvature import STAGES
from tasks.mask import MASK, mask_request, mask_task
from tasks.rule import MaskRule
from tasks.update import UPDATE, Removal, update_request, update_task


class CurvatureShot(PruningShot):
    """One shot on one state: holds what its steps share.

    Args:
        session: parameters and engine.
        state: the model before the shot.
        calibration: its sequences.
        number: of the shot, from 1.
        target: sparsity asked for after it.
    """

    def __init__(self, session: Session, state: ModelState, calibration: Reference, number: int, target: float) -> None:
        super().__init__(session, state, calibration, number, target)
        self.recipe = session.recipe
        self.rule = MaskRule(target, self.recipe, session.goal.usage)
        self.statistics = BlockStatistics(
            session,
            state,
            calibration,
            self.label,
            self.recipe.curvature,
            self.recipe.update.newton_step > 0,
            session.measured_linears,
        )

    def found(self) -> dict[str, tuple[int, int]]:
        """For each kind of task, how many results are there and how many there will be; runs nothing."""
        n = len(self.blocks)
        statistics = [self.statistics.lookup(b) for b in self.blocks]
        counts = {"statistics": (sum(found is not None for found in statistics), n)}
        works = [self._work(b, found) for b, found in enumerate(statistics) if found is not None]
        if self._has_mask:
            costs = [ref for work in works if (ref := self._lookup(cost_request(work)))]
            counts |= {"costs": (len(costs), n), "mask": (0, 1), "update": (0, n)}
            mask = self._lookup(mask_request(costs, self.rule, self.label)) if len(costs) == n else None
            if mask is None:
                return counts
            counts["mask"] = (1, 1)
            removals = [Removal(self.target, cost, mask) for cost in costs]
        else:
            removals = [Removal(self.target)] * len(works)
        updates = [self._lookup(update_request(*pair)) for pair in zip(works, removals, strict=True)]
        return counts | {"update": (sum(ref is not None for ref in updates), n)}

    @property
    def _has_mask(self) -> bool:
        """Whether what goes is chosen before the update, not by it."""
        return self.recipe.update.rule is not UpdateRule.SEQUENTIAL

    def _passed_on(self) -> list[Reference]:
        return self.statistics.passed_on()

    def _parameters(self) -> dict[str, Any]:
        recipe = asdict(self.recipe) | {"granularity": str(self.recipe.granularity)}
        stages = [*(STAGES[statistic] for statistic in self.statistics.wanted), COSTS, MASK, UPDATE]
        stages += [CORRECTION] if self._adapters else []
        return {
            "recipe": recipe,
            "adapters": asdict(self._adapters) if self._adapters else None,
            "usage": self.rule.usage.parameters,
            "versions": {stage.kind: stage.version for stage in stages},
        }

    @property
    def _adapters(self) -> AdapterSettings | None:
        """How low-rank adapters are trained after the updates; None if they are not."""
        return self.session.adapters if self.recipe.correction is Correction.ADAPTERS else None

    def _run_tasks(self) -> Made:
        self.statistics.ensure({b for b in self.blocks if self.statistics.lookup(b) is None}, first=True)
        works = [self._work(b, self.statistics.lookup(b)) for b in self.blocks]
        names: dict[str, Reference] = {}
        for b in self.blocks:
            names |= self.statistics.references(b)
        mask = None
        removals = [Removal(self.target) for _ in works]
        if self._has_mask:
            costs = self._costs_for_mask(works)
            mask = self._task(mask_task, self.context, costs, self.rule, self.label, name=f"{self.label}/mask")
            names |= {work.name("costs"): ref for work, ref in zip(works, costs, strict=True)}
            names[f"{self.label}/mask"] = mask
            removals = [Removal(self.target, cost, mask) for cost in costs]
        updates = self._updates(works, removals)
        names |= {work.name("update"): ref for work, ref in zip(works, updates, strict=True)}
        after = updates
        if self._adapters:
            after = self._corrected(updates)
            names |= {work.name("correction"): ref for work, ref in zip(works, after, strict=True)}
        facts = self._facts(updates)
        n_removed = mask.attributes["n_removed"] if mask else self._n_live(self.state) - facts["n_live"]
        record = {
            "threshold": mask.attributes["threshold"] if mask else None,
            "kept": mask.attributes.get("kept") if mask else None,
            "predicted_cost": facts["predicted_cost"],
            "convergence": facts["convergence"],
            "correction": after[0].attributes.get("correction"),
        }
        return Made(self.state.after(after), names, n_removed, record)

    def _work(self, block: int, statistics: Any) -> BlockWork:
        assert statistics is not None, f"{self.label}: statistics of block {block} are missing"
        return BlockWork(self.state, block, statistics, self.recipe, self.label)

    def _costs_for_mask(self, works: list[BlockWork]) -> list[Reference]:
        """Costs of all blocks; those that were dropped are computed again only if there is no mask made from them."""
        found = [ref for work in works if (ref := self._lookup(cost_request(work)))]
        if len(found) == len(works) and self._readable(mask_request(found, self.rule, self.label)):
            self.session.engine.reuse([work.name("costs") for work in works])
            return found
        return self._costs(works, {work.block for work in works if not self._readable(cost_request(work))})

    def _costs(self, works: Sequence[BlockWork], missing: set[int]) -> list[Reference]:
        self.statistics.ensure(missing)
        return self._tasks([Job(cost_task, (self.context, work), work.name("costs")) for work in works])

    def _updates(self, works: list[BlockWork], removals: list[Removal]) -> list[Reference]:
        pairs = list(zip(works, removals, strict=True))
        missing = {work.block for work, removal in pairs if not self._readable(update_request(work, removal))}
        if self._has_mask and not is_structured(self.recipe.granularity):
            # The mask of single weights follows from their costs, which may have been dropped.
            gone = [work for work in works if work.block in missing and not self._readable(cost_request(work))]
            self._costs(gone, {work.block for work in gone})
        self.statistics.ensure(missing)
        return self._tasks([Job(update_task, (self.context, *pair), pair[0].name("update")) for pair in pairs])

    def _corrected(self, updates: list[Reference]) -> list[Reference]:
        """Weights after training low-rank adapters on all blocks at once."""
        state, name = self.state.after(updates), f"{self.label}/correction"
        corrected: list[Reference] = self._task(
            correction_task, self.context, state, self.calibration, self._adapters, self.label, name=name
        )
        return corrected

    @staticmethod
    def _facts(updates: Sequence[Reference]) -> dict[str, Any]:
        """Sums over all linears of what their updates say."""
        linears = [linear for ref in updates for linear in ref.attributes["linears"].values()]
        solved = [linear for linear in linears if "residual" in linear]
        return {
            "n_live": sum(linear["n_live"] for linear in linears),
            "predicted_cost": sum(linear["predicted_cost"] for linear in linears),
            "convergence": {
                "linears": len(solved),
                "not_converged": sum(not linear["converged"] for linear in solved),
                "worst_residual": max(linear["residual"] for linear in solved),
                "iterations": sum(linear["iterations"] for linear in solved),
            }
            if solved
            else None,
        }

    def _task_names(self) -> list[str]:
        """Names of all tasks of the shot but its evaluation, as far as they always run."""
        kinds = ("costs", "update") if self._has_mask else ("update",)
        blocks = [f"{self.label}/block-{b:02d}/{kind}" for kind in kinds for b in self.blocks]
        whole = ["mask"] * self._has_mask + ["correction"] * (self._adapters is not None)
        return [*self.statistics.task_names(), *blocks, *(f"{self.label}/{kind}" for kind in whole)]

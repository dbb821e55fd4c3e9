"""Bonsai: a shot is a round of priors → sub-models → ranking → mask → update.

Every sub-model is a task, so that a run that was killed goes on at the next sub-model. The round works on the smaller
model that the rounds before left.
"""

from dataclasses import asdict
from typing import Any

from flows.engine import Job
from flows.params_bonsai import BonsaiParams
from flows.session import Session
from flows.shot import Made, PruningShot
from surgeon.store import Reference
from tasks.bonsai import (
    PRIOR,
    RANKING,
    SUB_MODEL,
    prior_request,
    prior_task,
    ranked_mask_request,
    ranked_mask_task,
    ranking_request,
    ranking_task,
    sub_model_request,
    sub_model_task,
)
from tasks.bonsai_round import Round, close_round
from tasks.context import ModelState
from tasks.costs import BlockWork
from tasks.mask import MASK
from tasks.rule import MaskRule
from tasks.update import UPDATE, Removal, update_request, update_task


class BonsaiShot(PruningShot):
    """One round of Bonsai.

    Args:
        session: parameters and engine.
        state: the model before the round.
        calibration: its sequences.
        number: of the round, from 1.
        target: fraction asked for after it; the round removes what is missing to it.
        settings: of Bonsai; None takes those of the parameters.
    """

    def __init__(
        self,
        session: Session,
        state: ModelState,
        calibration: Reference,
        number: int,
        target: float,
        settings: BonsaiParams | None = None,
    ) -> None:
        super().__init__(session, state, calibration, number, target)
        given: BonsaiParams = settings or session.params.prune.bonsai
        given.require_comparable(session.recipe)
        given.require_sequences(session.params.calibrate.sequences)
        self.settings = given.settings(session.params.seed)
        self.rule = MaskRule(target, session.recipe, session.goal.usage)
        self.work = Round(state, calibration, self.rule, self.settings, number, self.label)

    def found(self) -> dict[str, tuple[int, int]]:
        """For each kind of task, how many results are there and how many there will be; runs nothing."""
        n = self.settings.sub_models
        counts = {PRIOR.kind: (0, 1), SUB_MODEL.kind: (0, n), RANKING.kind: (0, 1), "mask": (0, 1)}
        counts["update"] = (0, len(self.blocks))
        prior = self._lookup(prior_request(self.context, self.work))
        if prior is None:
            return counts
        requests = [sub_model_request(self.context, self.work, prior, index) for index in range(n)]
        sub_models = [found for request in requests if (found := self._lookup(request)) is not None]
        counts |= {PRIOR.kind: (1, 1), SUB_MODEL.kind: (len(sub_models), n)}
        if len(sub_models) < n:
            return counts
        ranking = self._lookup(ranking_request(self.context, self.work, prior, sub_models))
        mask = None if ranking is None else self._lookup(ranked_mask_request(self.work, ranking))
        counts |= {RANKING.kind: (int(ranking is not None), 1), "mask": (int(mask is not None), 1)}
        if mask is not None:
            updates = [
                self._lookup(update_request(self._block(b), Removal(self.target, mask=mask))) for b in self.blocks
            ]
            counts["update"] = (sum(update is not None for update in updates), len(self.blocks))
        return counts

    def _parameters(self) -> dict[str, Any]:
        stages = (PRIOR, SUB_MODEL, RANKING, MASK, UPDATE)
        units = self.rule.recipe.units
        assert units is not None, "Bonsai prunes units"
        return {
            "bonsai": asdict(self.settings),
            "units": asdict(units),
            "ranking": self.rule.recipe.ranking,
            "allocation": self.rule.recipe.allocation,
            "usage": self.rule.usage.parameters,
            "round": self.number,
            "versions": {stage.kind: stage.version for stage in stages},
        }

    def _task_names(self) -> list[str]:
        kinds = [PRIOR.kind, *map(_sub_model, range(self.settings.sub_models)), RANKING.kind, "mask"]
        return [*(f"{self.label}/{kind}" for kind in kinds), *(self._block(b).name("update") for b in self.blocks)]

    def _run_tasks(self) -> Made:
        try:
            references = self._ranked()
        finally:
            close_round()
        mask = references[f"{self.label}/mask"]
        works = [self._block(block) for block in self.blocks]
        removal = Removal(self.target, mask=mask)
        updates = self._tasks([Job(update_task, (self.context, work, removal), work.name("update")) for work in works])
        references |= {work.name("update"): update for work, update in zip(works, updates, strict=True)}
        facts = {name: mask.attributes.get(name) for name in ("threshold", "kept", "predicted_cost")}
        ranking = references[f"{self.label}/{RANKING.kind}"].attributes
        facts["bonsai"] = {name: ranking.get(name) for name in ("tau", "strength", "losses", "n_candidates")}
        return Made(self.state.after(updates), references, mask.attributes["n_removed"], facts)

    def _ranked(self) -> dict[str, Reference]:
        """Results of the round up to its mask, by name."""
        context, work, label = self.context, self.work, self.label
        prior = self._task(prior_task, context, work, name=f"{label}/{PRIOR.kind}")
        names = [f"{label}/{_sub_model(index)}" for index in range(self.settings.sub_models)]
        jobs = [Job(sub_model_task, (context, work, prior, index), name) for index, name in enumerate(names)]
        sub_models = self._tasks(jobs)
        references = {f"{label}/{PRIOR.kind}": prior, **dict(zip(names, sub_models, strict=True))}
        name = f"{label}/{RANKING.kind}"
        ranking = self._task(ranking_task, context, work, prior, sub_models, name=name)
        mask = self._task(ranked_mask_task, context, work, ranking, name=f"{label}/mask")
        return {**references, name: ranking, f"{label}/mask": mask}

    def _block(self, block: int) -> BlockWork:
        return BlockWork(self.state, block, {}, self.rule.recipe, self.label)


def _sub_model(index: int) -> str:
    return f"{SUB_MODEL.kind}-{index:04d}"

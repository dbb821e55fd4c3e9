"""LayerChop: whole layers go in one shot: statistics → selection.

Statistics depend on the model and the sequences alone, so all selectors and amounts share them. Greedy removal is one
task a step, so that a run that was killed goes on at the next step.
"""

from dataclasses import asdict, replace
from typing import Any

from flows.layer_statistics import LayerStatistics
from flows.params_layerchop import LayerChopParams
from flows.session import Session
from flows.shot import Made, PruningShot
from surgeon.errors import ParameterError
from surgeon.layers.choosing import blocks_for_fraction
from surgeon.layers.rule import LayerRule
from surgeon.layers.spec import SPECS, LayerGranularity
from surgeon.models.families import family_names
from surgeon.store import Reference, is_promised
from tasks.context import ModelSpec, ModelState, StoredBlock
from tasks.layers import LayerWork
from tasks.selection import (
    DROPPED,
    SELECTION,
    dropped_task,
    selected,
    selection_request,
    selection_task,
    state_after,
)
from tasks.units import block_sub_layers


def layer_rule(model: ModelSpec, settings: LayerChopParams, target: float) -> LayerRule:
    """How much goes from a model, and how it is chosen.

    Args:
        model: shapes.
        settings: of LayerChop.
        target: fraction of the weights of decoder linears to be gone, where no number of blocks is given.

    Raises:
        ParameterError: nothing or everything would go, less may go than shall, or the attention and the MLP of the
            model are not known but wanted apart.
    """
    selector, (first, last), n_blocks = settings.selector, settings.protected, model.n_blocks
    if SPECS[selector].granularity is LayerGranularity.BLOCK:
        weights = [sum(shape.n_weights for shape in block) for block in model.blocks]
        n_remove = settings.blocks or blocks_for_fraction(target, weights)
        return LayerRule(selector, n_blocks, first, last, n_remove)
    if model.couplings is None:
        raise ParameterError(
            f"prune.layerchop.selector: {selector} takes attention and MLP apart, but what belongs to them in "
            f"{model.checkpoint.source} is not known (described families: {family_names()}); choose a selector of "
            "whole blocks, such as block-influence, or describe the family in surgeon/models/families.py"
        )
    halves = tuple((_weights_of(model, block, 0), _weights_of(model, block, 1)) for block in range(n_blocks))
    n_weights = None if settings.blocks else target * model.n_weights
    return LayerRule(selector, n_blocks, first, last, settings.blocks, n_weights, halves)


def _weights_of(model: ModelSpec, block: int, half: int) -> int:
    """Weights of the attention (0) or of the MLP (1) of a block."""
    sub = block_sub_layers(model, block)[half]
    return sum(shape.n_weights for shape in model.blocks[block] if shape.name in {*sub.rows, sub.output})


class LayerChopShot(PruningShot):
    """Whole layers go from a model.

    Args:
        session: parameters and engine.
        state: the model before.
        calibration: its sequences.
        number: of the shot, from 1.
        target: fraction of the weights to be gone, where no number of blocks is given.
    """

    def __init__(self, session: Session, state: ModelState, calibration: Reference, number: int, target: float) -> None:
        super().__init__(session, state, calibration, number, target)
        assert not state.removed, "LayerChop is one shot on a model with all its blocks"
        self.settings = session.params.prune.layerchop
        self.rule = layer_rule(self.context.model, self.settings, target)
        work = LayerWork(state, calibration, self.label)
        self.statistics = LayerStatistics(session, work, self.rule, self.settings.counts_gradient)

    def found(self) -> dict[str, tuple[int, int]]:
        """For each kind of task, how many results are there and how many there will be; runs nothing."""
        counts, measured = self.statistics.found()
        there = measured is not None and self._lookup(selection_request(self.rule, measured, self.label)) is not None
        return counts | {SELECTION.kind: (int(there), 1)}

    def _passed_on(self) -> list[Reference]:
        return self.statistics.passed_on()

    def _parameters(self) -> dict[str, Any]:
        own = [SELECTION, *([DROPPED] if self._takes_sub_layers else [])]
        return {
            "layerchop": {**asdict(self.rule), "selector": self.rule.selector.value},
            "gradient": self.settings.counts_gradient,
            "versions": {**self.statistics.versions, **{stage.kind: stage.version for stage in own}},
        }

    @property
    def _takes_sub_layers(self) -> bool:
        return self.rule.spec.granularity is LayerGranularity.SUB_LAYER

    def _task_names(self) -> list[str]:
        own = [SELECTION, *([DROPPED] if self._takes_sub_layers else [])]
        return [*self.statistics.task_names(), *(f"{self.label}/{stage.kind}" for stage in own)]

    def _run_tasks(self) -> Made:
        measured = self.statistics.ensure()
        name = f"{self.label}/{SELECTION.kind}"
        selection = self._task(selection_task, self.context, self.rule, measured, self.label, name=name)
        references = {**self.statistics.references, name: selection}
        chosen = selected(selection)
        updates: list[Reference] = []
        if chosen.dropped:
            name = f"{self.label}/{DROPPED.kind}"
            updates = self._task(dropped_task, self.context, self.state, chosen.dropped, self.label, name=name)
            for (block, _), reference in zip(sorted(chosen.dropped), updates, strict=True):
                references[f"{self.label}/block-{block:02d}/{DROPPED.kind}"] = reference
        facts = {"layerchop": {"selector": self.rule.selector.value, **selection.attributes}}
        state = state_after(self.state, chosen, updates, len(self.blocks))
        if is_promised(selection.digest) and not self.rule.spec.is_pattern:
            # In a plan what goes is not known yet, so no model that is there can be this one.
            state = replace(state, trunk=StoredBlock(selection.key, selection.digest))
        return Made(state, references, len(chosen.removed) + len(chosen.dropped), facts)

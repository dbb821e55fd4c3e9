"""How much of each linear is alive in a shot and how much of it goes, as far as the schedule tells.

Shares are even: every linear that can lose something loses the same part of it. What the costs really choose is not
known before a run.
"""

from dataclasses import dataclass
from functools import cached_property

from flows.schedule import shot_target
from flows.session import Session
from surgeon.choices import Structure, Widths
from surgeon.planning.solves import Solved
from surgeon.pruning.granularity import is_structured
from surgeon.pruning.units import SubLayer, SubLayerKind
from tasks.context import LinearShape
from tasks.units import block_sub_layers, dense_usage


@dataclass(frozen=True)
class LiveShare:
    """Live parts before and after one shot.

    Args:
        session: model, goal and recipe.
        number: of the shot, from 1.
    """

    session: Session
    number: int

    def is_changed(self, block: int, shape: LinearShape) -> bool:
        """Whether the update of a linear has anything to solve."""
        found = self.solved(block, shape)
        removed = found.removed_rows + found.removed_columns + found.removed_weights
        return removed > 0 or self.session.recipe.update.newton_step > 0

    def solved(self, block: int, shape: LinearShape) -> Solved:
        """One linear as costs and update of the shot find it."""
        granularity = self.session.recipe.granularity
        bias = int(shape.has_bias)
        if granularity is Structure.UNITS:
            return self._by_units(block, shape)
        if not is_structured(granularity):
            return Solved(shape.n_out, shape.n_in + bias, removed_weights=_removed(self._before, self._after))
        rows, columns = {
            Structure.ROWS: (1.0, 0.0),
            Structure.COLUMNS: (0.0, 1.0),
            Structure.ROWS_AND_COLUMNS: (0.5, 0.5),
        }[granularity]  # type: ignore[index]
        before, after = ([(1.0 - f) ** side for side in (rows, columns)] for f in (self._before, self._after))
        return Solved(
            n_out=max(1, round(before[0] * shape.n_out)),
            n_in=max(1, round(before[1] * shape.n_in)) + bias,
            removed_rows=1.0 - after[0] / before[0],
            removed_columns=1.0 - after[1] / before[1],
        )

    @cached_property
    def _before(self) -> float:
        return shot_target(self.session.goal.fraction, self.number - 1, self.session.n_shots)

    @cached_property
    def _after(self) -> float:
        return shot_target(self.session.goal.fraction, self.number, self.session.n_shots)

    @cached_property
    def _going(self) -> float:
        """Weights of all units that may go."""
        spec, model = self.session.recipe.units, self.session.model
        assert spec is not None, "units have a specification"
        parts = [s for b in range(model.n_blocks) for s in block_sub_layers(model, b)]
        return float(sum(s.n_units * s.weights_per_unit for s in parts if spec.heads or s.kind is SubLayerKind.MLP))

    def _by_units(self, block: int, shape: LinearShape) -> Solved:
        whole = Solved(shape.n_out, shape.n_in + shape.has_bias)
        for sub in block_sub_layers(self.session.model, block):
            if sub.output == shape.name:
                before, after = self._kept(sub, self._before), self._kept(sub, self._after)
                n_in = before * sub.width + shape.has_bias
                return Solved(shape.n_out, n_in, removed_columns=_removed(0, 1 - after / before), n_groups=before)
        return whole

    def _kept(self, sub: SubLayer, fraction: float) -> int:
        """Units that are left of a sub-layer once a fraction of the whole is gone."""
        spec, model = self.session.recipe.units, self.session.model
        assert spec is not None, "units have a specification"
        if sub.kind is SubLayerKind.ATTENTION and not spec.heads:
            return sub.n_units
        share = fraction
        if self.session.goal.usage.mlp is None:  # times are not proportional to weights
            share *= dense_usage(model, self.session.goal.usage) / max(1.0, self._going)
        kept = int(sub.n_units * (1.0 - min(1.0, share)))
        if sub.kind is SubLayerKind.MLP and spec.widths is Widths.UNIFORM:
            kept -= kept % spec.multiple
        return max(1, kept)


def _removed(before: float, after: float) -> float:
    """Part of what was left that goes."""
    return (after - before) / (1.0 - before) if before < 1.0 else 0.0

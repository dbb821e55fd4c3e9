"""How to prune, with every choice made: what the parameters of a run come down to.

A method is a preset. `resolve` fills in what is not given from the method and the granularity, and refuses what
contradicts them or would have no effect.
"""

from dataclasses import dataclass, replace

from surgeon.choices import (
    Allocation,
    Correction,
    Cost,
    Curvature,
    Method,
    Ranking,
    Structure,
    Targets,
    UpdateRule,
    Widths,
)
from surgeon.curvature.spec import CurvatureSpec
from surgeon.errors import ParameterError
from surgeon.preferences import Preferences, no_effect
from surgeon.presets import Preset, require_preset
from surgeon.pruning.granularity import Granularity, is_structured


@dataclass(frozen=True)
class Damping:
    """Relative damping of both factors (multiples of the mean of their diagonals)."""

    activations: float
    gradients: float


@dataclass(frozen=True)
class UpdateSpec:
    """How the remaining weights adapt.

    Attributes:
        rule: which solution.
        max_iterations: of conjugate gradients; 0 where the rule does not iterate.
        tolerance: relative residual at which conjugate gradients stop; 0 where the rule does not iterate.
        max_correlate: weights solved for at a time by `chunked`, columns by `sequential`; 0 for the others.
        newton_step: part of the damped natural-gradient step that the update aims at; 0 for none.
    """

    rule: UpdateRule
    max_iterations: int = 0
    tolerance: float = 0.0
    max_correlate: int = 0
    newton_step: float = 0.0


@dataclass(frozen=True)
class UnitSpec:
    """Which numbers of coupled units blocks may keep.

    Attributes:
        widths: equal in all blocks or free.
        multiple: numbers of MLP neurons are multiples of it.
        heads: whether key/value groups may go.
        rescorings: how often costs are taken again at most as units go.
    """

    widths: Widths
    multiple: int
    heads: bool
    rescorings: int


@dataclass(frozen=True)
class Recipe:
    """Everything that decides which weights go and what becomes of the others, but the target of a shot."""

    method: Method
    granularity: Granularity
    curvature: CurvatureSpec
    damping: Damping
    cost: Cost
    ranking: Ranking
    allocation: Allocation
    update: UpdateSpec
    correction: Correction
    units: UnitSpec | None = None


STRUCTURED_DAMPING = Damping(0.01, 0.1)
"""Default damping where whole rows and columns go."""
UNITS_DAMPING = Damping(0.1, 0.1)
"""Default damping where coupled units go (measured: docs/deployment.md)."""
WEIGHTS_DAMPING = Damping(0.01, 0.1)
"""Default damping where weights go, in an N:M pattern or not."""
MULTIPLES = {Widths.UNIFORM: 64, Widths.FREE: 8}
"""Default multiple of MLP widths. Measured (docs/deployment.md): even 64 costs free widths nothing."""
HEADS_GO = {Widths.UNIFORM: False, Widths.FREE: True}
"""Measured (docs/deployment.md): costs of attention are too low where a whole share of it goes from every block."""
RESCORINGS = 32
"""More change the predicted cost of a block by less than half a percent; none at all: docs/deployment.md."""
RANK = 2
POWER_ITERATIONS = 2
DRAWS = 1
MAX_ITERATIONS = 20
"""Measured (docs/benchmarks.md): with thousands of calibration tokens, more iterations fit their noise."""
TOLERANCE = 1e-3
CHUNKED_MAX_CORRELATE = 2000
SEQUENTIAL_MAX_CORRELATE = 128
NEWTON_STEP = 0.001
"""Measured (docs/benchmarks.md): with far more weights than tokens a whole step fits noise and ruins the model."""

_WITHOUT_GRADIENTS = (Curvature.IDENTITY, Curvature.ACTIVATIONS)
_UNCORRELATED = (Curvature.IDENTITY, Curvature.DIAGONAL)
_SINGLE_PRODUCT = (Curvature.ACTIVATIONS, Curvature.KFAC, Curvature.NEAREST_KRONECKER)
_POWER_METHOD = (Curvature.NEAREST_KRONECKER, Curvature.KRONECKER_SUM)


def resolve(asked: Preferences, seed: int = 0) -> Recipe:
    """Makes every choice: fills in what is not given, and refuses what cannot be or would have no effect.

    Args:
        asked: what is asked for.
        seed: of draws from the model's softmax, where the curvature needs them.

    Raises:
        ParameterError: naming the choice, what it clashes with and what is allowed.
    """
    preset = require_preset(asked.method, asked.curvature, asked.cost, asked.update)
    asked = _with_granularity(asked)
    if preset.weights_only and is_structured(asked.granularity):
        raise ParameterError(
            f"structure: got {asked.granularity}, but method {asked.method} removes single weights; "
            "allowed: weights, or N:M such as 2:4"
        )
    curvature = _curvature(asked, asked.curvature or preset.curvature, seed)
    uncorrelated = curvature.kind in _UNCORRELATED
    update = _update(asked, curvature.kind, UpdateRule.NONE if uncorrelated else preset.update)
    # What nothing is correlated with need not adapt, so both costs are the same.
    cost = asked.cost or (Cost.OBD if uncorrelated else preset.cost)
    return Recipe(
        method=asked.method,
        granularity=asked.granularity,
        curvature=curvature,
        damping=_damping(asked, curvature.kind, cost, update.rule),
        cost=cost,
        ranking=_ranking(asked),
        allocation=_allocation(asked, preset),
        update=update,
        correction=asked.correction,
        units=_units(asked, curvature.kind, cost),
    )


def _with_granularity(asked: Preferences) -> Preferences:
    """Blocks go by LayerChop and by it alone, and Bonsai takes units."""
    own = {Method.LAYERCHOP: Structure.BLOCKS, Method.BONSAI: Structure.UNITS}.get(asked.method)
    if own is None and asked.granularity is Structure.BLOCKS:
        raise ParameterError(
            f"structure: {Structure.BLOCKS} belongs to method: {Method.LAYERCHOP}; got method: {asked.method}"
        )
    if own is None:
        return asked
    if asked.granularity not in (own, Structure.UNITS):  # units are what is there when nothing is asked for
        raise ParameterError(
            f"structure: got {asked.granularity}, but method {asked.method} removes {own}; leave it out"
        )
    if asked.correction is not Correction.NONE:
        raise ParameterError(
            f"correction: {asked.correction} has no effect with method: {asked.method} (it is for shots by curvature); "
            "train afterwards with the section recovery"
        )
    if asked.method is Method.LAYERCHOP:
        for name in ("ranking", "allocation"):
            no_effect(name, getattr(asked, name), f"method: {asked.method}", "whole blocks are chosen by its selector")
    return replace(asked, granularity=own)


def _units(asked: Preferences, kind: Curvature, cost: Cost) -> UnitSpec | None:
    if asked.granularity is not Structure.UNITS:
        where, reason = f"structure: {asked.granularity}", f"only {Structure.UNITS} have it"
        for name in ("widths", "multiple", "heads", "rescorings"):
            no_effect(name, getattr(asked, name), where, reason)
        return None
    rescored = cost is Cost.OBS and kind in _SINGLE_PRODUCT
    if not rescored:
        reason = f"costs are taken again with cost: {Cost.OBS} and one Kronecker product"
        no_effect("rescorings", asked.rescorings, f"cost: {cost} and curvature: {kind}", reason)
    widths = asked.widths or Widths.UNIFORM
    if widths is Widths.UNIFORM:
        reason = "equal widths are chosen for all blocks together"
        no_effect("ranking", asked.ranking, f"widths: {widths}", reason)
        no_effect("allocation", asked.allocation, f"widths: {widths}", reason)
    rescorings = RESCORINGS if asked.rescorings is None else asked.rescorings
    heads = HEADS_GO[widths] if asked.heads is None else asked.heads
    return UnitSpec(widths, asked.multiple or MULTIPLES[widths], heads, rescorings if rescored else 0)


def _curvature(asked: Preferences, kind: Curvature, seed: int) -> CurvatureSpec:
    if kind is not Curvature.KRONECKER_SUM:
        no_effect("rank", asked.rank, f"curvature: {kind}", f"only {Curvature.KRONECKER_SUM} has a rank")
    if kind not in _POWER_METHOD:
        reason = f"only {' and '.join(_POWER_METHOD)} iterate"
        no_effect("power_iterations", asked.power_iterations, f"curvature: {kind}", reason)
    targets = asked.targets or Targets.EMPIRICAL
    sampled = targets is Targets.SAMPLED
    if sampled and kind in _WITHOUT_GRADIENTS:
        no_effect("targets", targets, f"curvature: {kind}", "which takes no gradients")
    if not sampled:
        no_effect("draws", asked.draws, f"targets: {targets}", f"only {Targets.SAMPLED} draws")
    return CurvatureSpec(
        kind=kind,
        targets=targets,
        draws=asked.draws or DRAWS,
        rank=(asked.rank or RANK) if kind is Curvature.KRONECKER_SUM else 1,
        iterations=(asked.power_iterations or POWER_ITERATIONS) if kind in _POWER_METHOD else 0,
        seed=seed if sampled else 0,
    )


def _update(asked: Preferences, kind: Curvature, default: UpdateRule) -> UpdateSpec:
    rule = asked.update or default
    _require_rule(rule, asked, kind)
    structured = is_structured(asked.granularity)
    iterates = rule is UpdateRule.EXACT and not (structured and kind in _SINGLE_PRODUCT)
    if not iterates:
        where = f"update: {rule}"
        reason = "nothing iterates there"
        if rule is UpdateRule.EXACT:
            where, reason = f"{where}, curvature: {kind} and structure: {asked.granularity}", "solved directly"
        no_effect("max_iterations", asked.max_iterations, where, reason)
        no_effect("tolerance", asked.tolerance, where, reason)
    widths = {UpdateRule.CHUNKED: CHUNKED_MAX_CORRELATE, UpdateRule.SEQUENTIAL: SEQUENTIAL_MAX_CORRELATE}
    if rule not in widths:
        reason = f"only {' and '.join(widths)} solve for a limited number at a time"
        no_effect("max_correlate", asked.max_correlate, f"update: {rule}", reason)
    spec = UpdateSpec(
        rule=rule,
        max_iterations=(asked.max_iterations or MAX_ITERATIONS) if iterates else 0,
        tolerance=(asked.tolerance or TOLERANCE) if iterates else 0.0,
        max_correlate=(asked.max_correlate or widths[rule]) if rule in widths else 0,
    )
    if asked.correction is not Correction.NEWTON:
        reason = f"only {Correction.NEWTON} takes a step"
        no_effect("newton_step", asked.newton_step, f"correction: {asked.correction}", reason)
        return spec
    if rule is not UpdateRule.EXACT:
        raise ParameterError(f"correction: {Correction.NEWTON} needs update: {UpdateRule.EXACT}; got update: {rule}")
    return replace(spec, newton_step=asked.newton_step or NEWTON_STEP)


def _require_rule(rule: UpdateRule, asked: Preferences, kind: Curvature) -> None:
    """Refuses an update that the curvature or the granularity has no meaning for."""
    structured = is_structured(asked.granularity)
    if kind in _UNCORRELATED and rule is not UpdateRule.NONE:
        raise ParameterError(
            f"update: got {rule}, but with curvature: {kind} no weight is correlated with another, so that the rest "
            f"has nothing to adapt to; allowed: {UpdateRule.NONE}"
        )
    if rule is UpdateRule.SEQUENTIAL and asked.method is not Method.SPARSEGPT:
        raise ParameterError(f"update: {rule} belongs to method: {Method.SPARSEGPT}; got method: {asked.method}")
    if rule is UpdateRule.INDEPENDENT and not structured:
        raise ParameterError(
            f"update: {rule} adds up solutions for rows and for columns, so it needs a structure of rows or columns; "
            f"got structure: {asked.granularity}; try {UpdateRule.EXACT}"
        )
    if rule is UpdateRule.INDEPENDENT and asked.granularity is Structure.UNITS:
        raise ParameterError(
            f"update: {rule} adds up solutions for rows and for columns, but structure: {Structure.UNITS} is paid for "
            f"by its columns alone, so nothing is added; try {UpdateRule.EXACT}"
        )
    if rule is UpdateRule.CHUNKED and structured:
        raise ParameterError(
            f"update: {rule} solves for some single weights at a time, so it needs structure: weights or N:M; got "
            f"structure: {asked.granularity}; try {UpdateRule.EXACT}"
        )
    if rule in (UpdateRule.INDEPENDENT, UpdateRule.CHUNKED) and kind not in _SINGLE_PRODUCT:
        raise ParameterError(
            f"update: {rule} needs a curvature that is one Kronecker product ({', '.join(_SINGLE_PRODUCT)}); got "
            f"curvature: {kind}; try {UpdateRule.EXACT}"
        )


def _damping(asked: Preferences, kind: Curvature, cost: Cost, rule: UpdateRule) -> Damping:
    activations, gradients = asked.damping_activations, asked.damping_gradients
    inverts = kind not in _UNCORRELATED and (cost is not Cost.OBD or rule is not UpdateRule.NONE)
    if not inverts:
        uncorrelated = kind in _UNCORRELATED
        where = f"curvature: {kind}" if uncorrelated else f"cost: {cost} and update: {rule}"
        reason = "nothing is inverted or solved there"
        no_effect("damping.activations", activations, where, reason)
        no_effect("damping.gradients", gradients, where, reason)
        return Damping(0.0, 0.0)
    default = STRUCTURED_DAMPING if is_structured(asked.granularity) else WEIGHTS_DAMPING
    default = UNITS_DAMPING if asked.granularity is Structure.UNITS else default
    if kind in _WITHOUT_GRADIENTS:
        no_effect("damping.gradients", gradients, f"curvature: {kind}", "which has no factor of gradients")
        default = replace(default, gradients=0.0)
    by_columns = asked.granularity is Structure.UNITS and asked.correction is not Correction.NEWTON
    if by_columns and kind in _SINGLE_PRODUCT:
        reason = "units go by the columns of a linear, for which only the factor of activations is inverted"
        if gradients != activations:  # one number for both is meant for what there is
            no_effect("damping.gradients", gradients, f"structure: {Structure.UNITS}", reason)
        gradients = None
        default = replace(default, gradients=0.0)
    return Damping(
        default.activations if activations is None else activations,
        default.gradients if gradients is None else gradients,
    )


def _ranking(asked: Preferences) -> Ranking:
    if is_structured(asked.granularity):
        # Coefficients of Bonsai are shrunk alike, heads and neurons, which makes heads look cheap for their size.
        return asked.ranking or (Ranking.COST if asked.method is Method.BONSAI else Ranking.COST_PER_WEIGHT)
    if asked.ranking is Ranking.COST_PER_WEIGHT:
        no_effect(
            "ranking", asked.ranking, f"structure: {asked.granularity}", "whose members have equally many weights"
        )
    return Ranking.COST


def _allocation(asked: Preferences, preset: Preset) -> Allocation:
    allocation = asked.allocation or preset.allocation
    if is_structured(asked.granularity) and allocation is Allocation.PER_ROW:
        raise ParameterError(
            f"allocation: {allocation} chooses weights within a row, but structure: {asked.granularity} removes "
            f"whole ones; allowed: {Allocation.GLOBAL}, {Allocation.PER_LAYER}"
        )
    if asked.method is Method.SPARSEGPT and allocation is not preset.allocation:
        raise ParameterError(
            f"allocation: got {allocation}, but method {asked.method} goes through one linear after the other; "
            f"allowed: {preset.allocation}"
        )
    return allocation

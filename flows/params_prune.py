"""The section `prune`: how much is removed, how it is chosen, and how the rest is adapted.

What a method decides is null by default. A value that is given must be possible and must have an effect, which is found
out when the parameters are loaded; `PruneParams.recipe` is what they come down to.
"""

import math
import re
from dataclasses import replace
from typing import Annotated, Any, Self

from pydantic import (
    BeforeValidator,
    ByteSize,
    Field,
    PlainSerializer,
    PrivateAttr,
    StrictBool,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from flows.params_bonsai import BonsaiParams
from flows.params_layerchop import LayerChopParams
from flows.params_section import Integer, Number, Positive, Section
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
from surgeon.errors import ParameterError
from surgeon.presets import WITHOUT_CURVATURE
from surgeon.pruning.granularity import Granularity, NMPattern, is_structured, parse_granularity
from surgeon.recipe import Preferences, Recipe, resolve
from surgeon.text.suggest import did_you_mean

TARGETS = ("sparsity", "parameters", "size", "speedup")
"""Ways to say how much is to go, of which one is given."""
STRUCTURED_SPARSITY = 0.2
"""Default sparsity where whole rows, columns or units go."""
WEIGHTS_SPARSITY = 0.5
"""Default sparsity where single weights go."""
SHOTS = 3
"""Default number of shots by curvature."""
BONSAI_STEP = 0.05
"""Default fraction that a round of Bonsai removes at most (Dery et al. 2024, `prune_frac`)."""
_STEP_ROUNDING = 1e-9


def _read_granularity(value: Any) -> Any:
    if isinstance(value, Structure | NMPattern):
        return value
    if not isinstance(value, str):
        raise PydanticCustomError(
            "granularity", "must be text: units, rows, columns, rows-and-columns, weights, blocks or N:M"
        )
    try:
        return parse_granularity(value)
    except ParameterError as error:
        reason = str(error).removeprefix(f"structure {value}: ").removeprefix(f"structure {value!r}: ")
        reason = f"{reason}.{did_you_mean(value, [choice.value for choice in Structure])}"
        raise PydanticCustomError("granularity", "{reason}", {"reason": reason}) from error


_Granularity = Annotated[
    Granularity,
    BeforeValidator(_read_granularity),
    PlainSerializer(str),
    WithJsonSchema({"type": "string", "pattern": rf"^({'|'.join(Structure)}|[0-9]+:[0-9]+)$"}),
]
_Relative = Annotated[Number, Field(ge=0)]


_SCALES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def _read_count(value: Any) -> Any:
    """A number of parameters, "100M" say."""
    found = (
        re.fullmatch(r"([0-9]+\.?[0-9]*)\s*([KMB]?)", value.strip(), re.IGNORECASE) if isinstance(value, str) else None
    )
    if found:
        return round(float(found[1]) * _SCALES[found[2].upper()])
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise PydanticCustomError("count", "must be a number such as 100M, 1.2B or 90000000")


def _text_or_number(example: str) -> WithJsonSchema:
    """JSON schema of a number that may be written with a unit."""
    return WithJsonSchema({"anyOf": [{"type": "string", "examples": [example]}, {"type": "integer", "minimum": 1}]})


_Count = Annotated[int, BeforeValidator(_read_count), Field(gt=0), _text_or_number("100M")]
_Size = Annotated[ByteSize, Field(gt=0), _text_or_number("200MB")]


class DampingParams(Section):
    """What is added to the diagonal of a factor, as a fraction of its mean diagonal; one number sets both."""

    activations: _Relative | None = None
    gradients: _Relative | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, value: Any) -> Any:
        # YAML 1.1 reads 1e-3, which has no point, as text.
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            return {"activations": value, "gradients": value}
        return {} if value is None else value


class AdapterParams(Section):
    """Training of low-rank adapters after each shot.

    Attributes:
        rank: of each adapter.
        learning_rate: of the optimiser.
        fraction: part of the calibration sequences that is trained on.
        epochs: passes over them.
    """

    rank: Positive = 8
    learning_rate: Annotated[Number, Field(gt=0)] = 1e-4
    fraction: Annotated[Number, Field(gt=0, le=1)] = 1.0
    epochs: Positive = 1


class PruneParams(Section):
    """How much is removed, how it is chosen, and how the rest is adapted; None is left to the method."""

    method: Method = Method.LLM_SURGEON
    sparsity: Annotated[Number, Field(gt=0, lt=1)] | None = None
    parameters: _Count | None = None
    size: _Size | None = None
    speedup: Annotated[Number, Field(gt=1)] | None = None
    shots: Positive | None = None
    structure: _Granularity = Structure.UNITS
    widths: Widths | None = None
    multiple: Positive | None = None
    heads: StrictBool | None = None
    rescorings: Annotated[Integer, Field(ge=0)] | None = None
    curvature: Curvature | None = None
    rank: Annotated[Integer, Field(ge=2)] | None = None
    power_iterations: Positive | None = None
    targets: Targets | None = None
    draws: Positive | None = None
    cost: Cost | None = None
    ranking: Ranking | None = None
    allocation: Allocation | None = None
    update: UpdateRule | None = None
    max_iterations: Positive | None = None
    tolerance: Annotated[Number, Field(gt=0, le=1)] | None = None
    max_correlate: Positive | None = None
    damping: DampingParams = DampingParams()
    correction: Correction = Correction.NONE
    newton_step: Annotated[Number, Field(gt=0, le=1)] | None = None
    adapters: AdapterParams = AdapterParams()
    layerchop: LayerChopParams = LayerChopParams()
    bonsai: BonsaiParams = BonsaiParams()
    fresh_calibration: StrictBool = False

    _recipe: Recipe = PrivateAttr()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.fresh_calibration and self.n_shots(self.target_sparsity) == 1:
            raise PydanticCustomError(
                "no_effect",
                "fresh_calibration: true has no effect with shots: 1, because it draws new sequences for every shot "
                "after the first; set it to false or ask for more shots",
            )
        if self.correction is not Correction.ADAPTERS and self.adapters != AdapterParams():
            raise PydanticCustomError(
                "no_effect",
                "adapters has no effect with correction: {correction}, because it says how adapters are trained; "
                "leave it out or choose correction: adapters",
                {"correction": str(self.correction)},
            )
        if self.method is Method.LAYERCHOP and self.shots not in (None, 1):
            raise PydanticCustomError(
                "no_effect",
                "shots: {shots} has no effect with method: layerchop, which removes all blocks at once (a selector "
                "such as sleb measures again after each by itself); leave it null",
                {"shots": self.shots},
            )
        for method, own, default in (
            (Method.LAYERCHOP, self.layerchop, LayerChopParams()),
            (Method.BONSAI, self.bonsai, BonsaiParams()),
        ):
            if self.method is not method and own != default:
                raise PydanticCustomError(
                    "no_effect",
                    "{section} has no effect with method: {method}; leave it out or choose method: {section}",
                    {"section": method.value, "method": self.method.value},
                )
        self._check_target()
        if isinstance(self.structure, NMPattern) and self.target_sparsity > self.structure.sparsity:
            raise PydanticCustomError(
                "target",
                "sparsity: got {got}, but structure: {pattern} removes at most {most} of the weights; ask for at most "
                "that, or leave it null",
                {"got": str(self.sparsity), "pattern": str(self.structure), "most": f"{self.structure.sparsity:g}"},
            )
        try:
            self._recipe = resolve(self._preferences())
            if self.method is Method.BONSAI:
                self.bonsai.require_comparable(self._recipe)
        except ParameterError as error:
            raise PydanticCustomError("recipe", "{reason}", {"reason": str(error)}) from error
        return self

    def _check_target(self) -> None:
        """Refuses several targets at once, and one in units that only coupled units can be counted in."""
        given = [name for name in TARGETS if getattr(self, name) is not None]
        given += ["layerchop.blocks"] if self.layerchop.blocks is not None else []
        if len(given) > 1:
            raise PydanticCustomError(
                "targets",
                "{given} are given, but a model has one target; leave all but one of {all} null",
                {"given": " and ".join(given), "all": ", ".join([*TARGETS, "layerchop.blocks"])},
            )
        if given and given != ["sparsity"] and self.structure not in (Structure.UNITS, Structure.BLOCKS):
            raise PydanticCustomError(
                "targets",
                "{given} has no effect with structure: {structure}, which leaves tensors of dense shape or needs index "
                "maps; give sparsity, or structure: units",
                {"given": given[0], "structure": str(self.structure)},
            )

    @property
    def target_sparsity(self) -> float:
        """Fraction of the weights to remove by all shots together; where another target is given, `Session.goal`."""
        if self.sparsity is not None:
            return self.sparsity
        if isinstance(self.structure, NMPattern):
            return self.structure.sparsity
        return STRUCTURED_SPARSITY if is_structured(self.structure) else WEIGHTS_SPARSITY

    def n_shots(self, fraction: float) -> int:
        """Steps in which a target is reached.

        Args:
            fraction: the target, of what the dense model has.
        """
        if self.method is Method.LAYERCHOP:
            return 1
        default = max(1, math.ceil(fraction / BONSAI_STEP - _STEP_ROUNDING)) if self.method is Method.BONSAI else SHOTS
        return self.shots or default

    @property
    def has_other_target(self) -> bool:
        """Whether the target is not a sparsity."""
        return self.layerchop.blocks is not None or any(getattr(self, name) is not None for name in TARGETS[1:])

    def recipe(self, seed: int) -> Recipe:
        """The same with every choice made.

        Args:
            seed: of the run; it keys the draws of `targets: sampled`.
        """
        recipe = self._recipe
        if recipe.curvature.targets is not Targets.SAMPLED:
            return recipe
        return replace(recipe, curvature=replace(recipe.curvature, seed=seed))

    def resolved(self) -> dict[str, Any]:
        """The parameters with every choice made, as plain JSON; null where a parameter has no effect."""
        recipe = self._recipe
        curvature, update, damping = recipe.curvature, recipe.update, recipe.damping
        adapters = recipe.correction is Correction.ADAPTERS
        blocks = recipe.granularity is Structure.BLOCKS
        uniform = recipe.units is not None and recipe.units.widths is Widths.UNIFORM
        by_curvature = recipe.method not in WITHOUT_CURVATURE
        return {
            "method": recipe.method.value,
            "sparsity": None if self.has_other_target else self.target_sparsity,
            "parameters": self.parameters,
            "size": self.size,
            "speedup": self.speedup,
            "shots": None if self.shots is None and self.has_other_target else self.n_shots(self.target_sparsity),
            "structure": str(recipe.granularity),
            "widths": recipe.units.widths.value if recipe.units else None,
            "multiple": recipe.units.multiple if recipe.units else None,
            "heads": recipe.units.heads if recipe.units else None,
            "rescorings": self._rescorings(),
            "curvature": curvature.kind.value if by_curvature else None,
            "rank": curvature.rank if curvature.kind is Curvature.KRONECKER_SUM else None,
            "power_iterations": curvature.iterations or None,
            "targets": curvature.targets.value if by_curvature else None,
            "draws": curvature.draws if curvature.targets is Targets.SAMPLED else None,
            "cost": recipe.cost.value if by_curvature else None,
            "ranking": None if uniform or blocks else recipe.ranking.value,
            "allocation": None if uniform or blocks else recipe.allocation.value,
            "update": update.rule.value if by_curvature else None,
            "max_iterations": update.max_iterations or None,
            "tolerance": update.tolerance or None,
            "max_correlate": update.max_correlate or None,
            "damping": {
                "activations": _effective(damping.activations, self.damping.activations),
                "gradients": _effective(damping.gradients, self.damping.gradients),
            },
            "correction": recipe.correction.value if by_curvature else None,
            "newton_step": update.newton_step or None,
            "adapters": self.adapters.model_dump(mode="json") if adapters else None,
            "layerchop": self.layerchop.model_dump(mode="json") if blocks else None,
            "bonsai": self.bonsai.resolved() if recipe.method is Method.BONSAI else None,
            "fresh_calibration": self.fresh_calibration,
        }

    def _rescorings(self) -> int | None:
        """How often costs of units are taken again; None where that has no meaning."""
        units = self._recipe.units
        return units.rescorings if units and (units.rescorings or self.rescorings == 0) else None

    def _preferences(self) -> Preferences:
        return Preferences(
            method=self.method,
            granularity=self.structure,
            widths=self.widths,
            multiple=self.multiple,
            heads=self.heads,
            rescorings=self.rescorings,
            curvature=self.curvature,
            rank=self.rank,
            power_iterations=self.power_iterations,
            targets=self.targets,
            draws=self.draws,
            cost=self.cost,
            ranking=self.ranking,
            allocation=self.allocation,
            update=self.update,
            max_iterations=self.max_iterations,
            tolerance=self.tolerance,
            max_correlate=self.max_correlate,
            damping_activations=self.damping.activations,
            damping_gradients=self.damping.gradients,
            correction=self.correction,
            newton_step=self.newton_step,
        )


def _effective(value: float, given: float | None) -> float | None:
    """A damping of the recipe; None where it is zero because it has no effect, and not because zero was given."""
    return None if given != 0 and not value else value

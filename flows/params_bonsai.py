"""The section `prune.bonsai`: how many sub-models are run, on what, and what is made of their losses."""

from dataclasses import asdict
from typing import Annotated, Any, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from flows.params_section import Integer, Positive, Section
from surgeon.bonsai.regression import require_sub_models
from surgeon.bonsai.settings import BonsaiSettings
from surgeon.choices import Allocation, Penalty, Prior, Scope, Solver, Utility, Widths
from surgeon.errors import ParameterError
from surgeon.recipe import Recipe


class BonsaiParams(Section):
    """How Bonsai learns what units are worth; None is the method's own.

    Attributes:
        sub_models: run in each round, an even number; 0 goes by the prior alone.
        sequences: calibration sequences that each sub-model runs on; None is all.
        prior: what is known of units before.
        utility: what a sub-model is worth; None is minus its loss.
        solver: of the regression; None is ridge.
        scope: one regression for all sub-layers, or one for each; None is one for all.
        penalty: of the solver `adam`; None is l1.
    """

    sub_models: Annotated[Integer, Field(ge=0)] = 64
    sequences: Positive | None = None
    prior: Prior = Prior.WANDA
    utility: Utility | None = None
    solver: Solver | None = None
    scope: Scope | None = None
    penalty: Penalty | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            require_sub_models(self.sub_models)
        except ParameterError as error:
            raise PydanticCustomError("sub_models", "{reason}", {"reason": f"bonsai.{error}"}) from error
        given = [name for name in ("utility", "solver", "scope", "penalty") if getattr(self, name) is not None]
        if not self.sub_models and given:
            raise PydanticCustomError(
                "no_effect",
                "bonsai.{name} has no effect with sub_models: 0, because nothing is regressed; leave it null or ask "
                "for sub-models",
                {"name": given[0]},
            )
        if self.penalty is not None and self.solver is not Solver.ADAM:
            raise PydanticCustomError(
                "no_effect",
                "bonsai.penalty has no effect with solver: ridge, whose penalty is a square chosen by itself; leave it "
                "null or choose solver: adam",
            )
        return self

    def settings(self, seed: int) -> BonsaiSettings:
        """The same with every choice made.

        Args:
            seed: of the run.
        """
        return BonsaiSettings(
            sub_models=self.sub_models,
            sequences=self.sequences,
            prior=self.prior,
            utility=self.utility or Utility.NEGATIVE_LOSS,
            solver=self.solver or Solver.RIDGE,
            scope=self.scope or Scope.GLOBAL,
            penalty=self.penalty or Penalty.L1,
            seed=seed,
        )

    def resolved(self) -> dict[str, Any]:
        """The same as plain JSON; null where a parameter has no effect."""
        given = asdict(self.settings(seed=0))
        unused = {"seed"} | ({"utility", "solver", "scope", "penalty"} if not self.sub_models else set())
        unused |= {"penalty"} if given["solver"] is not Solver.ADAM else set()
        return {name: None if name in unused else value for name, value in given.items() if name != "seed"}

    def require_comparable(self, recipe: Recipe) -> None:
        """Refuses to compare priors of different sub-layers, which have no common scale.

        Raises:
            ParameterError: naming what makes them comparable.
        """
        units = recipe.units
        if self.sub_models or units is None:
            return
        if units.widths is Widths.FREE and recipe.allocation is Allocation.GLOBAL:
            raise ParameterError(
                "bonsai.sub_models: 0 leaves the prior alone, which does not compare between sub-layers; use "
                f"allocation: {Allocation.PER_LAYER}, widths: {Widths.UNIFORM}, or ask for sub-models"
            )
        if units.widths is Widths.UNIFORM and units.heads:
            raise ParameterError(
                "bonsai.sub_models: 0 leaves the prior alone, which does not compare between neurons and "
                "key/value groups; use heads: false, or ask for sub-models"
            )

    def require_sequences(self, n_sequences: int) -> None:
        """Refuses more sequences than the calibration has.

        Raises:
            ParameterError: naming both numbers.
        """
        if self.sequences is not None and self.sequences > n_sequences:
            raise ParameterError(
                f"prune.bonsai.sequences: got {self.sequences}, but calibrate.sequences is {n_sequences}; lower the "
                "one or raise the other, or leave it null for all"
            )

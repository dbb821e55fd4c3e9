"""The parameters of a run, where YAML enters the program.

A section is a stage and a sub-command of the same name; `run` holds what changes how a run is executed but not what it
finds. Values are checked here once, so that the code behind can rely on them.
"""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from flows.params_problems import describe, raise_problems
from flows.params_yaml import apply_override, read_yaml
from surgeon.choices import (
    Cost,
    Curvature,
    Device,
    Dtype,
    Keep,
    Method,
    Ranking,
    SequenceOrder,
    Structure,
    UpdateRule,
)
from surgeon.errors import ParameterError, TextError
from surgeon.text import TextSpec, check_spec


class EngineName(StrEnum):
    """What runs the tasks: Prefect, with its records and its page, or plain calls in this process."""

    PREFECT = "prefect"
    INLINE = "inline"


def _refuse_bool(value: Any) -> Any:
    """Pydantic would read true as 1."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "must be a number")
    return value


_Integer = Annotated[int, BeforeValidator(_refuse_bool)]
_Number = Annotated[float, BeforeValidator(_refuse_bool)]
_Positive = Annotated[_Integer, Field(ge=1)]
_Word = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelParams(Section):
    """The model to prune."""

    source: _Word = "smollm2-135m"
    revision: _Word | None = None
    dtype: Dtype = Dtype.FLOAT32
    trust_remote_code: StrictBool = False


class TextParams(Section):
    """A text; see `surgeon.text.TextSpec`."""

    source: _Word = "python-docs"
    split: _Word | None = None
    column: _Word | None = None
    revision: _Word | None = None

    def spec(self) -> TextSpec:
        """Returns the same as the library names it."""
        return TextSpec(self.source, self.split, self.column, self.revision)

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            check_spec(self.spec())
        except TextError as error:
            raise PydanticCustomError("text", "{reason}", {"reason": str(error)}) from error
        return self


class CalibrateParams(Section):
    """The sequences that curvature is measured on."""

    text: TextParams = TextParams(split="calibration")
    sequences: _Positive = 16
    length: Annotated[_Integer, Field(ge=2)] = 128
    order: SequenceOrder = SequenceOrder.GRID


class EvaluateParams(Section):
    """The windows that perplexity is measured on; `windows` None is all of the text."""

    text: TextParams = TextParams(split="held-out")
    windows: _Positive | None = 16
    length: Annotated[_Integer, Field(ge=2)] = 128


class DampingParams(Section):
    """What is added to the diagonal of a factor, as a fraction of its mean diagonal; one number sets both."""

    activations: Annotated[_Number, Field(ge=0)] = 0.01
    gradients: Annotated[_Number, Field(ge=0)] = 0.1

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, value: Any) -> Any:
        # YAML 1.1 reads 1e-3, which has no point, as text.
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            return {"activations": value, "gradients": value}
        return value


class PruneParams(Section):
    """How much is removed, how it is chosen, and how the rest is adapted."""

    method: Method = Method.LLM_SURGEON
    sparsity: Annotated[_Number, Field(gt=0, lt=1)] = 0.2
    shots: _Positive = 3
    structure: Structure = Structure.ROWS_AND_COLUMNS
    curvature: Curvature = Curvature.KFAC
    cost: Cost = Cost.OBS
    ranking: Ranking = Ranking.COST_PER_WEIGHT
    update: UpdateRule = UpdateRule.EXACT
    damping: DampingParams = DampingParams()
    fresh_calibration: StrictBool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.fresh_calibration and self.shots == 1:
            raise PydanticCustomError(
                "no_effect",
                "fresh_calibration: true has no effect with shots: 1, because it draws new sequences for every shot "
                "after the first; set it to false or ask for more shots",
            )
        return self


class ExportParams(Section):
    """How the pruned model is written; `dtype` None is that of the model."""

    dtype: Dtype | None = None


class ReportParams(Section):
    """What the report shows."""

    prompt: _Word = "The capital of France is"
    new_tokens: _Positive = 24


class RunParams(Section):
    """How a run is executed."""

    engine: EngineName = EngineName.PREFECT
    device: Device = Device.AUTO
    batch_size: _Positive = 4
    blocks_per_group: _Positive | None = None
    memory_gib: Annotated[_Number, Field(gt=0)] | None = None
    keep: Keep = Keep.LAST
    store: _Word | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.blocks_per_group is not None and self.memory_gib is not None:
            raise PydanticCustomError(
                "no_effect",
                "memory_gib has no effect when blocks_per_group is given, because it only chooses blocks_per_group; "
                "set one of them to null",
            )
        return self


class Params(Section):
    """All parameters of a run."""

    seed: Annotated[_Integer, Field(ge=0)] = 0
    model: ModelParams = ModelParams()
    calibrate: CalibrateParams = CalibrateParams()
    evaluate: EvaluateParams = EvaluateParams()
    prune: PruneParams = PruneParams()
    export: ExportParams = ExportParams()
    report: ReportParams = ReportParams()
    run: RunParams = RunParams()

    @model_validator(mode="after")
    def _check(self) -> Self:
        calibrate, evaluate = self.calibrate.text, self.evaluate.text
        if (calibrate.source, calibrate.split) == (evaluate.source, evaluate.split):
            raise PydanticCustomError(
                "same_text",
                "calibrate.text and evaluate.text are the same source and split; a model must not be scored on the "
                "text it was pruned with, so choose another split or source for one of them",
            )
        return self


def load_params(path: Path | None, overrides: Sequence[str] = ()) -> Params:
    """Reads parameters from a YAML file and from overrides of the command line, which win.

    Args:
        path: The file; it may omit sections and keys, which then have their defaults. None is no file.
        overrides: `section.key=value` each, with the value in YAML.

    Returns:
        The checked parameters.

    Raises:
        ParameterError: The file cannot be read, or anything in it or in an override is wrong; lists all problems.
    """
    tree = {} if path is None else read_yaml(path)
    where = "defaults" if path is None else str(path)
    problems: list[str] = []
    keys: dict[str, tuple[str, ...]] = {}
    for override in overrides:
        try:
            keys[override] = apply_override(tree, override)
        except ParameterError as error:
            problems.append(str(error))
    try:
        # A section whose keys are all left out or commented out is null in YAML.
        params = Params.model_validate({key: {} if value is None else value for key, value in tree.items()})
    except ValidationError as error:
        problems.extend(describe(error, Params, where, keys))
    raise_problems(problems)
    return params

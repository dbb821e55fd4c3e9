"""The parameters of a run, where YAML enters the program.

A section is a stage and a sub-command of the same name; `run` holds what changes how a run is executed but not what it
finds. Values are checked here once, so that the code behind can rely on them.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, StrictBool, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from flows.params_problems import describe, raise_problems
from flows.params_prune import PruneParams
from flows.params_recovery import RecoveryParams
from flows.params_section import Integer, Number, Positive, Section, Word
from flows.params_text import TextParams
from flows.params_yaml import apply_override, read_yaml
from flows.pool import Runner
from surgeon.choices import Device, Dtype, ExportLayout, Keep, Precision, SequenceOrder
from surgeon.errors import ParameterError


class EngineName(StrEnum):
    """What runs the tasks: Prefect, with its records and its page, or plain calls in this process."""

    PREFECT = "prefect"
    INLINE = "inline"


class ModelParams(Section):
    """The model to prune."""

    source: Word = "smollm2-135m"
    revision: Word | None = None
    dtype: Dtype = Dtype.FLOAT32
    trust_remote_code: StrictBool = False


class CalibrateParams(Section):
    """The sequences that curvature is measured on."""

    text: TextParams = TextParams(split="calibration")
    sequences: Positive = 16
    length: Annotated[Integer, Field(ge=2)] = 128
    order: SequenceOrder = SequenceOrder.GRID


class EvaluateParams(Section):
    """The windows that perplexity is measured on; `windows` None is all of the text."""

    text: TextParams = TextParams(split="held-out")
    windows: Positive | None = 16
    length: Annotated[Integer, Field(ge=2)] = 128


class ExportParams(Section):
    """How the pruned model is written; `dtype` None is that of the model."""

    dtype: Dtype | None = None
    layout: ExportLayout = ExportLayout.AUTO


class BenchmarkParams(Section):
    """How the dense and the exported model are measured side by side; `rounds` 0 compares their sizes only."""

    batch_sizes: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 8, 32)
    prompt: Positive = 64
    new_tokens: Positive = 16
    rounds: Annotated[Integer, Field(ge=0)] = 3
    dtype: Dtype | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.batch_sizes)) < len(self.batch_sizes):
            raise PydanticCustomError("twice", "batch_sizes has a number twice; give each batch size once")
        return self


class ReportParams(Section):
    """What the report shows."""

    prompt: Word = "The capital of France is"
    new_tokens: Positive = 24


class RunParams(Section):
    """How a run is executed."""

    engine: EngineName = EngineName.PREFECT
    runner: Runner = Runner.THREADS
    workers: Positive = 1
    cluster: Word | None = None
    threads: Positive | None = None
    shards: Positive = 1
    device: Device = Device.AUTO
    precision: Precision = Precision.FLOAT32
    batch_size: Positive | None = None
    blocks_per_group: Positive | None = None
    memory_gib: Annotated[Number, Field(gt=0)] | None = None
    keep: Keep = Keep.LAST
    store: Word | None = None
    cache: Word | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.blocks_per_group is not None and self.memory_gib is not None:
            raise PydanticCustomError(
                "no_effect",
                "memory_gib has no effect when blocks_per_group is given, because it only chooses blocks_per_group; "
                "set one of them to null",
            )
        if self.cluster is not None and self.runner not in (Runner.DASK, Runner.RAY):
            raise PydanticCustomError(
                "no_effect",
                "cluster has no effect with runner: {runner}, which works on this machine alone; use dask or ray",
                {"runner": self.runner.value},
            )
        if self.precision is Precision.TF32 and self.device is Device.CPU:
            raise PydanticCustomError(
                "no_effect", "precision tf32 has no effect on a CPU, only on a CUDA device; use float32"
            )
        return self


class Params(Section):
    """All parameters of a run."""

    seed: Annotated[Integer, Field(ge=0)] = 0
    model: ModelParams = ModelParams()
    calibrate: CalibrateParams = CalibrateParams()
    evaluate: EvaluateParams = EvaluateParams()
    prune: PruneParams = PruneParams()
    recovery: RecoveryParams = RecoveryParams()
    export: ExportParams = ExportParams()
    benchmark: BenchmarkParams = BenchmarkParams()
    report: ReportParams = ReportParams()
    run: RunParams = RunParams()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.run.precision is Precision.TF32 and self.model.dtype is not Dtype.FLOAT32:
            raise PydanticCustomError(
                "no_effect",
                "run.precision tf32 has no effect with model.dtype {dtype}, whose products are of that dtype; set "
                "run.precision to float32, or model.dtype to float32",
                {"dtype": self.model.dtype.value},
            )
        calibrate, evaluate, recovery = self.calibrate.text, self.evaluate.text, self.recovery.text
        if recovery is not None and (recovery.source, recovery.split) == (evaluate.source, evaluate.split):
            raise PydanticCustomError(
                "same_text",
                "recovery.text and evaluate.text are the same source and split; a model must not be scored on the text "
                "it was trained on, so choose another split or source for one of them",
            )
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
    return check_params(tree, "defaults" if path is None else str(path), overrides)


def check_params(tree: Mapping[Any, Any], where: str, overrides: Sequence[str] = ()) -> Params:
    """Checks parameters that were read from somewhere.

    Args:
        tree: Sections; what they leave out has its default.
        where: What they were read from, for messages.
        overrides: `section.key=value` each, which win.

    Returns:
        The checked parameters.

    Raises:
        ParameterError: Anything in them is wrong; lists all problems.
    """
    tree = deepcopy(dict(tree))
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
